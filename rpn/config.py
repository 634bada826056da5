"""The settings of Random Position Noise, arXiv 2212.05961: the `rpn` section of a recipe. Imports no torch."""

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
    "alpha": ("neftune",),
    "ascent_step": ("freelb",),
    "ascent_radius": ("freelb",),
}


class RPNConfig(BaseModel):
    """How embeddings are disturbed, and how often, in each training step."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    noise: Literal["rpn", "gaussian", "salt-and-pepper", "neftune", "freelb", "none"] | UserNoise = "rpn"
    """What disturbs the embeddings. rpn: scalars move to random positions. gaussian, salt-and-pepper: the paper's
    baselines. neftune: uniform noise (arXiv 2310.05914). freelb: adversarial steps (arXiv 1909.11764). Or a function
    of your own, (embeddings, keep, stream) -> embeddings, as rpn.attach describes it: FILE.py:FUNCTION, with a file
    beside the recipe or in the working directory, or MODULE:FUNCTION, with a module that is installed or on
    PYTHONPATH. Python does not search the working directory for modules."""

    probability: float = Field(0.1, gt=0, le=1)
    """Chance of each embedding scalar to be sent to a random position (the paper's p; 0.1 to 0.3 there), or, with
    salt-and-pepper, to be overwritten."""

    passes: int = Field(1, ge=0)
    """Noisy passes beside the clean one (the paper's K; 1 to 3 there). 0 trains on the clean loss alone."""

    clean: bool = True
    """Whether the loss of the undisturbed batch is a term of the objective."""

    clean_weight: float = Field(1.0, gt=0)
    """Weight of the clean loss in the objective."""

    noisy_weight: float = Field(1.0, gt=0)
    """Weight of the loss of each noisy pass (1 in the paper; 1 / passes is FreeLB's average)."""

    scope: Literal["batch", "sequence"] = "batch"
    """How far values move: anywhere in the rank's micro-batch (the paper's way), or within their own example. With
    `sequence` the noise is a function of the example's place in the global batch, whatever the number of ranks."""

    exclude_special_tokens: bool = False
    """Whether the embeddings of special tokens ([CLS], <s>, ...) stay as they are."""

    std: float = Field(0.01, gt=0)
    """gaussian: standard deviation of the noise, in the units of the embedding."""

    alpha: float = Field(5.0, gt=0)
    """neftune: the noise is uniform in +-alpha / sqrt(length * hidden) (5 to 15 in its paper)."""

    ascent_step: float = Field(0.1, gt=0)
    """freelb: length of each gradient step on the perturbation of an example (its paper's alpha). There is one before
    each noisy pass but the first: with passes: 1 there is none."""

    ascent_radius: float = Field(0.6, gt=0)
    """freelb: largest norm of the perturbation of an example (its paper's epsilon)."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds every rank's noise; each (step, micro-step, pass, rank) has a stream of its own."""

    @model_validator(mode="after")
    def _settings_belong_to_the_noise(self):
        # none switches off what a recipe has set, so that `rpn.noise=none` alone makes the run to compare with
        if self.noise == "none":
            return self
        for name, noises in _NOISES_OF_SETTING.items():
            # not model_fields_set: a config that was dumped whole is read again with every default in it
            if self.noise not in noises and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is a setting of noise: {' and '.join(noises)}, which noise: {self.noise} does not have; "
                    f"leave it out, or set noise: {noises[0]}"
                )
        return self

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self):
        if not self.clean and (self.passes == 0 or self.noise == "none"):
            raise ValueError(
                "clean: false leaves no loss to train on: set noise to something else than none "
                "and passes to 1 or more, or clean to true"
            )
        return self


def file_of(noise: str) -> str | None:
    """The file of `FILE.py:FUNCTION`; None for any other noise."""
    file = noise.rpartition(":")[0]
    return file if file.endswith(".py") else None
