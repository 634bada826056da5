"""What to train: the `sparse` section of a recipe, and the argument of `sparsify`. Imports no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TokenIndex = Annotated[int, Field(ge=0)]

DEFAULT_DENSITY = 0.01


class SparseConfig(BaseModel):
    """Which scalars of a model are trainable. One of density, sparsity and rank_equivalent says how many; density
    0.01 where none does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    density: float | None = Field(None, gt=0, le=1)
    """Trainable fraction of all the model's scalars, fully trained modules included."""

    sparsity: float | None = Field(None, ge=0, lt=1)
    """The paper's word for the same: 1 - density."""

    rank_equivalent: int | None = Field(None, ge=1)
    """As many scalars as a LoRA adapter of this rank has: rank * (in + out) of each target matrix."""

    selection: Literal["stratified", "bernoulli", "magnitude", "magnitude-smallest"] = "stratified"
    """How scalars are chosen. stratified: exactly as many as the budget says, one from each of as many equal blocks of
    a weight. bernoulli: each with the same chance, independently (the paper's way; the number varies). magnitude: the
    largest of each pretrained weight (Super-Tuning, arXiv 2607.09287), or the smallest; adapters then carry their
    positions."""

    granularity: int = Field(1, ge=1)
    """Scalars that are selected together: strips of this many consecutive rows of one column, drawn anew in each block
    of rows. With `stratified` only; it must divide the rows of every target matrix."""

    targets: Literal["all-linear", "all"] | list[str] | None = None
    """Where the scalars are drawn. None: the value and output projections of the model's family. "all-linear": every
    linear layer but the head, expert weights included. "all": every parameter. A list: shell patterns or endings of
    module names ("v_proj", "*.layers.1?.mlp.*") or of parameter names ("*.bias", "experts.down_proj"). A module stands
    for its weight; a pattern that matches linear layers and others stands for the linear layers."""

    exclude_modules: list[str] | None = None
    """Modules that stay frozen though `targets` names them; patterns as in `targets`."""

    modules_to_save: list[str] | None = None
    """Modules that are trained, and saved, whole. None: the task head of a sequence-classification model."""

    trainable_token_indices: list[TokenIndex] | None = None
    """Tokens whose embeddings are trained whole: rows of the input embedding, and of the output embedding where the
    two are not tied."""

    indices: Literal["stored", "regenerated"] = "stored"
    """Where the positions are between their uses. stored: beside each weight, 4 bytes for each selected scalar, or for
    each strip. regenerated: nowhere; they are drawn again for each gradient and each writing of the deltas. Positions
    that no rule draws (magnitude, a caller's own) are stored all the same."""

    transient_mib: int = Field(64, ge=1)
    """Bound on the memory that the gradient of a weight takes for a moment, beside its inputs, its result and the
    positions, in MiB."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Chance of each delta to be left out of a training forward; what is left is scaled up, as in nn.Dropout."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Draws the positions. The same seed draws the same positions on every rank, device and version."""

    @model_validator(mode="after")
    def _one_budget(self) -> "SparseConfig":
        given = [name for name in ("density", "sparsity", "rank_equivalent") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how many scalars train: keep one of them")
        if self.granularity > 1 and self.selection != "stratified":
            raise ValueError(
                f"granularity: strips are drawn by selection: stratified, not by {self.selection}; "
                "set granularity: 1 or selection: stratified"
            )
        return self

    @property
    def budget(self) -> str:
        """The setting that says how many scalars train, for people."""
        for name in ("density", "sparsity", "rank_equivalent"):
            if getattr(self, name) is not None:
                return f"{name}: {getattr(self, name):g}"
        return f"density: {DEFAULT_DENSITY:g}"

    @property
    def model_density(self) -> float | None:
        """The trainable fraction of the model's scalars that was asked for; None with rank_equivalent."""
        if self.rank_equivalent is not None:
            return None
        if self.sparsity is not None:
            return 1 - self.sparsity
        return DEFAULT_DENSITY if self.density is None else self.density
