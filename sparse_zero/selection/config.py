"""SparseConfig: the `sparse` section of a recipe and the argument of `sparsify`. Does not import torch."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

TokenIndex = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]

DEFAULT_DENSITY = 0.01


class SparseConfig(BaseModel):
    """Which scalars of a model are trained. Set at most one of density, sparsity and rank_equivalent; without any of
    them the density is 0.01. The method is SpaRTA (arXiv 2502.15975)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    density: float | None = Field(None, gt=0, le=1)
    """Trainable fraction of all scalars of the model, fully trained modules included."""

    sparsity: float | None = Field(None, ge=0, lt=1)
    """1 - density, as in the SpaRTA paper."""

    rank_equivalent: int | None = Field(None, ge=1)
    """Train as many scalars as a LoRA adapter of this rank: rank * (in + out) of each target matrix."""

    selection: Literal["stratified", "bernoulli", "magnitude", "magnitude-smallest", "gradient", "snip"] = "stratified"
    """How scalars are selected. stratified: exactly the number given by the budget, one at random from each of that
    many equal blocks of a weight. bernoulli: each scalar with the same probability, independently, so that the number
    varies (as in the SpaRTA paper). magnitude: the largest scalars of each pretrained weight (Super-Tuning,
    arXiv 2607.09287); magnitude-smallest: the smallest. gradient: those with the largest gradient, summed over
    `selection_examples` training examples; snip: those whose gradient times weight is (SNIP, arXiv 1810.02340).
    With these four, adapters store the positions."""

    selection_examples: int = Field(64, ge=1)
    """The number of training examples, drawn with `seed`, whose gradients select with selection: gradient or snip.
    Their gradients are dense, so this pass needs more memory than the training: see Choosing."""

    granularity: int = Field(1, ge=1)
    """Number of scalars that are selected together, as a strip: this many consecutive rows of one column. The columns
    are drawn independently for each block of rows. Requires selection: stratified, and must divide the number of rows
    of every target matrix."""

    columns: Share | Literal["whole"] = 1
    """The share of a weight's input columns that its scalars are drawn from: backward keeps that share of a layer's
    input only. 1: all columns, as in the SpaRTA paper. 0.1: a random tenth. whole: as few columns as the budget fills,
    each trained whole. Layers of one module that read inputs of the same width have the same columns. It applies to
    linear layers (Conv1D has its inputs in the rows) and to 3-D expert weights; the scalars of other parameters are
    drawn as with 1. Requires selection: stratified and granularity: 1."""

    targets: Literal["all-linear", "all"] | list[str] | None = None
    """The parameters in which scalars are selected. None: the value and output projections, of a composite model those
    of its language model. "all-linear": every linear layer except the head, expert weights included. "all": every
    parameter. A list: shell patterns or endings of module names ("v_proj", "*.layers.1?.mlp.*") or of parameter names
    ("*.bias", "experts.down_proj"). For a module, its weight is used. If a pattern matches linear layers and other
    modules, only the linear layers are used."""

    exclude_modules: list[str] | None = None
    """Modules that stay frozen even if `targets` matches them; patterns as in `targets`."""

    modules_to_save: list[str] | None = None
    """Modules that are trained and saved in full. None: the classification head of a
    sequence-classification model."""

    trainable_token_indices: list[TokenIndex] | None = None
    """Tokens whose embeddings are trained in full: rows of the input embedding and, if it is not tied to it, of the
    output embedding."""

    indices: Literal["stored", "regenerated"] = "stored"
    """Whether the positions are kept in memory. stored: yes, with 4 bytes for each selected scalar or strip.
    regenerated: no; they are drawn again for each gradient and each update of the weights. Positions that cannot be
    drawn again (magnitude, gradient, or given by the caller) are always stored."""

    transient_mib: int = Field(64, ge=1)
    """Limit for the temporary memory of a weight's gradient in MiB, in addition to its inputs, its result and the
    positions."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a delta is dropped in a training forward. The other deltas are scaled up, as in nn.Dropout."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the positions. The same seed gives the same positions on every rank and device and in every version."""

    @field_validator(
        *("density", "sparsity", "rank_equivalent", "selection_examples", "granularity"),
        *("transient_mib", "dropout", "seed"),
        mode="before",
    )
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):  # pydantic takes it for 0 or 1
            raise ValueError("must be a number")
        return value

    @field_validator("columns", mode="wrap")
    @classmethod
    def _share_or_whole(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            if not isinstance(value, bool):
                return validate(value)
        except ValidationError:
            pass
        raise ValueError("must be a share above 0 and at most 1, or whole")

    @model_validator(mode="after")
    def _one_budget(self) -> "SparseConfig":
        given = [name for name in ("density", "sparsity", "rank_equivalent") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: set only one of them")
        if self.granularity > 1 and self.selection != "stratified":
            raise ValueError(
                f"granularity: {self.granularity} requires selection: stratified, not {self.selection}; "
                "set granularity: 1 or selection: stratified"
            )
        if self.columns != 1 and self.selection != "stratified":
            raise ValueError(
                f"columns: {self.columns} requires selection: stratified, not {self.selection}; "
                "set columns: 1 or selection: stratified"
            )
        if self.columns != 1 and self.granularity > 1:
            raise ValueError(
                f"columns: {self.columns} excludes granularity: {self.granularity}; set columns: 1 or granularity: 1"
            )
        return self

    @property
    def uses_gradients(self) -> bool:
        """Whether examples are needed to select."""
        return self.selection in ("gradient", "snip")

    @property
    def stores_positions(self) -> bool:
        """Whether the positions cannot be drawn again, so that adapters and checkpoints contain them."""
        return self.uses_gradients or self.selection.startswith("magnitude")

    @property
    def budget(self) -> str:
        """The setting that determines how many scalars are trained, for messages."""
        for name in ("density", "sparsity", "rank_equivalent"):
            if getattr(self, name) is not None:
                return f"{name}: {getattr(self, name):g}"
        return f"density: {DEFAULT_DENSITY:g}"

    @property
    def drawn(self) -> str:
        """The settings that say how many scalars are drawn from what, for people."""
        return self.budget if self.columns == 1 else f"{self.budget}, columns: {self.columns}"

    @property
    def model_density(self) -> float | None:
        """The configured trainable fraction of the model's scalars; None with rank_equivalent."""
        if self.rank_equivalent is not None:
            return None
        if self.sparsity is not None:
            return 1 - self.sparsity
        return DEFAULT_DENSITY if self.density is None else self.density
