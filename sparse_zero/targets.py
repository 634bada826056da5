"""Which modules of a model are targets, and which are trained whole: names and patterns, no tensors."""

import fnmatch
import logging
from collections.abc import Iterable

from torch import nn

from sparse_zero.config import SparseConfig
from sparse_zero.errors import UserError, nearest
from sparse_zero.layers import is_supported

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


def find_targets(model: nn.Module, config: SparseConfig, whole: Iterable[str]) -> dict[str, nn.Module]:
    """The target modules by name, in the model's order, each weight once.

    Args: whole: modules trained whole; they and what they contain are never targets.
    Raises UserError: a pattern matches nothing (with the near misses), or something that cannot be a target.
    """
    whole = tuple(whole)
    modules = {n: m for n, m in model.named_modules() if n and not any(n == w or n.startswith(w + ".") for w in whole)}
    linear = {n: m for n, m in modules.items() if is_supported(m)}
    if config.targets == "all-linear" or config.targets is None:
        patterns = None if config.targets else _family_patterns(model, linear)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = {n: m for n, m in linear.items() if m is not head and (patterns is None or _matches(n, patterns))}
        if not found:
            raise UserError(f"sparse.targets: {type(model).__name__} has no linear layer to select from")
    else:
        found = {}
        for pattern in config.targets:
            matched = {n: m for n, m in modules.items() if _matches(n, [pattern])}
            if not matched:
                raise UserError(_nothing_matches(pattern, linear, whole))
            found |= {n: m for n, m in matched.items() if n in linear}
            if not any(n in linear for n in matched):
                name, module = next(iter(matched.items()))
                raise UserError(
                    f"sparse.targets: '{pattern}' matches {name}, a {type(module).__name__}; targets are linear "
                    f"layers, nn.Linear or Conv1D{_near(pattern, linear)}"
                )
    return _without_tied(model, {n: m for n, m in linear.items() if n in found})


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


def _family_patterns(model: nn.Module, linear: dict[str, nn.Module]) -> list[str] | None:
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


def _nothing_matches(pattern: str, linear: dict[str, nn.Module], whole: tuple[str, ...]) -> str:
    if any(_matches(name, [pattern]) for name in whole):
        return f"sparse.targets: '{pattern}' is trained whole already (sparse.modules_to_save, or the default head)"
    return f"sparse.targets: '{pattern}' matches no module{_near(pattern, linear)}"


def _near(pattern: str, names: Iterable[str]) -> str:
    endings = dict.fromkeys(".".join(name.split(".")[-k:]) for k in (pattern.count(".") + 1, 1, 2) for name in names)
    found = nearest(pattern, endings) or [e for e in endings if "." not in e and not e.isdigit()][:6]
    return f"; near misses: {', '.join(found)}" if found else ""


def _without_tied(model: nn.Module, found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Each weight once. A weight that another kind of module also uses would get only a part of its gradient."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, module in found.items():
        others = [owner for owner in owners[id(module.weight)] if owner != name]
        if others:
            raise UserError(
                f"sparse.targets: {name}.weight is tied to {others[0]}, whose gradient would be missed; "
                f"leave '{name}' out of the targets"
            )
    return found
