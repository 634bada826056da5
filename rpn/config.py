"""The settings of Random Position Noise, arXiv 2212.05961: the `rpn` section of a recipe. Imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RPNConfig(BaseModel):
    """How embeddings are disturbed, and how often, in each training step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probability: float = Field(0.1, gt=0, le=1)
    """Chance of each embedding scalar to be sent to a random position (the paper's p; 0.1 to 0.3 there)."""

    passes: int = Field(1, ge=0)
    """Noisy passes beside the clean one (the paper's K; 1 to 3 there). 0 trains on the clean loss alone."""

    clean: bool = True
    """Whether the loss of the undisturbed batch is a term of the objective."""

    scope: Literal["batch", "sequence"] = "batch"
    """How far values move: anywhere in the rank's micro-batch (the paper's way), or within their own example."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds every rank's noise; each (step, micro-step, pass, rank) has a stream of its own."""
