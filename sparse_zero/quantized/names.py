"""The kinds of quantised weights that can be trained. Imports no torch."""

from typing import Literal, get_args

Kind = Literal["nf4", "fp4", "int8"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WHAT_WORKS = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
