"""trainer_state.json of a checkpoint, which transformers reads without checks, and the states of callbacks in it."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState

from sparse_zero.adapters.reading import read_json
from sparse_zero.adapters.schema import Count, Scalar, reason_of
from sparse_zero.checkpoint.directory import Checkpoint
from sparse_zero.checkpoint.saved_state import is_like
from sparse_zero.errors import UserError

Number = int | Annotated[float, Field(allow_inf_nan=True)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Interval = Annotated[int, Field(ge=0, lt=2**62)] | Annotated[float, Field(ge=0, le=1)]


class _LogEntry(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Scalar]

    step: Count
    epoch: Number | None = None
    loss: Number | None = None
    grad_norm: Number | None = None
    learning_rate: Number | None = None
    eval_loss: Number | None = None
    train_loss: Number | None = None


class _TrainerState(BaseModel):
    """The fields of transformers' TrainerState that the loop computes with."""

    model_config = ConfigDict(extra="allow")

    epoch: Annotated[Finite, Field(ge=0, lt=2**31)]
    global_step: Count
    max_steps: int = Field(0, ge=-1, lt=2**62)
    logging_steps: Interval | None = None
    eval_steps: Interval | None = None
    save_steps: Interval | None = None
    train_batch_size: Count
    num_train_epochs: int | Finite = 0
    num_input_tokens_seen: Count = 0
    total_flos: int | Finite = 0
    log_history: list[_LogEntry]
    best_metric: Number | None = None
    best_global_step: Count | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Scalar] | None = None
    stateful_callbacks: dict[str, dict[str, Any] | list[dict[str, Any]]] = {}


def check_trainer_state(checkpoint: Checkpoint) -> None:
    """Check the content of trainer_state.json before transformers reads it.

    Raises UserError: it is not what a Trainer of this version of transformers writes at the checkpoint's step.
    """
    path = checkpoint.directory / "trainer_state.json"
    content = read_json(path)
    try:
        state = _TrainerState.model_validate(content, strict=True)
    except ValidationError as error:
        raise UserError(f"{path}: damaged ({reason_of(error)})") from None
    if unknown := sorted(content.keys() - {field.name for field in dataclasses.fields(TrainerState)}):
        raise UserError(f"{path}: has the field '{unknown[0]}', which this version of transformers does not have")
    if state.global_step != checkpoint.step:
        raise UserError(f"{path}: is of step {state.global_step}, but the checkpoint of step {checkpoint.step}")


def restore_callbacks(callbacks: Iterable[TrainerCallback], saved: Mapping[str, Any], origin: Path) -> None:
    """Set the attributes of callbacks that they had when the checkpoint was saved.

    Args:
        saved: `TrainerState.stateful_callbacks`: by class, the state of the callback or of each one.
        origin: the checkpoint's directory, for errors.

    Raises UserError: an attribute has another type. Then no callback is changed.
    """
    changes = []
    for name, states in saved.items():
        alike = [c for c in callbacks if type(c).__name__ == name and isinstance(c, ExportableState)]
        for callback, state in zip(alike, states if isinstance(states, list) else [states], strict=False):
            attributes, own = state.get("attributes", {}), callback.state().get("attributes", {})
            if not is_like(attributes, own):
                raise UserError(f"{origin}: trainer_state.json: damaged: {name}: attributes")
            for attribute in own.keys() & attributes.keys():
                if not is_like(attributes[attribute], own[attribute]):
                    raise UserError(f"{origin}: trainer_state.json: damaged: {name}.{attribute}")
                changes.append((callback, attribute, attributes[attribute]))
    for callback, attribute, value in changes:
        setattr(callback, attribute, value)
