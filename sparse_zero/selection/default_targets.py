"""The targets of a recipe that names none: the value and output projections of each attention block.

These are SpaRTA's targets (arXiv 2502.15975). A fused projection of queries, keys and values counts as the value
projection. Of a composite model, e.g. a language model with a vision tower, they are those of the language model.
"""

import logging
from collections.abc import Iterable, Iterator

from torch import nn

from sparse_zero.selection.parts import Parts, outermost_of
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

SHOWN = 5
"""The most names in a warning."""


def default_targets(model: nn.Module, linear: Iterable[str]) -> set[str] | None:
    """The names of the value and output projections; of each attention block both or none.

    Of a composite model, those of its language model. One without a language model, e.g. CLIP, gives those of all its
    parts. One warning tells what was taken and what was left, or that nothing is known.

    Args:
        model: any module. Its `config`, if it has one, tells the family and the parts.
        linear: the names of its linear layers, but not that of its head.

    Returns: names of linear layers; None if no attention block is found.
    """
    linear, parts = list(linear), Parts(model)
    text = parts.text_models()
    is_composite = bool(text) and parts.has_towers(linear)
    if is_composite and parts.has_language_model:
        found = _projections(parts, [name for name in linear if parts.is_text[name]], in_self_attn=False)
        if found and (left := parts.beside_text(linear)):
            _warn_of_left(f"of the language model{_names([name for name in text if name])}", left)
        if found:
            return found
    found = _projections(parts, linear, in_self_attn=_has_llamas_names(linear))
    taken = outermost_of(parts.own_configs(), found)
    if not found:
        logger.warning(
            "sparse.targets: the value and output projections of %s are not known; all linear layers are used as "
            "targets",
            parts.family("") or type(model).__name__,
        )
    elif left := [name for name in _parts_with_attention(parts, linear) if name not in taken]:
        _warn_of_left("in self_attn modules", left)
    elif is_composite and len(taken) > 1:
        logger.warning(
            "sparse.targets: %s has no language model: the targets are the value and output projections of all its "
            "parts,%s; to train only some, list modules in sparse.targets, e.g. '%s.*'",
            type(model).__name__,
            _names(taken),
            taken[0],
        )
    return found or None


def _warn_of_left(taken: str, left: list[str]) -> None:
    logger.warning(
        "sparse.targets: the targets are the value and output projections %s;%s %s frozen: to train others, list "
        "modules in sparse.targets, e.g. '%s.*'",
        taken,
        _names(left),
        "stays" if len(left) == 1 else "stay",
        left[0],
    )


def _names(names: list[str]) -> str:
    """The end of a sentence's part: " a, b and c"."""
    if len(names) > SHOWN:
        return f" {', '.join(names[:SHOWN])} and {len(names) - SHOWN} more"
    first = f" {', '.join(names[:-1])} and" if len(names) > 1 else ""
    return first + "".join(f" {name}" for name in names[-1:])


def _parts_with_attention(parts: Parts, linear: list[str]) -> list[str]:
    return outermost_of(parts.own_configs(), (name for block in _attention_blocks(set(linear)) for name in block))


def _has_llamas_names(linear: list[str]) -> bool:
    return all(any(matches(name, [pattern]) for name in linear) for pattern in LLAMA)


def _projections(parts: Parts, linear: list[str], in_self_attn: bool) -> set[str]:
    """The value and output projections among some linear layers.

    Args:
        parts: tells the families.
        linear: their names.
        in_self_attn: whether to leave out blocks without Llama's names. The targets of models that have these names
            have always been those in `self_attn` alone.
    """
    blocks = list(_attention_blocks(set(linear)))
    if in_self_attn:
        blocks = [block for block in blocks if any(matches(name, LLAMA) for name in block)]
    found: set[str] = set()
    for family in {parts.family(name) for name in linear}:
        names = {name for name in linear if parts.family(name) == family}
        patterns = VALUE_AND_OUTPUT.get(family or "", [])
        known = {name for name in names if matches(name, patterns)}
        found |= known or {name for block in blocks for name in block} & names
    return found


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
