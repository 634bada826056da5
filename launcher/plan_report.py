"""How `sparse-zero plan` prints: the run, a table of the stages, and all of the stage that it would take."""

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.report import print_facts, print_notes, print_rows, readable

KNOWN, GUESSED = "exact", "estimate"


def print_plan(title: str, plan: Mapping[str, Any]) -> None:
    """Args: plan: what sparse_zero.planning.from_recipe.plan returns."""
    print_facts(title, _run(plan))
    print()
    print_rows([_row(stage) for stage in plan["stages"]])
    shown = _shown(plan)
    print(f"\nstage {shown['stage']}, each rank holds")
    print_rows([_holding(each) for each in shown["holds"]])
    if shown["sends"]:
        print(f"\nstage {shown['stage']}, each rank sends in a step")
        print_rows([_sending(each) for each in shown["sends"]])
    print(f"\n{_conclusion(plan)}")
    print_notes(plan["notes"])


def _run(plan: Mapping[str, Any]) -> dict[str, str]:
    batch = f"{plan['micro_batch']} x {plan['tokens']:,} tokens, {plan['micro_batches']} times a step"
    kept = plan["activation_bytes"]
    return {
        "model": f"{plan['parameters']:,} scalars of {plan['bytes_per_scalar']} bytes",
        "trained": f"{plan['trained']:,} scalars ({plan['density']:.2%}) in {plan['targets']} targets",
        "each rank's batch": batch,
        "ranks": f"{plan['ranks']:,} on {plan['nodes']:,} node{'s' if plan['nodes'] > 1 else ''}",
        "activations": f"{_size(kept['without_checkpointing'])}, {_size(kept['with_checkpointing'])} with gradient "
        f"checkpointing (estimates); logits {_size(kept['of_which_logits'])} of them",
        "checkpoint": f"{_size(plan['checkpoint_bytes'])}, 12 bytes a scalar",
        "adapter": _size(plan["adapter_bytes"]),
    }


def _row(stage: Mapping[str, Any]) -> dict[str, Any]:
    row = {
        "stage": stage["stage"],
        "a rank holds": _size(stage["device_bytes"]),
        "a node's host memory": _size(stage["host_bytes_per_node"]),
        "a rank sends in a step": _size(stage["sent_bytes_per_step"]),
    }
    if stage["seconds_per_step"] is not None:
        row["in"] = f"{stage['seconds_per_step']:.3g} s"
    if stage["fits"] is not None:
        row |= {"fits": "yes" if stage["fits"] else "no"}
        row["least ranks"] = "none" if stage["least_ranks"] is None else f"{stage['least_ranks']:,}"
    return row


def _holding(held: Mapping[str, Any]) -> dict[str, Any]:
    when = "" if held["when"] == "always" else f" in {held['when']}"
    return {
        "what": f"{held['what']}{when}{' (host)' if held['where'] == 'host' else ''}",
        "size": _size(held["bytes"]),
        "": KNOWN if held["exact"] else GUESSED,
        "formula": held["formula"],
    }


def _sending(sent: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "operation": sent["operation"],
        "of": sent["of"],
        "size": _size(sent["sent_bytes"]),
        "formula": sent["formula"],
    }


def _shown(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """The stage to take; where no memory is given, the recipe's own; where none fits, the one that holds least."""
    stages: Sequence[Mapping[str, Any]] = plan["stages"]
    if plan["stage"] is None and plan["gpu_bytes"] is not None:
        return min(stages, key=lambda stage: stage["device_bytes"])
    wanted = plan["stage"] or plan["recipe_stage"]
    return next(stage for stage in stages if stage["stage"] == wanted)


def _conclusion(plan: Mapping[str, Any]) -> str:
    if plan["gpu_bytes"] is None:
        return "give --gpu-memory to see which stages fit"
    room = f"{_size(plan['room_bytes'])} of {_size(plan['gpu_bytes'])}, the rest being reserved"
    if plan["stage"] is None:
        return f"no stage fits {room}"
    return f"stage {plan['stage']} is the lowest that fits {room}"


def _size(count: int) -> str:
    return readable("bytes", count)
