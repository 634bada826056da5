"""Output of `sparse-zero plan`: the run, a table of the ZeRO stages, and the details of one stage."""

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.report import print_facts, print_notes, print_rows, readable

EXACT, ESTIMATE = "exact", "estimate"


def print_plan(title: str, plan: Mapping[str, Any]) -> None:
    """Print a plan. Args: plan: the result of sparse_zero.planning.plan.plan."""
    print_facts(title, _run(plan))
    print()
    print_rows([_row(stage) for stage in plan["stages"]])
    shown = _shown(plan)
    print(f"\nstage {shown['stage']}: memory of each rank")
    print_rows([_allocation(each) for each in shown["holds"]])
    if shown["sends"]:
        print(f"\nstage {shown['stage']}: each rank sends per step")
        print_rows([_transfer(each) for each in shown["sends"]])
    print(f"\n{_conclusion(plan)}")
    print_notes(plan["notes"])


def _run(plan: Mapping[str, Any]) -> dict[str, str]:
    batch = f"{plan['micro_batch']} x {plan['tokens']:,} tokens, {plan['micro_batches']} times per step"
    kept = plan["activation_bytes"]
    model = f"{plan['parameters']:,} scalars of {plan['bytes_per_scalar']} bytes"
    if quantized := plan["quantization"]:
        bits = f"{quantized['bits_per_scalar']:.3g} bits"
        model += f", {quantized['parameters']:,} of them in {quantized['kind']} ({bits})"
    return {
        "model": model,
        "trained": f"{plan['trained']:,} scalars ({plan['density']:.2%}) in {plan['targets']} targets",
        "batch of each rank": batch,
        "ranks": f"{plan['ranks']:,} on {plan['nodes']:,} node{'s' if plan['nodes'] > 1 else ''}",
        "activations": f"{_size(kept['without_checkpointing'])}, {_size(kept['with_checkpointing'])} with gradient "
        f"checkpointing (estimates), including {_size(kept['of_which_logits'])} for logits",
        "checkpoint": f"{_size(plan['checkpoint_bytes'])}, 12 bytes per trained scalar",
        "adapter": _size(plan["adapter_bytes"]),
    }


def _row(stage: Mapping[str, Any]) -> dict[str, Any]:
    row = {
        "stage": stage["stage"],
        "memory per rank": _size(stage["device_bytes"]),
        "host memory per node": _size(stage["host_bytes_per_node"]),
        "sent per rank and step": _size(stage["sent_bytes_per_step"]),
    }
    if stage["seconds_per_step"] is not None:
        row["in"] = f"{stage['seconds_per_step']:.3g} s"
    if stage["fits"] is not None:
        row |= {"fits": "yes" if stage["fits"] else "no"}
        row["min. ranks"] = "none" if stage["least_ranks"] is None else f"{stage['least_ranks']:,}"
    return row


def _allocation(held: Mapping[str, Any]) -> dict[str, Any]:
    when = "" if held["when"] == "always" else f" in {held['when']}"
    return {
        "what": f"{held['what']}{when}{' (host)' if held['where'] == 'host' else ''}",
        "size": _size(held["bytes"]),
        "": EXACT if held["exact"] else ESTIMATE,
        "formula": held["formula"],
    }


def _transfer(sent: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "operation": sent["operation"],
        "of": sent["of"],
        "size": _size(sent["sent_bytes"]),
        "formula": sent["formula"],
    }


def _shown(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """The stage to describe: the lowest that fits; the recipe's own if no GPU memory is given; the one that needs the
    least memory if none fits.
    """
    stages: Sequence[Mapping[str, Any]] = plan["stages"]
    if plan["stage"] is None and plan["gpu_bytes"] is not None:
        return min(stages, key=lambda stage: stage["device_bytes"])
    wanted = plan["stage"] or plan["recipe_stage"]
    return next(stage for stage in stages if stage["stage"] == wanted)


def _conclusion(plan: Mapping[str, Any]) -> str:
    if plan["gpu_bytes"] is None:
        return "add --gpu-memory to see which stages fit"
    available = f"{_size(plan['room_bytes'])} of {_size(plan['gpu_bytes'])} (the rest is reserved)"
    if plan["stage"] is None:
        return f"no stage fits into {available}"
    return f"stage {plan['stage']} is the lowest that fits into {available}"


def _size(count: int) -> str:
    return readable("bytes", count)
