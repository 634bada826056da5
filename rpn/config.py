"""RPNConfig: the settings of Random Position Noise (arXiv 2212.05961), the `rpn` section of a recipe.

Does not import torch.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

_FUNCTION = r"^.+:[A-Za-z_][A-Za-z0-9_]*$"


def _names_a_function(noise: str) -> str:
    if re.search(_FUNCTION, noise) is None:
        raise PydanticCustomError("noise", "Input should be FILE.py:FUNCTION or MODULE:FUNCTION")
    return noise


UserNoise = Annotated[str, AfterValidator(_names_a_function), WithJsonSchema({"type": "string", "pattern": _FUNCTION})]
"""FILE.py:FUNCTION or MODULE:FUNCTION, see rpn.user_noise."""

_NOISES_OF_SETTING = {
    "probability": ("rpn", "salt-and-pepper"),
    "std": ("gaussian",),
    "alpha": ("neftune", "symnoise"),
    "ascent_step": ("freelb",),
    "ascent_radius": ("freelb",),
}


class RPNConfig(BaseModel):
    """Which noise is added to the embeddings in each training step, and in how many passes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    noise: Literal["rpn", "gaussian", "salt-and-pepper", "neftune", "symnoise", "freelb", "none"] | UserNoise = "rpn"
    """The noise. rpn: scalars move to random positions. gaussian, salt-and-pepper: the baselines of the RPN paper.
    neftune: uniform noise (arXiv 2310.05914). symnoise: noise of one size and random signs, with the opposite signs in
    every other pass (arXiv 2312.01523). freelb: adversarial perturbations (arXiv 1909.11764). none: no noise.
    Or your own function of (embeddings, keep, stream), as rpn.attach describes it: FILE.py:FUNCTION, a file in the
    recipe's directory or in the working directory, or MODULE:FUNCTION, a module that is installed or on
    PYTHONPATH. Python does not search the working directory for modules."""

    probability: float = Field(0.1, gt=0, le=1)
    """Probability that an embedding scalar moves to a random position (p in the paper, there 0.1 to 0.3) or, with
    salt-and-pepper, is overwritten."""

    passes: int = Field(1, ge=0)
    """Number of noisy passes in addition to the clean one (K in the paper, there 1 to 3). 0: the clean loss only."""

    clean: bool = True
    """Whether the objective includes the loss of a pass without noise."""

    clean_weight: float = Field(1.0, gt=0)
    """Weight of the clean loss in the objective."""

    noisy_weight: float = Field(1.0, gt=0)
    """Weight of the loss of each noisy pass (1 in the paper; 1 / passes gives FreeLB's average)."""

    scope: Literal["batch", "sequence"] = "batch"
    """Where scalars can move to. batch: anywhere in the rank's micro-batch, as in the paper. sequence: within their
    example; the noise then depends on the example's position in the global batch, but not on the number of ranks."""

    exclude_special_tokens: bool = False
    """Whether the embeddings of special tokens ([CLS], <s>, ...) get no noise."""

    std: float = Field(0.01, gt=0)
    """gaussian: standard deviation of the noise, in units of the embedding."""

    alpha: float = Field(5.0, gt=0)
    """neftune: the noise is uniform in +-alpha / sqrt(length * hidden) (5 to 15 in the NEFTune paper). symnoise: it is
    one of these two numbers."""

    ascent_step: float = Field(0.1, gt=0)
    """freelb: length of each gradient step on the perturbation of an example (alpha in the FreeLB paper). There is one
    step before each noisy pass except the first, so none with passes: 1."""

    ascent_radius: float = Field(0.6, gt=0)
    """freelb: largest norm of the perturbation of an example (epsilon in the FreeLB paper)."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the noise. Each (step, micro-step, pass, rank) has a separate random stream."""

    @model_validator(mode="after")
    def _settings_belong_to_the_noise(self):
        # With none, other settings are allowed: `rpn.noise=none` on the command line gives a run without the noise
        if self.noise == "none":
            return self
        for name, noises in _NOISES_OF_SETTING.items():
            # not model_fields_set: a config that is read back from a full dump sets every field, if only to its
            # default
            if self.noise not in noises and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is a setting of noise: {' and '.join(noises)}, not of noise: {self.noise}; "
                    f"remove it, or set noise: {noises[0]}"
                )
        return self

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self):
        if not self.clean and (self.passes == 0 or self.noise == "none"):
            raise ValueError(
                "clean: false leaves no loss to train on: set passes to at least 1 and noise to anything but none, "
                "or set clean: true"
            )
        return self


def file_of(noise: str) -> str | None:
    """The file of `FILE.py:FUNCTION`; None for any other noise."""
    file = noise.rpartition(":")[0]
    return file if file.endswith(".py") else None
