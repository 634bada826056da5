"""Quantised base models: from `model.quantization` to what from_pretrained takes, and back from a loaded model."""

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from sparse_zero.data import torch_ao
from sparse_zero.errors import UserError, first_line
from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.quantized.methods import BITSANDBYTES, TORCHAO, described_method, method_of, own_quantization
from sparse_zero.quantized.names import WHAT_WORKS
from sparse_zero.recipe.quantization import FOUR_BITS, Quantization
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.targets import find_modules_to_save

logger = logging.getLogger(__name__)

INSTALL = "pip install 'sparse-zero[quantization]'"
KEY = "model.quantization"


def check_installed(quantization: Quantization, where: str = KEY) -> None:
    """Raise UserError if a base model cannot be quantised on this machine. Args: where: begins the message."""
    if importlib.util.find_spec(quantization.package) is None:
        raise UserError(f"{where}: {quantization.kind} needs the package {quantization.package}: {INSTALL}")
    try:
        AutoHfQuantizer.from_config(transformers_config(quantization), pre_quantized=False).validate_environment()
    except Exception as error:  # of versions and devices: ImportError, RuntimeError, ...
        raise UserError(f"{where}: {quantization.kind}: {first_line(error)}") from error


def check_trainable(
    name: str, config: PreTrainedConfig, quantization: Quantization | None, anywhere: bool = False
) -> None:
    """Raise UserError if no scalars can be trained in the packed weights of a checkpoint, if they cannot be read on
    this machine, or if it is to be quantised once more.

    Args:
        name: names the model in messages.
        config: the model's.
        quantization: of the recipe.
        anywhere: whether it is enough that another machine can read them.
    """
    own = own_quantization(config)
    if own is None:
        if quantization is not None and not anywhere:
            check_installed(quantization)
        return
    found = from_transformers(own)
    if found is None:
        method = described_method(own)
        raise UserError(
            f"model.name: {name} is quantised by {method}, in whose weights no scalars can be trained: name a "
            f"checkpoint that is not quantised, and set {KEY}: {WHAT_WORKS} if memory is short"
        )
    if quantization is not None:
        raise UserError(f"{KEY}: {name} is quantised already, to {found.kind}: leave it out")
    if not anywhere:
        check_installed(found, f"model.name: {name} is quantised")


def from_transformers(given: Any) -> Quantization | None:
    """A `quantization_config` of bitsandbytes or torchao with all its keys; None for another method, for
    16-bit weights that are quantised in each forward, and for weights of torchao in which no scalars can be trained.

    Args: given: a mapping or an object of transformers.

    Raises UserError: the library has no such settings.
    """
    read = {BITSANDBYTES: _from_bits_and_bytes, TORCHAO: torch_ao.from_transformers}.get(method_of(given))
    if read is None:
        return None
    try:
        return read(given)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"the model's quantization_config is damaged: {first_line(error)}") from error


def _from_bits_and_bytes(given: Any) -> Quantization | None:
    config = BitsAndBytesConfig.from_dict(dict(given)) if isinstance(given, Mapping) else given
    settings = config.to_dict()
    if config.llm_int8_has_fp16_weight or config.quantization_method() is None:
        return None
    kind = "int8" if config.load_in_8bit else config.bnb_4bit_quant_type
    keys = ["llm_int8_threshold"] if kind == "int8" else [k for k in settings if k.startswith("bnb_4bit")]
    found = {key: settings[key] for key in keys if key != "bnb_4bit_quant_type"}
    return Quantization(kind=kind, llm_int8_skip_modules=config.llm_int8_skip_modules, **found)


def quantization_of(model: nn.Module) -> Quantization | None:
    """How transformers quantised a model, with all keys; None: it did not, or in a way that `Quantization` has not."""
    config = getattr(model, "config", None)
    own = own_quantization(config) if isinstance(config, PreTrainedConfig) else None
    return None if own is None else from_transformers(own)


def warn_of_wrong_widths(model: nn.Module) -> None:
    """Warn of 4-bit weights that bitsandbytes 0.50 dequantises wrongly on CPUs: its vectors of 32 values ignore that a
    block of 64 may begin within a row."""
    found = [
        name
        for name, layer in quantized_layers(model)
        if layer.kind.startswith(FOUR_BITS) and layer.shape[1] % 64 and layer.module.weight.device.type == "cpu"
    ]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        logger.warning(
            "bitsandbytes may dequantise %s%s wrongly on a CPU, because the width is no multiple of 64: use a GPU, or "
            "leave such layers out (model.quantization.llm_int8_skip_modules)",
            found[0],
            more,
        )


def transformers_config(quantization: Quantization) -> BitsAndBytesConfig | TorchAoConfig:
    """What from_pretrained takes. Args: quantization: with all its keys, see `completed`."""
    if quantization.package == TORCHAO:
        return torch_ao.transformers_config(quantization)
    settings = quantization.model_dump(exclude={"kind"}, exclude_none=True)
    if quantization.kind == "int8":
        del settings["bnb_4bit_use_double_quant"]
        return BitsAndBytesConfig(load_in_8bit=True, **settings)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization.kind, **settings)


def completed(
    quantization: Quantization,
    model: PreTrainedModel,
    sparse: SparseConfig,
    dtype: torch.dtype,
    cast_to: torch.dtype | None = None,
    partitioned: bool = False,
) -> Quantization:
    """Fill in what depends on the model and the run.

    Args:
        quantization: of the recipe.
        model: the base model before it is quantised; it may be on the meta device.
        sparse: the modules that it trains in full are not quantised.
        dtype: in which the base model is loaded.
        cast_to: the dtype to which DeepSpeed converts all floating-point parameters; None: it converts none.
        partitioned: whether ZeRO stage 3 partitions the packed weights.

    Raises UserError: the storage would be converted as if its bits were numbers, or the weights cannot be partitioned.
    """
    skipped = [*sorted(get_keys_to_not_convert(model)), *find_modules_to_save(model, sparse)]
    skipped += quantization.llm_int8_skip_modules or []
    filled: dict[str, Any] = {"llm_int8_skip_modules": list(dict.fromkeys(skipped))}
    if quantization.package == TORCHAO:
        found = quantization.model_copy(update=filled)
        torch_ao.check(found, model, partitioned)
        return found
    if quantization.kind == "int8":
        filled["llm_int8_threshold"] = float(
            6.0 if quantization.llm_int8_threshold is None else quantization.llm_int8_threshold
        )
        return quantization.model_copy(update=filled)
    used = _name(cast_to or dtype)
    storage = quantization.bnb_4bit_quant_storage
    if storage not in (None, "uint8", used) and cast_to is not None:
        raise UserError(
            f"{KEY}.bnb_4bit_quant_storage: {storage}: DeepSpeed would convert the packed bits to {used}; leave it out"
        )
    filled["bnb_4bit_quant_storage"] = storage or (used if partitioned else "uint8")
    filled["bnb_4bit_compute_dtype"] = quantization.bnb_4bit_compute_dtype or used
    return quantization.model_copy(update=filled)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_quantized(name: str, quantization: Quantization) -> bool:
    """Whether a linear layer is quantised. Args: name: of the module; quantization: with all its keys."""
    return should_convert_module(name, quantization.llm_int8_skip_modules)
