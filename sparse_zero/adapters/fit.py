"""Whether an adapter fits a model: checked before anything of the model is changed. All raise UserError."""

import logging
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from sparse_zero.adapters.files import Adapter
from sparse_zero.adapters.schema import AdapterConfig, SelectedTensor
from sparse_zero.errors import UserError
from sparse_zero.model.fingerprint import differing_parameters
from sparse_zero.model.sparsity import Sparsity
from sparse_zero.model.wrappers import tensors_by_name
from sparse_zero.quantized.formats import kinds, quantized_layers
from sparse_zero.zero.parameters import full_shape

logger = logging.getLogger(__name__)


def check_shapes(model: nn.Module, adapter: Adapter, origin: str | Path) -> None:
    """Compare names, shapes and kinds of numbers with the model's. Raises UserError."""
    config, parameters = adapter.config, tensors_by_name(model)
    packed = {name: layer.shape for name, layer in quantized_layers(model)}
    where = f"{origin}: trained on {config.base_model_name_or_path}, does not fit {type(model).__name__}"
    shapes = {name: tensor.shape for name, tensor in config.tensors.items()}
    shapes |= {name: list(values.shape) for name, values in adapter.whole.items()}
    for name, saved in shapes.items():
        if name not in parameters:
            raise UserError(f"{where}: the model has no parameter '{name}'")
        shape, values = list(packed.get(name, full_shape(parameters[name]))), adapter.whole.get(name)
        dtypes = {parameters[name].dtype, parameters[name].dtype if values is None else values.dtype}
        # Values are rounded to the model's dtype; the integers of a buffer are not
        if len(dtypes) > 1 and not all(dtype.is_floating_point for dtype in dtypes):
            raise UserError(f"{where}: '{name}' is {parameters[name].dtype} there and {values.dtype} in the adapter")
        if shape != saved:
            grown = config.tensors[name].whole_rows if name in config.tensors else ()
            hint = f"; call model.resize_token_embeddings({saved[0]}) for its new tokens" if grown else ""
            raise UserError(f"{where}: '{name}' has shape {shape} in the model and {saved} in the adapter{hint}")


def check_base(model: nn.Module, adapter: Adapter, origin: str | Path, base: dict[str, str]) -> None:
    """Compare the base model's fingerprint `base` with that of the training. Raises UserError.

    Weights that were quantised in another way are not compared: there is one warning.
    """
    config, here, there = adapter.config, kinds(model), adapter.config.kinds
    half = {str(p.dtype) == "torch.float16" for name, p in _floating(model) if name not in here}
    if any(half) != (config.dtype == "float16"):
        logger.warning(
            "%s: not checked against the base model's weights, because only one of them is in float16, which changes "
            "the fingerprint",
            origin,
        )
        return
    if others := {name for name in here.keys() | there.keys() if here.get(name) != there.get(name)}:
        logger.warning(
            "%s: was trained on a base model %s, and is loaded on one %s: the values under the deltas differ by the "
            "rounding of the quantisation, and so do the results",
            origin,
            _described(there),
            _described(here),
        )
    compared = {name: value for name, value in base.items() if name not in others}
    if odd := differing_parameters(compared, config.base_fingerprint):
        at = f" at revision {config.revision}" if config.revision else ""
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise UserError(
            f"{origin}: trained on {config.base_model_name_or_path}{at}, but this model has different weights: "
            f"'{odd[0]}'{more}; load the base model and revision that the adapter was trained on"
        )


def _floating(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.is_floating_point())


def _described(quantized: dict[str, str]) -> str:
    return f"in {' and '.join(sorted({*quantized.values()}))}" if quantized else "that is not quantised"


def check_sparsified_alike(sparsity: Sparsity, adapter: Adapter, origin: str | Path) -> None:
    """Raise UserError if a sparse model has another selection than an adapter."""
    config = adapter.config
    same = sparsity.weights.keys() == config.tensors.keys() and _are_trained(sparsity, config)
    for name, weight in sparsity.weights.items() if same else ():
        here = SelectedTensor.from_selection(weight.selection, weight.flat_positions())
        there = config.tensors[name]
        same = same and (here.positions, here.whole_rows) == (there.positions, there.whole_rows)
    if not same:
        raise UserError(
            f"{origin}: the model has a different selection (seed, density, targets or modules_to_save); pass an "
            "adapter_name to load the adapter in addition to the active one"
        )


def _are_trained(sparsity: Sparsity, config: AdapterConfig) -> bool:
    """Whether the same parameters are fully trained. Adapters of version 0.1 have no buffers."""
    return {*sparsity.whole} <= {*config.modules_to_save} <= {*sparsity.trained_names}
