"""What to train: the `sparse` section of a recipe, and the argument of `sparsify`. Imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class SparseConfig(BaseModel):
    """Which scalars of a model are trainable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    density: float = Field(0.01, gt=0, le=1)
    """Trainable fraction of all the model's scalars, fully trained modules included (the paper's 1 - sparsity)."""

    targets: Literal["all-linear"] | list[str] | None = None
    """Where the scalars are drawn. None: the value and output projections of the model's family. "all-linear": every
    linear layer but the head. A list: shell patterns over module names ("*.v_proj") or endings of them ("v_proj")."""

    modules_to_save: list[str] | None = None
    """Modules that are trained, and saved, whole. None: the task head of a sequence-classification model."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Draws the positions. The same seed draws the same positions on every rank, device and version."""
