"""What each rank holds and sends at each ZeRO stage: arithmetic on the sizes of parameters, no tensors.

The sizes are those of what DeepSpeed 0.19 allocates and sends, which is not always what the ZeRO paper says: stages 1
and 2 all-reduce whole buckets of gradients by default, and stage 2 does so in every backward, not once per step.

Letters of the formulas: N ranks, n trained scalars, W scalars of the base, b bytes of a scalar as the model holds it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

from sparse_zero.errors import UserError
from sparse_zero.zero.parameters import fitted_bucket

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "reduce"]

MASTER, MOMENTS = 4, 8
"""Bytes of a scalar's float32 original and of Adam's two moments."""
ALIGNMENT = 2
"""Scalars: stages 1 and 2 pad what they partition to a multiple of ALIGNMENT * N."""


@dataclass(frozen=True)
class Sizes:
    """The scalars of a sparse model, parameter by parameter."""

    base: tuple[int, ...]
    """Of the base model, a tied one once, those trained whole included."""
    selected: tuple[int, ...]
    """The deltas: of each target, how many are selected."""
    whole: tuple[int, ...]
    """Of the base, those trained whole."""
    index_bytes: int
    """Of the strips of all targets, where they are stored."""
    scalar_bytes: int
    """4, or 2 where the model is in half precision."""
    buffer_bytes: int = 0
    """The base model's own buffers."""
    forward_only: int = 0
    """Scalars that no backward reads: an input embedding that is not tied to the head."""
    layers: tuple[int, ...] = ()
    """Of each block that gradient checkpointing recomputes; empty: nothing is recomputed."""

    @property
    def trained(self) -> tuple[int, ...]:
        return self.selected + self.whole


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed configuration's `zero_optimization` says, in scalars; the defaults are DeepSpeed's."""

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
    def of(cls, stage: int, config: Mapping[str, Any], hidden_size: int, trained: int) -> Self:
        """Args: config: `zero_optimization`; its "auto" are what transformers and `fit_buckets` make of them; trained:
        scalars. Raises UserError: values that DeepSpeed does not take."""
        automatic = {
            "reduce_bucket_size": fitted_bucket(trained),
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
        """Whether stage 3 keeps a parameter of this size whole on every rank, beside its partition."""
        return self.stage == 3 and size <= self.stage3_param_persistence_threshold


def is_offloaded(config: Mapping[str, Any], key: str) -> bool:
    """Args: config: `zero_optimization`; key: offload_optimizer or offload_param."""
    value = config.get(key)
    return isinstance(value, Mapping) and value.get("device", "none") != "none"


@dataclass(frozen=True)
class Transfer:
    """A collective of every optimizer step."""

    operation: Operation
    of: str
    payload_bytes: int
    """Of what every rank has in the end, or had before: n * b, padding included."""
    times: int
    """Per optimizer step."""
    formula: str
    """Of `sent_bytes`."""

    def sent_bytes(self, ranks: int) -> int:
        """What a rank sends, and receives, in a step, by the ring algorithms that gloo and NCCL use."""
        rounds = 2 if self.operation == "all-reduce" else 1
        return rounds * (ranks - 1) * self.payload_bytes * self.times // ranks


def traffic(zero: Zero, ranks: int, sizes: Sizes, backwards: int = 1) -> list[Transfer]:
    """What is sent in an optimizer step, but for single numbers such as norms and losses.

    Args: backwards: backward passes of a step: micro-batches times passes of the objective.
    Exact for stages 0 to 2. What stage 3 gathers of the base is exact where nothing is reused within
    `stage3_max_reuse_distance`, or everything, and an estimate between; from the second step on, when DeepSpeed knows
    the order.
    """
    if ranks == 1:
        return []
    if zero.stage == 3:
        return _traffic_of_stage_3(zero, ranks, sizes, backwards)
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
    gathered = ranks * partition(zero, ranks, sizes) * b
    return [reduced, Transfer("all-gather", "deltas", gathered, 1, "(N-1)/N * n * b")]


def _traffic_of_stage_3(zero: Zero, ranks: int, sizes: Sizes, backwards: int) -> list[Transfer]:
    b, count = sizes.scalar_bytes, f"{backwards} x " if backwards > 1 else ""
    gradients = _padded(sizes.trained, ranks) * b
    found = [
        Transfer("reduce-scatter", "gradients", gradients, backwards, f"{count}(N-1)/N * n * b"),
        Transfer(
            "all-gather",
            "base and deltas",
            _gathered(zero, ranks, sizes) * b,
            backwards,
            f"{count}(N-1)/N * (W + n) * b in forward, and what is not reused again in "
            + ("recomputation and backward" if sizes.layers else "backward"),
        ),
    ]
    kept = _padded(filter(zero.is_persistent, sizes.base + sizes.selected), ranks) * b
    if kept:
        found.append(Transfer("all-gather", "persistent parameters", kept, 1, "(N-1)/N * persistent * b"))
    return found


def _gathered(zero: Zero, ranks: int, sizes: Sizes) -> int:
    """Scalars that a forward and its backward gather at stage 3.

    A parameter is kept where it is read again before `stage3_max_reuse_distance` others. Backward runs the other way
    round, so of what forward reads last, half that distance is still there.
    """
    reused = zero.stage3_max_reuse_distance // 2
    in_forward = _padded((s for s in sizes.base + sizes.selected if not zero.is_persistent(s)), ranks)
    in_backward = in_forward - (0 if zero.is_persistent(sizes.forward_only) else sizes.forward_only)
    recomputed = sum(max(0, layer - reused) for layer in sizes.layers)
    return in_forward + max(0, in_backward - reused) + recomputed


@dataclass(frozen=True)
class Holding:
    """Something that a rank holds."""

    what: str
    bytes: int
    formula: str
    where: Literal["device", "host"] = "device"
    when: Literal["always", "backward", "step"] = "always"
    exact: bool = True


def states(zero: Zero, ranks: int, sizes: Sizes) -> list[Holding]:
    """What a rank holds of the model and the optimizer from the first step on: exact up to padding."""
    b, stage, n = sizes.scalar_bytes, zero.stage, sum(sizes.trained)
    selected = sum(sizes.selected)
    share = partition(zero, ranks, sizes)
    parameters = "host" if zero.offload_param and stage == 3 else "device"
    optimizer = "host" if zero.offload_optimizer and stage > 0 else "device"
    base, deltas = _replicated_or_cut(zero, ranks, sizes.base), _replicated_or_cut(zero, ranks, sizes.selected)
    cut = "/ N" if stage == 3 else ""
    held = [
        Holding("weights", base[0] * b, f"W * b {cut}".strip(), where=parameters),
        Holding("deltas", deltas[0] * b, f"selected * b {cut}".strip(), where=parameters),
        Holding("buffers", sizes.buffer_bytes, "the base model's own"),
        Holding("originals", selected * b, "selected * b"),
        Holding("indices", sizes.index_bytes, "4 * selected / granularity, or 0: sparse.indices"),
    ]
    if whole := base[1] + deltas[1]:
        held.append(Holding("persistent", whole * b, "parameters of at most the persistence threshold * b"))
    # DeepSpeed does not copy float32 parameters where it partitions nothing
    if stage > 0 or b < MASTER:
        held.append(Holding("master", MASTER * share, f"4 * n{_slash(stage)}", where=optimizer))
    held.append(Holding("moments", MOMENTS * share, f"8 * n{_slash(stage)}", where=optimizer))
    if stage == 3:
        held.append(Holding("gradients", share * b, "n * b / N", where=optimizer))
        if zero.contiguous_gradients:
            held.append(Holding("buckets", zero.reduce_bucket_size * b, "reduce_bucket_size * b"))
    elif stage == 0:
        held.append(Holding("gradients", n * b, "n * b"))
    if optimizer == "host":
        held.append(Holding("host gradients", MASTER * share, "4 * n / N", where="host"))
    return held


def passing(zero: Zero, ranks: int, sizes: Sizes) -> list[Holding]:
    """What a rank holds for a moment in backward, or in the optimizer's step, apart from activations: estimates, but
    for the buckets."""
    b, stage, n = sizes.scalar_bytes, zero.stage, sum(sizes.trained)
    share = partition(zero, ranks, sizes)
    found = []
    if stage in (1, 2):
        if zero.contiguous_gradients:
            buckets = 2 if zero.overlaps else 1
            size, formula = buckets * zero.reduce_bucket_size * b, f"{buckets} * reduce_bucket_size * b"
            found.append(Holding("buckets", size, formula, when="backward"))
        kept, formula = (n, "n * b") if stage == 1 else (share, "n * b / N")
        found.append(Holding("gradients", kept * b, formula, when="backward", exact=False))
        found.append(Holding("gradients", kept * b, formula, when="step", exact=False))
    elif stage == 0:
        found.append(Holding("flat gradients", n * b, "n * b", when="step", exact=False))
    else:
        live, formula = _live(zero, sizes)
        found.append(Holding("gathered", live * b, formula, when="backward", exact=False))
    if stage > 0 and zero.offload_optimizer:
        found.append(Holding("gradient on its way", max(sizes.trained) * b, "largest * b", exact=False))
    elif stage > 0 or b < MASTER:
        # Of float32 gradients too: the partition is put together from pieces
        found.append(Holding("float32 gradients", MASTER * share, f"4 * n{_slash(stage)}", when="step", exact=False))
    return found


def _live(zero: Zero, sizes: Sizes) -> tuple[int, str]:
    """Scalars of the base that stage 3 keeps gathered at once, at most."""
    everything = sum(s for s in sizes.base + sizes.selected if not zero.is_persistent(s))
    most = max(zero.stage3_max_live_parameters, zero.stage3_max_reuse_distance // 2)
    bound = most + max(sizes.base) + zero.stage3_prefetch_bucket_size
    return min(everything, bound), "(max_live_parameters + largest + prefetch bucket) * b, at most W * b"


def partition(zero: Zero, ranks: int, sizes: Sizes) -> int:
    """Trained scalars of which a rank holds the optimizer's state, padding included."""
    n = sum(sizes.trained)
    if zero.stage == 0:
        return n
    if zero.stage == 3:
        return _padded(sizes.trained, ranks) // ranks
    return -(-n // (ALIGNMENT * ranks)) * ALIGNMENT


def _replicated_or_cut(zero: Zero, ranks: int, parameters: Iterable[int]) -> tuple[int, int]:
    """Scalars that a rank holds of some parameters: its share of each, and what stage 3 keeps whole beside that."""
    parameters = tuple(parameters)
    if zero.stage < 3:
        return sum(parameters), 0
    return _padded(parameters, ranks) // ranks, sum(filter(zero.is_persistent, parameters))


def _padded(parameters: Iterable[int], ranks: int) -> int:
    """Stage 3 cuts each parameter into `ranks` equal pieces."""
    return sum(-(-size // ranks) * ranks for size in parameters)


def _slash(stage: int) -> str:
    return " / N" if stage > 0 else ""
