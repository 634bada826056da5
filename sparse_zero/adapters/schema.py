"""What adapter_config.json may contain. Every field has a type and a range; whatever else a file has is refused."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from typing_extensions import TypedDict

from sparse_zero.errors import UserError
from sparse_zero.recipe.quantization import Quantization
from sparse_zero.selection import checks
from sparse_zero.selection.columns import Columns
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.draws import BERNOULLI, STRATIFIED
from sparse_zero.selection.rules import Selection

FORMAT_VERSION = 1
ROWS_SUFFIX = ".rows"
"""The end of the name of the rows trained in full."""

PEFT_TYPE = "SPARSE_ZERO"
PeftTask = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
PEFT_TASKS: dict[str | None, PeftTask] = {"sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
"""PEFT's names of our tasks."""

Count = Annotated[int, Field(ge=0, lt=2**62)]
Hash64 = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Scalar = str | bool | int | Annotated[float, Field(allow_inf_nan=True)] | None
DtypeName = Literal["float32", "float16", "bfloat16", "float64"]


def _label_index(key: Any) -> Any:
    """JSON only has strings as keys."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and str(int(key)) == key else key


class ModelSettings(TypedDict, total=False):
    """The entries that a task sets in the base model's config, and that a merged model needs. Nothing else of a file
    reaches the config: others would choose what code runs."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id2label: dict[Annotated[int, BeforeValidator(_label_index), Field(ge=0, lt=2**31)], str]
    label2id: dict[str, Annotated[int, Field(ge=0, lt=2**31)]]
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"]
    pad_token_id: Annotated[int, Field(ge=-1, lt=2**31)]


MODEL_SETTINGS = tuple(ModelSettings.__annotations__)


class DrawnColumns(BaseModel):
    """`selection.columns.Columns` as a file has it."""

    model_config = ConfigDict(extra="forbid")

    group: str
    count: int = Field(ge=1, lt=2**62)
    axis: Literal[-1, -2] = -1


class SelectedTensor(BaseModel):
    """The selection of one weight."""

    model_config = ConfigDict(extra="forbid")

    shape: list[Annotated[int, Field(ge=1, lt=2**62)]] = Field(max_length=8)
    count: int = Field(gt=0, lt=2**62)
    rule: Literal["stratified-v1", "bernoulli-v1", "columns-v1", "stored"] = STRATIFIED
    seed: int = Field(0, ge=0, lt=2**63)
    probability: float | None = Field(None, gt=0, le=1)
    granularity: int = Field(1, ge=1)
    whole_rows: list[Count] = []
    columns: DrawnColumns | None = None
    """columns-v1: the columns that the scalars are drawn from."""
    positions: Hash64
    """Checksum of the positions. It detects a change of the rule, which would misplace the deltas."""

    @model_validator(mode="after")
    def _is_possible(self) -> "SelectedTensor":
        if (self.rule == BERNOULLI) != (self.probability is not None):
            raise ValueError(f"the rule {self.rule} with the probability {self.probability}")
        try:
            self.selection("")
        except UserError as error:
            raise ValueError(str(error).removeprefix(": ")) from None
        return self

    @classmethod
    def from_selection(cls, selection: Selection, positions: torch.Tensor) -> "SelectedTensor":
        """Describe a selection whose positions are `positions`, int64 (count,)."""
        fields = dataclasses.asdict(selection)
        del fields["name"]
        fields |= {"shape": list(selection.shape), "whole_rows": list(selection.whole_rows)}
        return cls(**fields, positions=checks.checksum(positions))

    def selection(self, name: str) -> Selection:
        """The selection for the parameter `name`."""
        fields = self.model_dump(exclude={"positions"})
        fields |= {"shape": tuple(self.shape), "whole_rows": tuple(self.whole_rows)}
        fields["columns"] = None if self.columns is None else Columns(**self.columns.model_dump())
        return Selection(name=name, **fields)


class AdapterConfig(BaseModel):
    """The contents of adapter_config.json."""

    model_config = ConfigDict(extra="forbid")

    adapter_type: Literal["sparse-zero"] = "sparse-zero"
    peft_type: Literal["SPARSE_ZERO"] = PEFT_TYPE
    """PEFT finds the method by it, after `import sparse_zero.peft`."""
    task_type: PeftTask | None = None
    """PEFT's name of the task, by which it chooses the class of its model."""
    format_version: int = Field(FORMAT_VERSION, ge=1, le=FORMAT_VERSION)
    base_model_name_or_path: str | None
    revision: str | None
    base_fingerprint: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{8}$")]] = {}
    """A hash of each parameter of the base model, by name. See `model.fingerprint`."""
    quantized: dict[Annotated[str, Field(pattern="^[a-z0-9_-]+$")], list[str]] = {}
    """The names of the base model's weights that were quantised in training, by what they were quantised to (`nf4`,
    `int8`). The hash of such a weight is that of its packed bytes."""
    tokenizer: str | None = None
    """The source of the tokenizer if it is not the base model."""
    new_tokens: list[Annotated[str, Field(min_length=1)]] = []
    """Tokens that were added to the tokenizer."""
    task: Literal["sequence-classification", "causal-lm"] | None
    dtype: DtypeName
    """The dtype of the base model in training. If only that or the dtype before `sparsify` is float16: the latter."""
    quantization: Quantization | None = None
    """How the base model was quantised in training, with all keys; None: it was not, or in another way
    than `model.quantization` has."""
    model_settings: ModelSettings = {}
    """Entries of the model's config that the task sets (id2label, pad_token_id)."""
    sparse: SparseConfig
    total_parameters: int = Field(ge=1, lt=2**62)
    """Number of scalars of the base model."""
    trainable_parameters: Count
    """Number of trained scalars."""
    tensors: dict[str, SelectedTensor]
    """The selection of each weight, by parameter name."""
    modules_to_save: list[str]
    """Names of the fully trained parameters."""
    results: dict[str, Scalar] = {}
    """Metrics of the run, for the model card."""
    files: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{32}$")]] = {}
    """Checksum (xxh3, 128 bits) of each safetensors file."""
    library_versions: dict[str, str] = {}

    @property
    def kinds(self) -> dict[str, str]:
        """What each quantised weight was quantised to, by its name."""
        return {name: kind for kind, names in self.quantized.items() for name in names}

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "AdapterConfig":
        names = [*self.tensors, *(f"{name}{ROWS_SUFFIX}" for name, entry in self.tensors.items() if entry.whole_rows)]
        if len({*names, *self.modules_to_save}) < len(names) + len(self.modules_to_save):
            raise ValueError("a parameter has two entries in tensors and modules_to_save")
        if len(self.kinds) < sum(map(len, self.quantized.values())):
            raise ValueError("a parameter has two entries in quantized")
        if self.trainable_parameters > self.total_parameters:
            raise ValueError(f"{self.trainable_parameters:,} of {self.total_parameters:,} scalars were trained")
        return self


def names_by_kind(kinds: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of quantised weights by kind, from the kinds by name."""
    return {kind: [name for name in kinds if kinds[name] == kind] for kind in sorted({*kinds.values()})}


def checked_config(content: Mapping[str, Any], origin: str | Path) -> AdapterConfig:
    """Check the content of an adapter_config.json, as read from JSON: no value is converted to another type.

    Args:
        content: the JSON object.
        origin: the file, for errors.

    Raises:
        UserError: a key or value is not what `AdapterConfig` allows, or was written by a newer version.
    """
    newer = content.get("format_version")
    if type(newer) is int and newer > FORMAT_VERSION:
        raise UserError(
            f"{origin}: format {newer} is newer than {FORMAT_VERSION}, which this version supports; update sparse-zero"
        )
    try:
        return AdapterConfig.model_validate(content, strict=True)
    except ValidationError as error:
        raise UserError(f"{origin}: {reason_of(error)}") from None


def checked_settings(settings: Mapping[str, Any], origin: str | Path) -> ModelSettings:
    """Those of a config's entries that are `ModelSettings`. Raises UserError if one has another type."""
    known = {key: settings[key] for key in MODEL_SETTINGS if settings.get(key) is not None}
    try:
        return TypeAdapter(ModelSettings).validate_python(known)
    except ValidationError as error:
        raise UserError(f"{origin}: {reason_of(error)}") from None


def writable(settings: Mapping[str, Any]) -> tuple[ModelSettings, list[str]]:
    """Those of a model's settings that an adapter can have, and the names of those that have another type."""
    checker, fitting, odd = TypeAdapter(ModelSettings), {}, []
    for key in MODEL_SETTINGS:
        if settings.get(key) is None:
            continue
        try:
            fitting |= checker.validate_python({key: settings[key]})
        except ValidationError:
            odd.append(key)
    return fitting, odd


def reason_of(error: ValidationError) -> str:
    """The first error, as `sparse.density: Input should be a valid number`."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden" or first["loc"][-1:] == ("rule",):
        return f"{where}: {reason}; it is damaged, or was written by a newer version: then update sparse-zero"
    return f"{where}: {reason}"
