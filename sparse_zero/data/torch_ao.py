"""Base models that torchao quantises: between `Quantization` and transformers' TorchAoConfig."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from sparse_zero.errors import UserError
from sparse_zero.quantized.methods import torchao_settings
from sparse_zero.quantized.names import NOT_PARTITIONED
from sparse_zero.recipe.quantization import Quantization

_ENDING = ".weight"


def transformers_config(quantization: Quantization) -> TorchAoConfig:
    """What from_pretrained takes. It compares endings with the names of parameters, and not with those of modules."""
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow

    granularity = PerRow() if quantization.group_size is None else PerGroup(quantization.group_size)
    skipped = quantization.llm_int8_skip_modules
    if skipped is not None:
        skipped = [*skipped, *(name + _ENDING for name in skipped)]
    # Without settings for torch.compile of the whole process
    settings = Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    return TorchAoConfig(settings, modules_to_not_convert=skipped)


def from_transformers(given: Any) -> Quantization | None:
    """A `quantization_config` of torchao; None if it is not Int8WeightOnlyConfig with a scale for each row or group.

    Args: given: a mapping, which needs no torchao, or an object of transformers.
    """
    settings = given if isinstance(given, Mapping) else given.to_dict()
    kind, fields = torchao_settings(settings)
    granularity = fields.get("granularity") or {}
    how = granularity.get("_type", "PerRow")
    if kind != "Int8WeightOnlyConfig" or how not in ("PerRow", "PerGroup"):
        return None
    if settings.get("include_input_output_embeddings"):
        return None
    skipped = settings.get("modules_to_not_convert")
    if skipped is not None:
        skipped = [name for name in skipped if name.removesuffix(_ENDING) not in {*skipped} - {name}]
    group = granularity["_data"]["group_size"] if how == "PerGroup" else None
    return Quantization(kind="int8_weight_only", group_size=group, llm_int8_skip_modules=skipped)


def check(quantization: Quantization, model: PreTrainedModel, partitioned: bool) -> None:
    """Raise UserError if the linear layers of a model cannot be quantised. Args: see `quantization.completed`."""
    where = f"model.quantization: {quantization.kind}"
    if partitioned:
        raise UserError(f"{where}: {NOT_PARTITIONED}")
    widths = {
        module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and should_convert_module(name, quantization.llm_int8_skip_modules)
    }
    if not widths:
        raise UserError(f"{where}: {type(model).__name__} has no nn.Linear that torchao could quantise; set int8")
    group = quantization.group_size
    if group is not None and (odd := sorted(width for width in widths if width % group)):
        raise UserError(f"model.quantization.group_size: {group} does not divide {odd[0]}, the width of a layer")
