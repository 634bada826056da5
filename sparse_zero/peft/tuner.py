"""SparseZeroModel: the tuner between a PeftModel and a sparse model, and what loads adapters through PEFT."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.integrations import skip_init_on_device
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers.utils.loading_report import LoadStateDictInfo

from sparse_zero.adapters.files import Adapter
from sparse_zero.adapters.schema import PEFT_TYPE, ROWS_SUFFIX
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify
from sparse_zero.model.sparsity import check_not_sparse
from sparse_zero.model.wrappers import unwrap
from sparse_zero.peft.config import HEADS, SparseZeroConfig
from sparse_zero.peft.layer import NAME, SparseZeroLayer, layer_of

PREFIX = "base_model.model."
CHECKSUM_SUFFIX = ".positions"
"""The end of the name of the checksum of a weight's positions in an adapter's state dict, int64 ()."""


class SparseZeroModel(BaseTuner):
    """Makes the model of a PeftModel sparse. Its layers are not replaced; see `sparse_zero.sparsify`."""

    prefix = f"{PEFT_TYPE.lower()}_"
    tuner_layer_cls = SparseZeroLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    @skip_init_on_device  # with low_cpu_mem_usage, PEFT would create the deltas without values
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add an adapter with the configuration `self.peft_config[adapter_name]`.

        Args:
            model: the base model, or a model that has adapters.
            adapter_name: a new name.
            autocast_adapter_dtype, low_cpu_mem_usage: no effect. Deltas are float32.
            state_dict: not supported.

        Raises:
            UserError: see `sparsify` and `load_adapter`. The model is then unchanged.
        """
        if state_dict is not None:
            raise UserError("a state dict does not say which scalars it belongs to: load an adapter's directory")
        config: SparseZeroConfig = self.peft_config[adapter_name]
        inner = unwrap(model)
        layer, is_first = layer_of(inner), False
        if layer is None:
            check_not_sparse(inner)
            layer, is_first = SparseZeroLayer(inner), True
            layer.check_not_merged()
        if config.directory is not None:
            layer.load(adapter_name, config.directory)
        else:
            layer.add(adapter_name, lambda plain: _sparsify(plain, config))
        if is_first:
            inner.add_module(NAME, layer)
        if adapter_name in layer.active_adapter:
            self.active_adapter = adapter_name
            layer.set_requires_grad(adapter_name, not config.inference_mode)
        else:
            layer.set_requires_grad(adapter_name, False)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around each forward. Raises UserError: it asks for an adapter for each row of the batch."""
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                "adapter_names: the weights of a sparse model have one adapter for a whole batch; call "
                "set_adapter(name), and leave it out"
            )
        yield

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("inject_adapter does not replace layers")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Deltas are float32 already."""

    def _check_merge_allowed(self) -> None:
        """A tied weight has one delta: it stays tied."""

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layer = layer_of(self.model)
        if layer is not None:
            layer.unload_model(merge, adapter_names)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SparseZeroConfig,
        adapter_name: str,
        state_dict: Mapping[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """The values of an adapter, and checksums of their positions. PEFT calls it before it saves.

        Under ZeRO stage 3, all ranks must call it, or `state_dict` must be complete.
        """
        adapter = _layer(model).extract(adapter_name, True, _complete(state_dict))
        update = {"task_type": config.task_name, "revision": config.revision}
        update = {key: value for key, value in update.items() if value is not None}
        adapter = replace(adapter, config=adapter.config.model_copy(update=update))
        config.to_write = adapter
        return {f"{PREFIX}{name}": values for name, values in _tensors(adapter).items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SparseZeroConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Set the values of an adapter from what `_get_adapter_state_dict` has returned.

        Returns: nothing for PEFT to load.

        Raises:
            UserError: the state dict belongs to other positions, or does not say to which.
        """
        if config.is_new:  # PEFT reads the values again that the adapter was created with
            config.is_new = False
            return {}
        layer = _layer(model)
        values = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
        adapter = layer.extract(adapter_name, True)
        expected = _tensors(adapter)
        if odd := sorted(values.keys() ^ expected.keys()):
            hint = "; load the adapter's directory" if odd[0].endswith(CHECKSUM_SUFFIX) else ""
            raise UserError(f"'{odd[0]}' is in only one of the state dict and the adapter '{adapter_name}'{hint}")
        for name, tensor in expected.items():
            is_checksum = name.endswith(CHECKSUM_SUFFIX) and name not in adapter.whole
            if values[name].shape != tensor.shape or (is_checksum and int(values[name]) != int(tensor)):
                raise UserError(
                    f"'{name}' of the state dict belongs to another selection (seed, density or targets) than that of "
                    f"the adapter '{adapter_name}'"
                )
        new = Adapter(
            adapter.config,
            deltas={name: values[name] for name in adapter.deltas},
            whole={name: values[name] for name in adapter.whole},
            rows={name: values[name + ROWS_SUFFIX] for name in adapter.rows},
            stored_positions=adapter.stored_positions,
        )
        layer.set_values(adapter_name, new)
        return {}


def _layer(model: nn.Module) -> SparseZeroLayer:
    layer = layer_of(model)
    if layer is None:
        raise UserError("the model has no sparse adapter: it was merged or unloaded")
    return layer


def _sparsify(model: nn.Module, config: SparseZeroConfig) -> None:
    heads = HEADS.get(config.task_name, ())
    present = {name.rpartition(".")[-1] for name, _ in model.named_modules()}
    names = [*(config.sparse.modules_to_save or []), *(name for name in heads if name in present)]
    wanted = list(dict.fromkeys(names))
    sparsify(model, config.sparse.model_copy(update={"modules_to_save": wanted}) if wanted else config.sparse)
    if config.revision is not None:
        model.sparsity.revision = config.revision


def _tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    checksums = {
        name + CHECKSUM_SUFFIX: torch.tensor(int(entry.positions[:15], 16))
        for name, entry in adapter.config.tensors.items()
    }
    rows = {name + ROWS_SUFFIX: values for name, values in adapter.rows.items()}
    return adapter.deltas | adapter.whole | rows | checksums


def _complete(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The state dict by the names of the model; None if ZeRO stage 3 has left tensors of it without values."""
    if any(isinstance(tensor, torch.Tensor) and hasattr(tensor, "ds_id") for tensor in state_dict.values()):
        return None
    values = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
    partitioned = any(isinstance(tensor, torch.Tensor) and tensor.shape == (0,) for tensor in values.values())
    return None if partitioned else values


def reload_adapter(
    model: PeftModel, directory: str, adapter_name: str, is_trainable: bool, options: Mapping[str, Any]
) -> _IncompatibleKeys:
    """PeftModel.load_adapter for an adapter that the model has.

    Raises:
        UserError: see `load_adapter`; also, the directory has another selection.
    """
    config: SparseZeroConfig = model.peft_config[adapter_name]
    found = SparseZeroConfig.from_pretrained(directory, **options)
    is_loaded = config.is_new and config.directory is not None and _same(config.directory, found.directory)
    config.is_new = False
    if not is_loaded:
        _layer(model).load(adapter_name, found.directory)
    if not is_trainable:
        model.eval()
    return _IncompatibleKeys([], [])


def _same(one: str, other: str | None) -> bool:
    return other is not None and Path(one).resolve() == Path(other).resolve()


def load_into_transformers(
    model: nn.Module, config: PeftConfig, adapter_name: str, is_trainable: bool
) -> LoadStateDictInfo:
    """PreTrainedModel.load_adapter: without a PeftModel around the model.

    Raises:
        UserError: see `load_adapter`; also, the model has an adapter of this name.
    """
    if adapter_name in (getattr(model, "peft_config", None) or {}):
        raise UserError(f"the model has an adapter '{adapter_name}'; choose another adapter_name")
    config.inference_mode, config.is_new = not is_trainable, False
    inject_adapter_in_model(config, model, adapter_name)
    model._hf_peft_config_loaded = True
    if not is_trainable:
        model.eval()
    empty = {"error_msgs": [], "conversion_errors": {}}
    return LoadStateDictInfo(**{field.name: empty.get(field.name, set()) for field in fields(LoadStateDictInfo)})
