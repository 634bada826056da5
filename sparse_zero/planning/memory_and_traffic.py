"""The memory and the traffic of each rank at each ZeRO stage, computed from the sizes of parameters without tensors.

The results are what DeepSpeed 0.19 allocates and sends, which is not always what the ZeRO paper (Rajbhandari et al.
2019, arXiv 1910.02054) says: by default stages 1 and 2 all-reduce whole buckets of gradients, and stage 2 does so in
every backward pass, not once per step.

Symbols in the formulas: N ranks, n trained scalars, W scalars of the base model, b bytes of a scalar in the model. A
quantised weight counts as the scalars of b bytes that its packed values fill.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

from sparse_zero.errors import UserError
from sparse_zero.zero.parameters import bucket_size

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "reduce"]

MASTER_BYTES, MOMENTS_BYTES = 4, 8
"""Bytes per trained scalar: of its float32 master copy, and of Adam's two moments."""
ALIGNMENT = 2
"""Stages 1 and 2 pad what they partition to a multiple of ALIGNMENT * N scalars."""


@dataclass(frozen=True)
class ModelSizes:
    """The number of scalars in each parameter of a sparse model."""

    base: tuple[int, ...]
    """Parameters of the base model, including those that are trained in full. A tied parameter counts once, a
    quantised one with as many scalars as fit into its packed bytes."""
    selected: tuple[int, ...]
    """The delta of each target: its number of selected scalars."""
    whole: tuple[int, ...]
    """Parameters of the base model that are trained in full."""
    index_bytes: int
    """Bytes of the stored strips of all targets; 0 if they are regenerated."""
    scalar_bytes: int
    """Bytes of a scalar in the model: 4, or 2 in half precision."""
    buffer_bytes: int = 0
    """Bytes of the base model's own buffers."""
    forward_only: int = 0
    """Scalars that no backward pass reads: an input embedding that is not tied to the head."""
    layers: tuple[int, ...] = ()
    """Scalars in each block that gradient checkpointing recomputes. Empty: nothing is recomputed."""
    quantized: tuple[int, ...] = ()
    """The deltas, among those of `selected`, of quantised weights, whose original values are not stored."""
    statistics_bytes: int = 0
    """Bytes of the statistics of quantised weights, which every rank has."""
    dequantized: int = 0
    """Scalars of the largest quantised weight."""

    @property
    def trained(self) -> tuple[int, ...]:
        return self.selected + self.whole


@dataclass(frozen=True)
class ZeroSettings:
    """The `zero_optimization` section of a DeepSpeed configuration. Sizes are in scalars; the defaults are
    DeepSpeed's.
    """

    stage: int
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True
    use_multi_rank_bucket_allreduce: bool = True
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    offload_optimizer: bool = False
    offload_param: bool = False

    @classmethod
    def from_config(cls, stage: int, config: Mapping[str, Any], hidden_size: int, trained: int) -> Self:
        """Read a `zero_optimization` section.

        Args:
            stage: takes precedence over the section's own.
            config: the section. An "auto" becomes what transformers and `fit_buckets` make of it.
            hidden_size: of the model.
            trained: number of trained scalars.

        Raises UserError: a value that DeepSpeed does not accept.
        """
        automatic = {
            "reduce_bucket_size": bucket_size(trained),
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
        known = {field.name for field in fields(cls)}
        given: dict[str, Any] = {"stage": stage}
        for key, value in ({"reduce_bucket_size": "auto"} | dict(config)).items():
            if key.startswith("offload_"):
                given[key] = is_offloaded(config, key)
            elif key in known and key != "stage":
                given[key] = automatic.get(key, value) if value == "auto" else value
        try:
            return TypeAdapter(cls).validate_python(given)
        except ValidationError as error:
            (key, *_), problem = error.errors()[0]["loc"], error.errors()[0]["msg"]
            problem = problem[0].lower() + problem[1:]
            raise UserError(f"training.deepspeed: zero_optimization.{key}: {problem}, not {given[key]!r}") from None

    @property
    def overlaps(self) -> bool:
        return self.stage == 3 if self.overlap_comm is None else self.overlap_comm

    def is_persistent(self, size: int) -> bool:
        """Whether stage 3 keeps a parameter of `size` scalars whole on every rank, in addition to its partition."""
        return self.stage == 3 and size <= self.stage3_param_persistence_threshold


def is_offloaded(config: Mapping[str, Any], key: str) -> bool:
    """Args: config: a `zero_optimization` section; key: offload_optimizer or offload_param."""
    value = config.get(key)
    return isinstance(value, Mapping) and value.get("device", "none") != "none"


@dataclass(frozen=True)
class Transfer:
    """A collective that every optimizer step performs."""

    operation: Operation
    of: str
    payload_bytes: int
    """Bytes of the whole result of a gather, or of the whole input of a reduction, padding included."""
    times: int
    """How often an optimizer step performs it."""
    formula: str
    """The formula of `sent_bytes`."""

    def sent_bytes(self, ranks: int) -> int:
        """Bytes that a rank sends, and receives, in a step with the ring algorithms of gloo and NCCL."""
        rounds = 2 if self.operation == "all-reduce" else 1
        return rounds * (ranks - 1) * self.payload_bytes * self.times // ranks


def traffic(zero: ZeroSettings, ranks: int, sizes: ModelSizes, backwards: int = 1) -> list[Transfer]:
    """The collectives of an optimizer step, without those of single numbers such as norms and losses.

    The result is exact for stages 0 to 2. At stage 3 the gathers of the base model are exact if DeepSpeed reuses
    either no gathered parameter (`stage3_max_reuse_distance`) or all of them, and an estimate otherwise. They hold
    from the second step on, when DeepSpeed knows the order of the parameters.

    Args:
        backwards: backward passes of a step: micro-batches times passes of the objective.
    """
    if ranks == 1:
        return []
    if zero.stage == 3:
        return _stage_3_traffic(zero, ranks, sizes, backwards)
    b, n = sizes.scalar_bytes, sum(sizes.trained)
    by_reduce = zero.stage > 0 and not zero.use_multi_rank_bucket_allreduce
    times = backwards if zero.stage == 2 else 1
    count = f"{times} x " if times > 1 else ""
    reduced = (
        Transfer("reduce", "gradients", n * b, times, f"{count}(N-1)/N * n * b")
        if by_reduce
        else Transfer("all-reduce", "gradients", n * b, times, f"{count}2(N-1)/N * n * b")
    )
    if zero.stage == 0:
        return [reduced]
    gathered = ranks * partition_size(zero, ranks, sizes) * b
    return [reduced, Transfer("all-gather", "deltas", gathered, 1, "(N-1)/N * n * b")]


def _stage_3_traffic(zero: ZeroSettings, ranks: int, sizes: ModelSizes, backwards: int) -> list[Transfer]:
    b, count = sizes.scalar_bytes, f"{backwards} x " if backwards > 1 else ""
    gradients = _padded(sizes.trained, ranks) * b
    found = [
        Transfer("reduce-scatter", "gradients", gradients, backwards, f"{count}(N-1)/N * n * b"),
        Transfer(
            "all-gather",
            "base and deltas",
            _gathered_per_backward(zero, ranks, sizes) * b,
            backwards,
            f"{count}(N-1)/N * (W + n) * b in forward, and again what is not reused in "
            + ("recomputation and backward" if sizes.layers else "backward"),
        ),
    ]
    kept = _padded(filter(zero.is_persistent, sizes.base + sizes.selected), ranks) * b
    if kept:
        found.append(Transfer("all-gather", "persistent parameters", kept, 1, "(N-1)/N * persistent * b"))
    return found


def _gathered_per_backward(zero: ZeroSettings, ranks: int, sizes: ModelSizes) -> int:
    """Scalars that a forward and its backward gather at stage 3.

    DeepSpeed keeps a gathered parameter that is read again within `stage3_max_reuse_distance` scalars. The backward
    pass reads in the opposite order, so of the parameters that forward read last, half that distance is still
    gathered.
    """
    reused = zero.stage3_max_reuse_distance // 2
    in_forward = _padded((s for s in sizes.base + sizes.selected if not zero.is_persistent(s)), ranks)
    in_backward = in_forward - (0 if zero.is_persistent(sizes.forward_only) else sizes.forward_only)
    recomputed = sum(max(0, layer - reused) for layer in sizes.layers)
    return in_forward + max(0, in_backward - reused) + recomputed


@dataclass(frozen=True)
class Allocation:
    """Memory of a rank."""

    what: str
    bytes: int
    formula: str
    where: Literal["device", "host"] = "device"
    when: Literal["always", "backward", "step", "generation"] = "always"
    exact: bool = True
    """False: an estimate."""


def model_states(zero: ZeroSettings, ranks: int, sizes: ModelSizes) -> list[Allocation]:
    """What a rank stores of the model and the optimizer from the first step on. Exact up to padding."""
    b, stage, n = sizes.scalar_bytes, zero.stage, sum(sizes.trained)
    selected = sum(sizes.selected)
    share = partition_size(zero, ranks, sizes)
    parameters = "host" if zero.offload_param and stage == 3 else "device"
    optimizer = "host" if zero.offload_optimizer and stage > 0 else "device"
    base = _partitioned_and_persistent(zero, ranks, sizes.base)
    deltas = _partitioned_and_persistent(zero, ranks, sizes.selected)
    per_rank = "/ N" if stage == 3 else ""
    held = [
        Allocation("weights", base[0] * b, f"W * b {per_rank}".strip(), where=parameters),
        Allocation("deltas", deltas[0] * b, f"selected * b {per_rank}".strip(), where=parameters),
        Allocation("buffers", sizes.buffer_bytes, "the base model's own"),
        Allocation("statistics", sizes.statistics_bytes, "scales of the quantised weights"),
        Allocation("originals", (selected - sum(sizes.quantized)) * b, "selected * b"),
        Allocation("indices", sizes.index_bytes, "4 * selected / granularity, or 0: sparse.indices, columns"),
    ]
    if whole := base[1] + deltas[1]:
        held.append(Allocation("persistent", whole * b, "parameters up to the persistence threshold * b"))
    # DeepSpeed does not copy float32 parameters if it partitions nothing
    if stage > 0 or b < MASTER_BYTES:
        held.append(Allocation("master", MASTER_BYTES * share, f"4 * n{_per_rank(stage)}", where=optimizer))
    held.append(Allocation("moments", MOMENTS_BYTES * share, f"8 * n{_per_rank(stage)}", where=optimizer))
    if stage == 3:
        held.append(Allocation("gradients", share * b, "n * b / N", where=optimizer))
        if zero.contiguous_gradients:
            held.append(Allocation("buckets", zero.reduce_bucket_size * b, "reduce_bucket_size * b"))
    elif stage == 0:
        held.append(Allocation("gradients", n * b, "n * b"))
    if optimizer == "host":
        held.append(Allocation("host gradients", MASTER_BYTES * share, "4 * n / N", where="host"))
    return held


def temporary_buffers(zero: ZeroSettings, ranks: int, sizes: ModelSizes) -> list[Allocation]:
    """What a rank stores only during the backward pass or the optimizer's step, without activations. Estimates, except
    for the buckets.
    """
    b, stage, n = sizes.scalar_bytes, zero.stage, sum(sizes.trained)
    share = partition_size(zero, ranks, sizes)
    largest = "largest quantised weight * b"
    found = [Allocation("dequantised", sizes.dequantized * b, largest, when="backward", exact=False)]
    if stage in (1, 2):
        if zero.contiguous_gradients:
            buckets = 2 if zero.overlaps else 1
            size, formula = buckets * zero.reduce_bucket_size * b, f"{buckets} * reduce_bucket_size * b"
            found.append(Allocation("buckets", size, formula, when="backward"))
        kept, formula = (n, "n * b") if stage == 1 else (share, "n * b / N")
        found.append(Allocation("gradients", kept * b, formula, when="backward", exact=False))
        found.append(Allocation("gradients", kept * b, formula, when="step", exact=False))
    elif stage == 0:
        found.append(Allocation("flat gradients", n * b, "n * b", when="step", exact=False))
    else:
        live, formula = _gathered_at_once(zero, sizes)
        found.append(Allocation("gathered", live * b, formula, when="backward", exact=False))
    if stage > 0 and zero.offload_optimizer:
        found.append(Allocation("gradient on its way", max(sizes.trained) * b, "largest * b", exact=False))
    elif stage > 0 or b < MASTER_BYTES:
        # Also if gradients are float32: DeepSpeed concatenates the pieces of the partition
        formula = f"4 * n{_per_rank(stage)}"
        found.append(Allocation("float32 gradients", MASTER_BYTES * share, formula, when="step", exact=False))
    return found


def _gathered_at_once(zero: ZeroSettings, sizes: ModelSizes) -> tuple[int, str]:
    """The most scalars that stage 3 has gathered at once, and the formula."""
    everything = sum(s for s in sizes.base + sizes.selected if not zero.is_persistent(s))
    most = max(zero.stage3_max_live_parameters, zero.stage3_max_reuse_distance // 2)
    bound = most + max(sizes.base) + zero.stage3_prefetch_bucket_size
    return min(everything, bound), "(max_live_parameters + largest + prefetch bucket) * b, at most W * b"


def partition_size(zero: ZeroSettings, ranks: int, sizes: ModelSizes) -> int:
    """The number of trained scalars whose optimizer state a rank stores, padding included."""
    n = sum(sizes.trained)
    if zero.stage == 0:
        return n
    if zero.stage == 3:
        return _padded(sizes.trained, ranks) // ranks
    return -(-n // (ALIGNMENT * ranks)) * ALIGNMENT


def _partitioned_and_persistent(zero: ZeroSettings, ranks: int, parameters: Iterable[int]) -> tuple[int, int]:
    """The scalars that a rank stores of some parameters: in its partitions, and of the parameters that stage 3
    additionally keeps whole.
    """
    parameters = tuple(parameters)
    if zero.stage < 3:
        return sum(parameters), 0
    return _padded(parameters, ranks) // ranks, sum(filter(zero.is_persistent, parameters))


def _padded(parameters: Iterable[int], ranks: int) -> int:
    """Scalars with padding: stage 3 splits each parameter into `ranks` equal parts."""
    return sum(-(-size // ranks) * ranks for size in parameters)


def _per_rank(stage: int) -> str:
    return " / N" if stage > 0 else ""
