"""The kinds of quantised weights that can be trained. Imports no torch."""

from typing import Literal, get_args

Kind = Literal["nf4", "fp4", "int8", "int8_weight_only"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WHAT_WORKS = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"

NOT_PARTITIONED = (
    "ZeRO stage 3 cannot partition torchao's weights: use stage 2, or load the model in int8 of bitsandbytes"
)


def package_of(kind: str) -> str:
    """The package that a kind is of. Args: kind: one of `KINDS`, or `QuantizedLayer.kind`."""
    return "torchao" if kind.startswith("int8_weight_only") else "bitsandbytes"
