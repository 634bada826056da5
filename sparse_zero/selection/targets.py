"""Finds the target parameters of a model, and the modules that are trained in full, by name patterns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from sparse_zero.errors import UserError
from sparse_zero.quantized.formats import quantized_layer, weight_shape
from sparse_zero.quantized.layer import QuantizedLayer
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.default_targets import default_targets
from sparse_zero.selection.patterns import matches, similar, within
from sparse_zero.zero.parameters import full_shape


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter in which scalars can be selected, with all modules that own it (several if it is tied)."""

    name: str
    """Its name in `model.named_parameters()`: the first name of a tied parameter."""
    owners: tuple[tuple[nn.Module, str], ...]
    """(module, the parameter's name in this module)"""

    @property
    def parameter(self) -> nn.Parameter:
        module, name = self.owners[0]
        return module._parameters[name]

    @property
    def shape(self) -> torch.Size:
        return weight_shape(*self.owners[0])

    @property
    def quantized(self) -> QuantizedLayer | None:
        """The layer whose packed weight the parameter is; None for any other parameter."""
        module, name = self.owners[0]
        return quantized_layer(module) if name == QuantizedLayer.name else None

    @property
    def matrices(self) -> tuple[int, int, int] | None:
        """(number of matrices, rows, columns); None for a vector.

        An expert weight consists of several matrices. A convolution kernel counts as one. For each matrix, LoRA trains
        rank * (rows + columns) scalars.
        """
        if len(self.shape) < 2:
            return None
        if len(self.shape) == 2 or isinstance(self.owners[0][0], nn.modules.conv._ConvNd):
            return 1, self.shape[0], self.shape[1:].numel()
        return self.shape[:-2].numel(), self.shape[-2], self.shape[-1]


def find_targets(model: nn.Module, config: SparseConfig, whole: Iterable[str]) -> dict[str, Target]:
    """Find the configured targets.

    Args:
        model: the base model.
        config: `targets` and `exclude_modules` are used.
        whole: names of the modules that are trained in full. Their parameters are never targets.

    Returns:
        The targets by parameter name, in the order of the model; a tied parameter occurs once.

    Raises:
        UserError: a pattern matches nothing (the message lists similar names), or an embedding with max_norm.
    """
    parameters = all_targets(model)
    whole = tuple(whole)
    inside = set(parameter_names(model, whole))
    candidates = {name: target for name, target in parameters.items() if name not in inside}
    found = _configured(model, config, candidates, whole)
    for pattern in config.exclude_modules or []:
        frozen = {name for name in parameters if within(name, pattern)}
        names = [name for name, _ in model.named_modules() if name]
        if not frozen and not any(within(name, pattern) for name in names):
            raise UserError(f"sparse.exclude_modules: no module matches '{pattern}'{similar(pattern, names)}")
        found -= frozen
    if not found:
        raise UserError("sparse.exclude_modules: every target is excluded: nothing is left to train")
    for name in sorted(found):
        for module, _ in candidates[name].owners:
            if getattr(module, "max_norm", None) is not None:
                raise UserError(
                    f"sparse.targets: {name}: an embedding with max_norm changes its weight in every forward and "
                    "cannot be trained; remove it from the targets (exclude_modules)"
                )
    return {name: target for name, target in candidates.items() if name in found}


def all_targets(model: nn.Module) -> dict[str, Target]:
    """Every parameter of a model as a Target, by name."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    return {name: Target(name, tuple(owners[id(parameter)])) for name, parameter in model.named_parameters()}


def parameter_names(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """The names of all parameters in the given modules.

    Parameters are compared by identity. A tied parameter has only one name, which may be that in another module.
    """
    inside = {id(parameter) for name in modules for parameter in model.get_submodule(name).parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


def untargeted(targets: Iterable[str], parameters: dict[str, Target], whole: Iterable[str]) -> list[str]:
    """Name endings of matrices that are not targets, the largest first, which error messages suggest as targets."""
    chosen = {*targets, *whole}
    sizes: dict[str, int] = {}
    for name, target in parameters.items():
        if name not in chosen and target.matrices:
            ending = name.removesuffix(".weight").rpartition(".")[2]
            sizes[ending] = sizes.get(ending, 0) + target.shape.numel()
    return sorted(sizes, key=lambda ending: -sizes[ending])[:4]


def _configured(
    model: nn.Module, config: SparseConfig, candidates: dict[str, Target], whole: tuple[str, ...]
) -> set[str]:
    """The names of the parameters that `config.targets` matches."""
    # By identity, so that a tied parameter is found in each of its modules.
    names = {id(target.parameter): name for name, target in candidates.items()}
    modules = {n: m for n, m in model.named_modules() if not any(n == w or n.startswith(w + ".") for w in whole)}
    own = {n: [names[id(p)] for p in _main_parameters(m) if id(p) in names] for n, m in modules.items()}
    linear = {n: own[n] for n, m in modules.items() if n and is_linear(m) and own[n]}
    if config.targets == "all":
        return set(candidates)
    if config.targets == "all-linear" or config.targets is None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        chosen = [name for name in linear if modules[name] is not head]
        known = None if config.targets else default_targets(model, chosen)
        found = [parameter for name in chosen if known is None or name in known for parameter in linear[name]]
        if not found:
            raise UserError(f"sparse.targets: {type(model).__name__} has no linear layer to select from")
        return set(found)
    found = []
    for pattern in config.targets:
        matched = [name for name in modules if name and matches(name, [pattern])]
        # Only linear layers if there are any, so that "layers.0.mlp.*" does not include a norm.
        chosen = [name for name in matched if name in linear] or matched
        parameters = [parameter for name in chosen for parameter in own[name]]
        parameters = parameters or [
            names[id(parameter)]
            for module_name, module in modules.items()
            for name, parameter in module._parameters.items()
            if id(parameter) in names and matches(f"{module_name}.{name}".lstrip("."), [pattern])
        ]
        if not parameters:
            raise UserError(_no_match(pattern, matched, modules, linear, whole))
        found += parameters
    return set(found)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or contains the expert weights of a mixture of experts in 3-D tensors."""
    return isinstance(module, nn.Linear | Conv1D) or is_experts(module)


def is_experts(module: nn.Module) -> bool:
    """Whether a module contains the weights of experts in 3-D tensors."""
    return "Experts" in type(module).__name__ and any(len(full_shape(p)) == 3 for p in _own_parameters(module))


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for _, parameter in module._parameters.items() if parameter is not None]


def _main_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module's name refers to: its weight, the matrices of its experts, what a
    parametrization (torch.nn.utils.parametrize) computes its weight from, or else all its own."""
    if is_experts(module):
        return [p for p in _own_parameters(module) if len(full_shape(p)) == 3]
    weight = dict(module._parameters.items()).get("weight")  # a torch.jit script's have no `get`
    if weight is None and is_parametrized(module, "weight"):
        return list(module.parametrizations["weight"].parameters())
    return _own_parameters(module) if weight is None else [weight]


def find_modules_to_save(model: nn.Module, config: SparseConfig) -> list[str]:
    """The names of the modules that are trained in full: `modules_to_save`, or the head of a sequence classifier.

    Raises:
        UserError: a configured pattern matches no module, or only modules without parameters.
    """
    names = [name for name, _ in model.named_modules() if name]
    if config.modules_to_save is not None:
        found = []
        for pattern in config.modules_to_save:
            matched = [name for name in names if matches(name, [pattern])]
            if not matched:
                raise UserError(f"sparse.modules_to_save: no module matches '{pattern}'{similar(pattern, names)}")
            if not any(True for name in matched for _ in model.get_submodule(name).parameters()):
                raise UserError(f"sparse.modules_to_save: '{pattern}' has no parameters to train")
            found += matched
        return [n for n in found if not any(n != w and n.startswith(w + ".") for w in found)]
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def _no_match(
    pattern: str,
    matched: Sequence[str],
    modules: dict[str, nn.Module],
    linear: Iterable[str],
    whole: tuple[str, ...],
) -> str:
    if any(within(name, pattern) for name in whole):
        return f"sparse.targets: '{pattern}' is already trained in full (sparse.modules_to_save, or the default head)"
    if not matched:
        return f"sparse.targets: '{pattern}' matches no module or parameter{similar(pattern, linear)}"
    name = matched[0]
    kind = type(modules[name]).__name__
    if any(True for _ in modules[name].parameters()):
        return f"sparse.targets: '{pattern}' matches {name}, a {kind}; use '{pattern}.*' for the layers in it"
    return f"sparse.targets: '{pattern}' matches {name}, a {kind}, which has no parameters{similar(pattern, linear)}"
