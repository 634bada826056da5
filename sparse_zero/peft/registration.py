"""Make the method known to PEFT, and to the calls of transformers that load adapters.

PEFT finds a method by a member of its enumeration `PeftType`, which has no function to add one. Three functions of
PEFT and transformers read files themselves before they ask the method; they are wrapped, and do what they did for
adapters of other methods.
"""

import functools
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import register_peft_method
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from sparse_zero.adapters.schema import PEFT_TYPE


def register() -> None:
    """Register the method. Does nothing if it is registered."""
    if PEFT_TYPE not in PeftType.__members__:
        _add_member()
    if PeftType(PEFT_TYPE) in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    from sparse_zero.peft.config import SparseZeroConfig
    from sparse_zero.peft.tuner import SparseZeroModel

    register_peft_method(name=PEFT_TYPE.lower(), config_cls=SparseZeroConfig, model_cls=SparseZeroModel)
    _wrap_from_json_file()
    _wrap_load_adapter()
    _wrap_load_adapter_of_transformers()


def _add_member() -> None:
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = member._value_ = PEFT_TYPE
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    setattr(PeftType, PEFT_TYPE, member)
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member


def _wrap_from_json_file() -> None:
    """Adapters of earlier versions have no `peft_type`. The directory is needed with the configuration: the positions
    of an adapter are in it."""
    from sparse_zero.peft.config import DIRECTORY

    before = PeftConfigMixin.from_json_file.__func__

    @functools.wraps(before)
    def from_json_file(cls: type, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        content = before(cls, path_json_file, **kwargs)
        if content.get("adapter_type") == "sparse-zero":
            content = {"peft_type": PEFT_TYPE} | content | {DIRECTORY: str(Path(path_json_file).parent)}
        return content

    PeftConfigMixin.from_json_file = classmethod(from_json_file)


def _wrap_load_adapter() -> None:
    """Into an adapter that exists, PEFT loads the values of a file without a look at its configuration: they could be
    for other positions."""
    from sparse_zero.peft.tuner import reload_adapter

    before = PeftModel.load_adapter

    @functools.wraps(before)
    def load_adapter(
        self: PeftModel, model_id: Any, adapter_name: str, is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        config = self.peft_config.get(adapter_name)
        if config is None or config.peft_type != PEFT_TYPE:
            return before(self, model_id, adapter_name, is_trainable, *args, **kwargs)
        return reload_adapter(self, str(model_id), adapter_name, is_trainable, kwargs)

    PeftModel.load_adapter = load_adapter


def _wrap_load_adapter_of_transformers() -> None:
    """`PreTrainedModel.load_adapter` loads the tensors of a file into parameters of the same names, which are our
    adapters' weights, and skips what PEFT's methods do with a state dict."""
    from sparse_zero.peft.tuner import load_into_transformers

    before = PeftAdapterMixin.load_adapter

    @functools.wraps(before)
    def load_adapter(self: nn.Module, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        config = _our_config(peft_model_id, kwargs) if not args else None
        if config is None:
            return before(self, peft_model_id, *args, **kwargs)
        name = kwargs.get("adapter_name") or "default"
        return load_into_transformers(self, config, name, kwargs.get("is_trainable", False))

    PeftAdapterMixin.load_adapter = load_adapter


def _our_config(name: str | None, kwargs: dict[str, Any]) -> PeftConfig | None:
    """The configuration of a directory or hub repository, if it is an adapter of ours."""
    from sparse_zero.peft.config import SparseZeroConfig

    if kwargs.get("peft_config") is not None or kwargs.get("adapter_state_dict") is not None:
        return None
    loading = kwargs.get("load_config")
    name = name or getattr(loading, "pretrained_model_name_or_path", None)
    if name is None:
        return None
    options = {**(getattr(loading, "download_kwargs", None) or {}), **(kwargs.get("adapter_kwargs") or {})}
    options = {key: value for key, value in options.items() if not key.startswith("_")}
    if kwargs.get("local_files_only"):
        options["local_files_only"] = True
    try:
        kind = PeftConfig._get_peft_type(str(name), **PeftConfig._split_kwargs(options)[0])
    except (ValueError, KeyError):
        return None  # transformers says what is wrong
    return SparseZeroConfig.from_pretrained(str(name), **options) if kind == PEFT_TYPE else None
