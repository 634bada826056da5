"""The small state of a DeepSpeed engine and of loss scaling, as JSON values."""

from typing import Any

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def counters(engine: Any) -> dict[str, int]:
    """What an engine counts; nothing where there is none."""
    return {name: int(getattr(engine, name)) for name in _COUNTERS} if engine is not None else {}


def restore_counters(engine: Any, saved: dict[str, int]) -> None:
    if engine is not None:
        for name, value in saved.items():
            setattr(engine, name, value)


def loss_scale(engine: Any, scaler: Any) -> dict[str, Any] | None:
    """Args: scaler: torch's, where there is no engine; None where neither scales."""
    if engine is None:
        return scaler.state_dict() if scaler is not None else None
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)} if scaler is not None else None


def restore_loss_scale(engine: Any, scaler: Any, saved: dict[str, Any] | None) -> None:
    if saved is None:
        return
    if engine is None:
        if scaler is not None:
            scaler.load_state_dict(saved)
    elif (scaler := getattr(engine.optimizer, "loss_scaler", None)) is not None:
        for name in vars(scaler).keys() & saved.keys():
            setattr(scaler, name, saved[name])
