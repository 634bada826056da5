"""Which parameters of a model are targets, and which modules are trained whole: names and patterns, no arithmetic."""

import fnmatch
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_zero.errors import UserError, nearest
from sparse_zero.selection.config import SparseConfig
from sparse_zero.zero.parameters import full_shape

logger = logging.getLogger(__name__)

VALUE_AND_OUTPUT: dict[str, list[str]] = {
    "bert": ["attention.self.value", "attention.output.dense"],
    "roberta": ["attention.self.value", "attention.output.dense"],
    "xlm-roberta": ["attention.self.value", "attention.output.dense"],
    "electra": ["attention.self.value", "attention.output.dense"],
    "distilbert": ["attention.v_lin", "attention.out_lin"],
    "deberta-v2": ["attention.self.value_proj", "attention.output.dense"],
    "gpt2": ["attn.c_attn", "attn.c_proj"],
    "gpt_neox": ["attention.query_key_value", "attention.dense"],
    "falcon": ["self_attention.query_key_value", "self_attention.dense"],
    "bloom": ["self_attention.query_key_value", "self_attention.dense"],
    "phi": ["self_attn.v_proj", "self_attn.dense"],
    "phi3": ["self_attn.qkv_proj", "self_attn.o_proj"],
    "opt": ["self_attn.v_proj", "self_attn.out_proj"],
    "t5": ["SelfAttention.v", "SelfAttention.o", "EncDecAttention.v", "EncDecAttention.o"],
    "mt5": ["SelfAttention.v", "SelfAttention.o", "EncDecAttention.v", "EncDecAttention.o"],
}
"""The paper's targets, by `config.model_type`. A fused projection is a target as a whole."""

COMMON_VALUE_AND_OUTPUT = ["self_attn.v_proj", "self_attn.o_proj"]
"""Llama's names, which most families share: Mistral, Mixtral, Qwen, Gemma, OLMo, Granite, SmolLM and others."""


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter to select scalars from, and every place where the model holds it (several where it is tied)."""

    name: str
    """As in `model.named_parameters()`: of a tied parameter, the first of its places."""
    owners: tuple[tuple[nn.Module, str], ...]
    """(module, name there)"""

    @property
    def parameter(self) -> nn.Parameter:
        module, name = self.owners[0]
        return module._parameters[name]

    @property
    def shape(self) -> torch.Size:
        return full_shape(self.parameter)

    @property
    def matrices(self) -> tuple[int, int, int] | None:
        """(matrices, rows, columns): an expert weight holds several, a convolution's kernel is one; None for a vector.

        rank * (rows + columns) of each is what LoRA trains there.
        """
        if len(self.shape) < 2:
            return None
        if len(self.shape) == 2 or isinstance(self.owners[0][0], nn.modules.conv._ConvNd):
            return 1, self.shape[0], self.shape[1:].numel()
        return self.shape[:-2].numel(), self.shape[-2], self.shape[-1]


def find_targets(model: nn.Module, config: SparseConfig, whole: Iterable[str]) -> dict[str, Target]:
    """The targets by parameter name, in the model's order, a tied parameter once.

    Args: whole: modules trained whole; what they contain is never a target.
    Raises UserError: a pattern matches nothing (with the near misses), or something that cannot be a target.
    """
    parameters = all_targets(model)
    whole = tuple(whole)
    inside = set(parameters_of(model, whole))
    free = {name: target for name, target in parameters.items() if name not in inside}
    found = _configured(model, config, free, whole)
    for pattern in config.exclude_modules or []:
        frozen = {name for name in parameters if _within(name, pattern)}
        if not frozen:
            names = [name for name, _ in model.named_modules() if name]
            raise UserError(f"sparse.exclude_modules: no module matches '{pattern}'{_near(pattern, names)}")
        found -= frozen
    if not found:
        raise UserError("sparse.exclude_modules: every target is excluded: nothing is left to train")
    for name in sorted(found):
        if not free[name].parameter.is_floating_point():
            dtype = str(free[name].parameter.dtype).removeprefix("torch.")
            raise UserError(f"sparse.targets: {name} is {dtype}, and quantized weights cannot be trained")
        for module, _ in free[name].owners:
            if getattr(module, "max_norm", None) is not None:
                raise UserError(
                    f"sparse.targets: {name}: an embedding with max_norm changes its weight in every forward"
                )
    return {name: target for name, target in free.items() if name in found}


def all_targets(model: nn.Module) -> dict[str, Target]:
    """Every parameter of a model that could be a target, by name."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    return {name: Target(name, tuple(owners[id(parameter)])) for name, parameter in model.named_parameters()}


def parameters_of(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """Names of the parameters in some modules. By identity: a tied one has one name, which may be another module's."""
    inside = {id(parameter) for name in modules for parameter in model.get_submodule(name).parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


def untargeted(targets: Iterable[str], parameters: dict[str, Target], whole: Iterable[str]) -> list[str]:
    """Endings of matrices that are no targets, the largest first: what an error may advise to add."""
    chosen = {*targets, *whole}
    sizes: dict[str, int] = {}
    for name, target in parameters.items():
        if name not in chosen and target.matrices:
            ending = name.removesuffix(".weight").rpartition(".")[2]
            sizes[ending] = sizes.get(ending, 0) + target.shape.numel()
    return sorted(sizes, key=lambda ending: -sizes[ending])[:4]


def _configured(model: nn.Module, config: SparseConfig, free: dict[str, Target], whole: tuple[str, ...]) -> set[str]:
    """Names of the parameters that `config.targets` asks for."""
    # By identity, so that any place of a tied parameter leads to its one name.
    names = {id(target.parameter): name for name, target in free.items()}
    modules = {n: m for n, m in model.named_modules() if not any(n == w or n.startswith(w + ".") for w in whole)}
    own = {n: [names[id(p)] for p in _stands_for(m) if id(p) in names] for n, m in modules.items()}
    linear = {n: own[n] for n, m in modules.items() if n and is_linear(m) and own[n]}
    if config.targets == "all":
        return set(free)
    if config.targets == "all-linear" or config.targets is None:
        patterns = None if config.targets else _family_patterns(model, linear)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = [
            parameter
            for name, parameters in linear.items()
            if modules[name] is not head and (patterns is None or _matches(name, patterns))
            for parameter in parameters
        ]
        if not found:
            raise UserError(f"sparse.targets: {type(model).__name__} has no linear layer to select from")
        return set(found)
    found = []
    for pattern in config.targets:
        matched = [name for name in modules if name and _matches(name, [pattern])]
        # Linear layers before all others, so that "layers.0.mlp.*" does not bring in a norm.
        chosen = [name for name in matched if name in linear] or matched
        parameters = [parameter for name in chosen for parameter in own[name]]
        parameters = parameters or [
            names[id(module._parameters[name])]
            for module_name, module in modules.items()
            for name in module._parameters
            if id(module._parameters[name]) in names and _matches(f"{module_name}.{name}".lstrip("."), [pattern])
        ]
        if not parameters:
            raise UserError(_nothing_matches(pattern, matched, modules, linear, whole))
        found += parameters
    return set(found)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or the expert weights of a mixture, which are many in one tensor."""
    return isinstance(module, nn.Linear | Conv1D) or _is_experts(module)


def _is_experts(module: nn.Module) -> bool:
    return "Experts" in type(module).__name__ and any(len(full_shape(p)) == 3 for p in _own_parameters(module))


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _stands_for(module: nn.Module) -> list[nn.Parameter]:
    """What the name of a module stands for: its weight; the matrices of experts; else all its own parameters."""
    if _is_experts(module):
        return [p for p in _own_parameters(module) if len(full_shape(p)) == 3]
    weight = module._parameters.get("weight")
    return _own_parameters(module) if weight is None else [weight]


def find_whole(model: nn.Module, config: SparseConfig) -> list[str]:
    """Names of the modules that are trained whole: those configured, or a sequence classifier's head.

    Raises UserError where a configured name matches no module, or none that has parameters.
    """
    names = [name for name, _ in model.named_modules() if name]
    if config.modules_to_save is not None:
        found = []
        for pattern in config.modules_to_save:
            matched = [name for name in names if _matches(name, [pattern])]
            if not matched:
                raise UserError(f"sparse.modules_to_save: no module matches '{pattern}'{_near(pattern, names)}")
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


def _family_patterns(model: nn.Module, linear: Iterable[str]) -> list[str] | None:
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in VALUE_AND_OUTPUT:
        return VALUE_AND_OUTPUT[family]
    # Each of them: BART has Llama's name for its value projection, but not for its output projection.
    if all(any(_matches(name, [pattern]) for name in linear) for pattern in COMMON_VALUE_AND_OUTPUT):
        return COMMON_VALUE_AND_OUTPUT
    logger.warning(
        "sparse.targets: no value and output projections are known for %s; all linear layers are targets",
        family or type(model).__name__,
    )
    return None


def _matches(name: str, patterns: list[str]) -> bool:
    """A pattern is a shell pattern over the whole name, or an ending of the name at a dot."""
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase("." + name, "*." + p) for p in patterns)


def _within(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter, or one of the modules that it is in."""
    parts = name.split(".")
    return any(_matches(".".join(parts[:k]), [pattern]) for k in range(1, len(parts) + 1))


def _nothing_matches(
    pattern: str,
    matched: Sequence[str],
    modules: dict[str, nn.Module],
    linear: Iterable[str],
    whole: tuple[str, ...],
) -> str:
    if any(_within(name, pattern) for name in whole):
        return f"sparse.targets: '{pattern}' is trained whole already (sparse.modules_to_save, or the default head)"
    if not matched:
        return f"sparse.targets: '{pattern}' matches no module or parameter{_near(pattern, linear)}"
    name = matched[0]
    kind = type(modules[name]).__name__
    if any(True for _ in modules[name].parameters()):
        return f"sparse.targets: '{pattern}' matches {name}, a {kind}; write '{pattern}.*' for the layers in it"
    return f"sparse.targets: '{pattern}' matches {name}, a {kind}, which has no parameters{_near(pattern, linear)}"


def _near(pattern: str, names: Iterable[str]) -> str:
    endings = dict.fromkeys(".".join(name.split(".")[-k:]) for k in (pattern.count(".") + 1, 1, 2) for name in names)
    found = nearest(pattern, endings) or [e for e in endings if "." not in e and not e.isdigit()][:6]
    return f"; near misses: {', '.join(found)}" if found else ""
