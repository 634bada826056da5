"""The plan of a run: the memory and traffic of each rank at each ZeRO stage, and the stages that fit a GPU."""

from dataclasses import asdict
from typing import Any

from sparse_zero.errors import UserError
from sparse_zero.planning.memory_and_traffic import Allocation, ZeroSettings, model_states, temporary_buffers, traffic
from sparse_zero.planning.planned_run import STAGES, PlannedRun

RESERVED = 0.08
"""The fraction of an accelerator's memory for its context and libraries, NCCL's buffers and fragmentation. An
assumption.
"""

MAX_RANKS = 2**20


def allocations(run: PlannedRun, zero: ZeroSettings, ranks: int) -> list[Allocation]:
    """All memory that a rank needs, at any time of a step."""
    kept = run.activations.peak(run.checkpointed)
    formula = run.activations.formula + ("; with gradient checkpointing" if run.checkpointed else "")
    return [
        *model_states(zero, ranks, run.sizes),
        *temporary_buffers(zero, ranks, run.sizes),
        Allocation("activations", kept - _loss_bytes(run), formula, when="backward", exact=False),
        Allocation("logits", _loss_bytes(run), run.activations.loss_formula, when="backward", exact=False),
        Allocation(
            "sampled gradient", run.transient_bytes, "transient_mib + 16 * largest delta", when="backward", exact=False
        ),
        *generation_memory(run, zero),
    ]


def generation_memory(run: PlannedRun, zero: ZeroSettings) -> list[Allocation]:
    """What a rank needs while GRPO or RLOO generate completions. No backward pass runs at the same time."""
    if run.generation is None:
        return []
    found = [
        Allocation("cache", run.generation.cache, run.generation.formula, when="generation", exact=False),
        Allocation("next tokens", run.generation.next_tokens, "12 * b * vocabulary", when="generation", exact=False),
    ]
    if zero.stage == 3 and run.generation.gathers:
        whole = sum(run.sizes.base + run.sizes.selected) * run.sizes.scalar_bytes
        found.append(Allocation("gathered", whole, "(W + selected) * b", when="generation", exact=False))
    return found


def _loss_bytes(run: PlannedRun) -> int:
    """Bytes of the loss at the peak of the backward pass. With checkpointing the loss is freed before a block is
    recomputed: it does not count if a block needs more.
    """
    found = run.activations
    return 0 if run.checkpointed and found.loss < max(found.layers, default=0) else found.loss


def device_bytes(run: PlannedRun, zero: ZeroSettings, ranks: int) -> int:
    """The peak memory of a rank on its accelerator, in bytes: in the backward pass, in the optimizer's step, or while
    completions are generated."""
    held = dict.fromkeys(("always", "backward", "step", "generation"), 0)
    for each in allocations(run, zero, ranks):
        if each.where == "device":
            held[each.when] += each.bytes
    needed = held["always"] + max(held["backward"], held["step"], held["generation"])
    if run.quantized is not None and zero.stage == 3:
        # DeepSpeed partitions it when each rank has it
        return max(needed, run.load_bytes + run.sizes.statistics_bytes)
    return needed


def host_bytes(run: PlannedRun, zero: ZeroSettings, ranks: int, ranks_per_node: int) -> int:
    """The peak host memory of a node in bytes, without the Python processes themselves: while the base model is
    loaded, or during training.

    At stages 0 to 2 every rank loads the whole base model before moving it to the accelerator. At stage 3 only the
    first rank reads the files.
    """
    loading = run.load_bytes * (1 if zero.stage == 3 else ranks_per_node)
    after = sum(each.bytes for each in model_states(zero, ranks, run.sizes) if each.where == "host") * ranks_per_node
    return max(loading, after) if zero.stage < 3 else loading + after


def least_ranks(run: PlannedRun, zero: ZeroSettings, available: float) -> int | None:
    """The smallest number of ranks whose peak memory is at most `available` bytes; None if no number is enough."""
    high = 1
    while device_bytes(run, zero, high) > available:
        high *= 2
        if high > MAX_RANKS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if device_bytes(run, zero, middle) <= available else (middle, high)
    return high


def check_ranks(ranks: int, nodes: int, bandwidth: float | None) -> None:
    """Check the arguments of `plan`.

    Raises UserError: there is no rank or no node, the ranks do not divide evenly, or the bandwidth is not positive.
    """
    if ranks < 1 or nodes < 1:
        raise UserError(f"--ranks {ranks} --nodes {nodes}: a run has at least 1 rank on 1 node")
    if ranks % nodes:
        raise UserError(f"--ranks {ranks}: cannot be divided evenly among {nodes} nodes; change --ranks or --nodes")
    if bandwidth is not None and not bandwidth > 0:
        raise UserError(f"--bandwidth {bandwidth / 1e9:g}: must be above 0 GB/s")


def plan(
    run: PlannedRun, ranks: int, nodes: int = 1, gpu_bytes: int | None = None, bandwidth: float | None = None
) -> dict[str, Any]:
    """Plan a run at every ZeRO stage.

    Args:
        run: see `describe_run`.
        ranks: the world size.
        nodes: hosts; `ranks` must be a multiple.
        gpu_bytes: memory of each rank's accelerator, in bytes.
        bandwidth: of each rank, in bytes per second.

    Returns: the value that `sparse-zero plan --json` prints.
    """
    available = None if gpu_bytes is None else gpu_bytes * (1 - RESERVED)
    stages = [_stage(name, run, ranks, nodes, available, bandwidth) for name in STAGES]
    sizes = run.sizes
    n, total = sum(sizes.trained), run.parameters
    positions = 4 * sum(sizes.selected) if run.stored_positions else 0
    fitting = [stage["stage"] for stage in stages if stage["fits"]]
    return {
        "parameters": total,
        "trained": n,
        "selected": sum(sizes.selected),
        "trained_whole": sum(sizes.whole),
        "density": n / total,
        "targets": len(sizes.selected),
        "bytes_per_scalar": sizes.scalar_bytes,
        "quantization": _quantization(run),
        "ranks": ranks,
        "nodes": nodes,
        "micro_batch": run.micro_batch,
        "micro_batches": run.micro_batches,
        "backwards": run.backwards,
        "tokens": run.tokens,
        "gradient_checkpointing": run.checkpointed,
        "activation_bytes": {
            "without_checkpointing": run.activations.peak(False),
            "with_checkpointing": run.activations.peak(True),
            "of_which_logits": run.activations.loss,
        },
        "checkpoint_bytes": 12 * n,
        "adapter_bytes": sizes.scalar_bytes * n + positions,
        "gpu_bytes": gpu_bytes,
        "room_bytes": None if available is None else int(available),
        "recipe_stage": run.own_stage,
        "stage": fitting[0] if fitting else None,
        "stages": stages,
        "notes": list(run.notes),
    }


def _quantization(run: PlannedRun) -> dict[str, Any] | None:
    found = run.quantized
    if found is None:
        return None
    return {
        "kind": found.quantization.kind,
        "parameters": found.scalars,
        "bits_per_scalar": found.bits,
        "packed_bytes": found.packed_bytes,
        "statistics_bytes": found.statistics_bytes,
    }


def _stage(
    name: str, run: PlannedRun, ranks: int, nodes: int, available: float | None, bandwidth: float | None
) -> dict[str, Any]:
    zero = run.zero_settings(name)
    device = device_bytes(run, zero, ranks)
    transfers = traffic(zero, ranks, run.sizes, run.backwards)
    sent = sum(each.sent_bytes(ranks) for each in transfers)
    return {
        "stage": name,
        "device_bytes": device,
        "host_bytes_per_node": host_bytes(run, zero, ranks, ranks // nodes),
        "sent_bytes_per_step": sent,
        "seconds_per_step": None if bandwidth is None else sent / bandwidth,
        "fits": None if available is None else device <= available,
        "least_ranks": None if available is None else least_ranks(run, zero, available),
        "holds": [asdict(each) for each in allocations(run, zero, ranks) if each.bytes],
        "sends": [
            {
                "operation": each.operation,
                "of": each.of,
                "times": each.times,
                "payload_bytes": each.payload_bytes,
                "sent_bytes": each.sent_bytes(ranks),
                "formula": each.formula,
            }
            for each in transfers
        ],
    }
