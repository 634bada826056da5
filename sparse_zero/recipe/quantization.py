"""How a base model is quantised: the key `model.quantization`, which adapters store too. Imports no torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sparse_zero.quantized.names import KINDS, WHAT_WORKS, Kind, package_of

OTHERS = {
    **dict.fromkeys(("4", "4bit", "4-bit", "int4", "bitsandbytes", "bitsandbytes_4bit", "qlora"), "nf4"),
    **dict.fromkeys(("8", "8bit", "8-bit", "bitsandbytes_8bit", "llm_int8"), "int8"),
    **dict.fromkeys(
        ("torchao", "torchao-int8", "int8-torchao", "int8wo", "int8-weight-only", "int8weightonlyconfig"),
        "int8_weight_only",
    ),
    **dict.fromkeys(("int4wo", "int4_weight_only", "int4-weight-only", "int4weightonlyconfig"), "nf4"),
}
"""What else a kind is called, and its name, or the name of what can be trained instead."""

FOUR_BITS = ("nf4", "fp4")

_KINDS_OF_KEYS = {"bnb": FOUR_BITS, "llm": ("int8",), "group": ("int8_weight_only",)}
"""The kinds that a key belongs to, by the beginning of its name."""


class Quantization(BaseModel):
    """The format in which a base model's linear layers are kept. A kind alone, as in `quantization: nf4`, is the
    section with that `kind`. The other keys are those of transformers' BitsAndBytesConfig and torchao's PerGroup."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Kind
    """nf4 and fp4: 4 bits with a scale for each 64 scalars; int8: 8 bits with a scale for each row (LLM.int8); all
    of bitsandbytes. int8_weight_only: 8 bits with a scale for each row, of torchao."""
    bnb_4bit_use_double_quant: bool = False
    """4 bits: quantise the scales too, which saves 0.37 bits of each scalar."""
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """4 bits: the dtype to which a weight is dequantised to compute with it. None: the dtype of the other weights."""
    bnb_4bit_quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] | None = None
    """4 bits: the dtype of the tensor that holds the packed bits. None: uint8; at ZeRO stage 3, which partitions
    floating-point tensors, the dtype of the other weights."""
    llm_int8_threshold: float | None = Field(None, ge=0)
    """int8: input columns with a value above it are computed without quantisation. None: 6, as in transformers; 0: no
    columns."""
    group_size: int | None = Field(None, gt=0)
    """int8_weight_only: scalars of a row that share a scale. None: the whole row."""
    llm_int8_skip_modules: list[str] | None = None
    """All kinds: modules that are not quantised. As in transformers, endings of their names, or regular expressions
    from the start of the name. The head and the modules that are trained in full are never quantised."""

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, given: Any) -> Any:
        if isinstance(given, str | int):
            return {"kind": str(given)}
        for key in ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"):
            if isinstance(given, dict) and key in given:
                raise ValueError(f"write `kind: {'int8' if key == 'load_in_8bit' else 'nf4'}` instead of `{key}`")
        return given

    @field_validator("kind", mode="before")
    @classmethod
    def _is_known(cls, kind: Any) -> Any:
        if isinstance(kind, str) and kind not in KINDS:
            meant = OTHERS.get(kind.lower())
            raise ValueError(f"must be {WHAT_WORKS}{f'; did you mean {meant}?' if meant else ''}")
        return kind

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> "Quantization":
        for key in self.model_fields_set - {"kind", "llm_int8_skip_modules"}:
            value = getattr(self, key)
            if value is not None and value is not False and self.kind not in _KINDS_OF_KEYS[key.partition("_")[0]]:
                raise ValueError(f"{key} is not a key of {self.kind}; leave it out")
        return self

    @property
    def bits(self) -> int:
        """Bits of a scalar, without the scales."""
        return 4 if self.kind in FOUR_BITS else 8

    @property
    def package(self) -> str:
        """The package that quantises."""
        return package_of(self.kind)
