"""The targets of a recipe that names none: the value and output projections of each attention block.

These are SpaRTA's targets (arXiv 2502.15975). A fused projection of queries, keys and values counts as the value
projection. Of a composite model, e.g. a language model with a vision tower, they are those of the language model.
"""

import logging
from collections.abc import Iterable, Iterator

from torch import nn

from sparse_zero.selection.parts import LANGUAGE, Parts
from sparse_zero.selection.patterns import matches

logger = logging.getLogger(__name__)

VALUE_AND_OUTPUT: dict[str, list[str]] = {
    "bert": ["attention.self.value", "attention.output.dense"],
    "roberta": ["attention.self.value", "attention.output.dense"],
    "xlm-roberta": ["attention.self.value", "attention.output.dense"],
    "electra": ["attention.self.value", "attention.output.dense"],
    "distilbert": ["attention.v_lin", "attention.out_lin"],
    "deberta": ["attention.self.in_proj", "attention.output.dense"],
    "deberta-v2": ["attention.self.value_proj", "attention.output.dense"],
    "gpt2": ["attn.c_attn", "attn.c_proj"],
    "gpt_neox": ["attention.query_key_value", "attention.dense"],
    "falcon": ["self_attention.query_key_value", "self_attention.dense"],
    "bloom": ["self_attention.query_key_value", "self_attention.dense"],
    "phi": ["self_attn.v_proj", "self_attn.dense"],
    "phi3": ["self_attn.qkv_proj", "self_attn.o_proj"],
    "funnel": ["attention.v_head", "attention.post_proj"],
    "opt": ["self_attn.v_proj", "self_attn.out_proj"],
    "t5": ["SelfAttention.v", "SelfAttention.o", "EncDecAttention.v", "EncDecAttention.o"],
    "mt5": ["SelfAttention.v", "SelfAttention.o", "EncDecAttention.v", "EncDecAttention.o"],
}
"""Patterns by `config.model_type`, of families whose names do not tell, and of those whose targets must never change:
the positions of older runs depend on them."""

LLAMA = ["self_attn.v_proj", "self_attn.o_proj"]
"""Llama's names, also used by Mistral, Mixtral, Qwen, Gemma, OLMo, Granite, SmolLM and many other families."""

VALUES = (
    *("v_proj", "value", "value_proj", "v", "v_lin", "linear_v", "project_v", "projection_value", "to_v", "Wv"),
    *("value_global", "kv_b_proj", "kv_proj", "keys_values", "to_kv"),
    *("qkv", "qkv_proj", "query_key_value", "queries_keys_values", "Wqkv", "c_attn", "att_proj", "to_qkv"),
)
"""What value projections are called: alone, with the keys, and with keys and queries."""

OUTPUTS = (
    *("o_proj", "out_proj", "o_b_proj", "o", "out_lin", "linear_out", "linear_o", "Wo", "to_out", "attention_out"),
    *("dense", "c_proj", "proj", "projection", "projection_layer", "output_proj", "output", "post"),
)
"""What output projections are called. `output` is often a module with a linear layer `dense`."""

INNER = ("", ".dense", ".0", ".linear")
"""Where the linear layer is in the module of a projection: itself, as in BERT, in a Sequential, or wrapped."""


def default_targets(model: nn.Module, linear: Iterable[str]) -> set[str] | None:
    """The names of the value and output projections; of each attention block both or none.

    A composite model and a model in which nothing is known are told of in one warning.

    Args:
        model: any module. Its `config`, if it has one, tells the family and the parts.
        linear: the names of its linear layers, but not that of its head.

    Returns: names of linear layers; None if no attention block is found.
    """
    linear, parts = list(linear), Parts(model)
    beside = parts.beside_language(linear)
    is_composite = bool(beside) and len(set(parts.families.values())) > 1
    if is_composite and parts.has_language_model:
        found = _in_parts(parts, [name for name in linear if parts.kinds[name] == LANGUAGE], is_composite)
        if found:
            logger.warning(
                "sparse.targets: the targets are the value and output projections of the language model%s; %s %s "
                "frozen: to train others, list modules in sparse.targets, e.g. '%s.*'",
                "".join(f" {name}" for name in parts.language_modules() if name),
                " and ".join(beside),
                "stays" if len(beside) == 1 else "stay",
                beside[0],
            )
            return found
    found = _in_parts(parts, linear, is_composite)
    if not found:
        logger.warning(
            "sparse.targets: the value and output projections of %s are not known; all linear layers are used as "
            "targets",
            parts.families[""] or type(model).__name__,
        )
        return None
    if is_composite and (text := parts.language_modules()):
        logger.warning(
            "sparse.targets: %s has no language model: the targets are the value and output projections of all its "
            "parts, %s: to train only some, list modules in sparse.targets, e.g. '%s.*'",
            type(model).__name__,
            " and ".join([*text, *beside]),
            text[0],
        )
    return found


def _in_parts(parts: Parts, linear: list[str], is_composite: bool) -> set[str]:
    """The value and output projections among some linear layers."""
    found: set[str] = set()
    for family in {parts.families[name] for name in linear}:
        names = [name for name in linear if parts.families[name] == family]
        patterns = VALUE_AND_OUTPUT.get(family or "", [])
        known = {name for name in names if matches(name, patterns)}
        found |= known or _by_structure(names, is_composite)
    return found


def _by_structure(linear: list[str], is_composite: bool) -> set[str]:
    blocks = [set(block) for block in _attention_blocks(set(linear))]
    if not is_composite and all(any(matches(name, [pattern]) for name in linear) for pattern in LLAMA):
        # The targets of these models have always been those in `self_attn` alone
        blocks = [block for block in blocks if any(matches(name, LLAMA) for name in block)]
    return {name for block in blocks for name in block}


def _attention_blocks(linear: set[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a value projection and its output projection."""
    for name in linear:
        if not (projection := _value_projection(name)):
            continue
        module, _, _ = projection.rpartition(".")
        above, _, last = module.rpartition(".")
        places = [module]
        # BERT's layers have attention.self.value and attention.output.dense
        if (last == "self" or "att" in above.rpartition(".")[2]) and not any(
            f"{above}.{value}{inner}" in linear for value in VALUES for inner in INNER
        ):
            places.append(above)
        found = (f"{place}.{output}{inner}".lstrip(".") for place in places for output in OUTPUTS for inner in INNER)
        if output := next((output for output in found if output in linear), None):
            yield name, output


def _value_projection(linear: str) -> str | None:
    """The name of the value projection that a linear layer is, or is the inner layer of."""
    for inner in INNER:
        if linear.endswith(inner) and linear.removesuffix(inner).rpartition(".")[2] in VALUES:
            return linear.removesuffix(inner)
    return None
