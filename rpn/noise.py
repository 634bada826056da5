"""Random Position Noise (arXiv 2212.05961, section III), at a cost that depends on the moved scalars only.

Pure functions. Each scalar of the embedding output E is selected with probability p. A random permutation pi of all
positions gives the targets of the values: E'[q] = E[pi(q)] if pi(q) is selected, else E[q]. The number of overwritten
positions equals the number of selected scalars. Excluded tokens (padding and, on request, special tokens) are neither
sources nor targets.

The permutation is not computed as a whole, only for the selected scalars.
- Sources. A token of `hidden` scalars has Binomial(hidden, p) selected ones, as with independent choices. They are
  that many consecutive entries of a shuffled, circular list of channels, from a random start for each token.
- Targets. A keyed bijection of the grid tokens x channels: a Feistel network with the token and the channel as its two
  halves (Luby and Rackoff, 1988, with additions modulo tokens and modulo hidden). It is a bijection on grids of any
  size, without rejections or cycle walking. Each half has few values, so the round functions are small tables, and a
  round costs one lookup and one addition per moved scalar. A hash of each moved scalar would take about thirty passes
  over 64-bit numbers, and a full permutation would process all batch * length * hidden scalars.
All random numbers are integer hashes of (stream key, counter) and do not come from a generator: the positions are the
same on CPU and GPU. On an NVIDIA GPU, Triton kernels (rpn.triton_kernels) compute the positions and move the values in
one pass. `python benchmarks/noise.py` compares the speed with the full permutation.
"""

import functools
import importlib.util
import math

import torch
from torch import Tensor

from rpn.streams import Groups, Stream, integers, mix, uniforms

# The purposes of random numbers. Each has its own counters or keys.
_COUNT, _CIRCLE_START, _CIRCLE_TURN, _INNER_CIRCLE, _OUTER_CIRCLE, _LAST_LABELS, _ROUND = range(7)


def move_scalars(embeddings: Tensor, keep: Tensor, stream: Stream, *, probability: float) -> Tensor:
    """Move the values of randomly selected scalars to random positions of their group.

    Args:
        embeddings: (batch, length, hidden), any float dtype; not modified.
        keep: bool (batch, length), False where no noise is allowed.
        stream: the random stream, whose scope defines the groups.
        probability: probability that a scalar is selected (p).

    Returns:
        (batch, length, hidden). The gradient of a moved value flows to its original position.
    """
    groups, hidden = stream.groups(keep), embeddings.shape[-1]
    if _has_kernels(embeddings.device) and not torch.compiler.is_compiling():
        from rpn import triton_kernels

        distribution = _binomial_distribution(hidden, probability, embeddings.device)
        return _MoveOnGPU.apply(embeddings, False, *triton_kernels.draw(groups, hidden, distribution))
    return _Move.apply(embeddings, *random_positions(groups, hidden, probability))


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels can run on a device."""
    if device.type != "cuda" or torch.version.hip or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


class _Move(torch.autograd.Function):
    """Copies the values at `sources` to `targets` in the flattened embeddings. No index occurs twice in either.

    torch's own index_select and index_copy have the same gradient, but pass over all scalars twice as often.
    """

    @staticmethod
    def forward(ctx, embeddings: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(sources, targets)
        moved = embeddings.clone(memory_format=torch.contiguous_format)
        values = embeddings.reshape(-1).index_select(0, sources)
        moved.view(-1).scatter_(0, targets.long(), values)
        return moved

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        sources, targets = ctx.saved_tensors
        grad = grad_output.clone(memory_format=torch.contiguous_format)
        flat = grad.view(-1)
        moved = flat.index_select(0, targets)
        # Overwritten values do not affect the loss. Moved values affect it at their targets.
        flat.scatter_(0, targets.long(), 0).index_add_(0, sources, moved)
        return grad, None, None


class _MoveOnGPU(torch.autograd.Function):
    """The same by kernels that compute the positions, in backward again: they are not kept."""

    @staticmethod
    def forward(ctx, values: Tensor, is_backward: bool, *drawn: Tensor) -> Tensor:
        from rpn import triton_kernels

        ctx.is_backward = is_backward
        ctx.save_for_backward(*drawn)
        move = triton_kernels.move_back if is_backward else triton_kernels.move
        return move(values, triton_kernels.Draw(*drawn))

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        # Both directions are linear, each the transpose of the other
        drawn = ctx.saved_tensors
        return _MoveOnGPU.apply(grad_output, not ctx.is_backward, *drawn), None, *(None for _ in drawn)


def random_positions(groups: Groups, hidden: int, probability: float) -> tuple[Tensor, Tensor]:
    """Select scalars and draw a target for each of them, within its group.

    Returns:
        sources, targets: (selected,) each, indices into the flattened (batch * length * hidden) embeddings, in int32
            if the indices fit, else in int64. No index occurs twice in either.
    """
    token, channel = select(groups, hidden, probability)
    return flat_positions(groups, hidden, token, channel), shuffle(groups, hidden, token, channel)


def select(groups: Groups, hidden: int, probability: float) -> tuple[Tensor, Tensor]:
    """Select each scalar with `probability`.

    Returns:
        token, channel: int32 (selected,) each. Tokens are indices into groups.rows, in ascending order.
    """
    device = groups.rows.device
    group = groups.index_of_rows()
    key = groups.keys[group]
    # Counted within the group, so that the selection does not depend on the example's row in its micro-batch
    local_token = torch.arange(len(group), device=device) - groups.starts()[group]
    count = _binomial(uniforms(mix(key, _COUNT), local_token), hidden, probability)
    start = integers(mix(key, _CIRCLE_START), local_token, hidden)
    turn = integers(mix(key, _CIRCLE_TURN), local_token, hidden)

    last = count.cumsum(0)
    total = int(last[-1]) if len(last) else 0
    token = torch.arange(len(group), device=device, dtype=torch.int32).repeat_interleave(count, output_size=total)
    slot = torch.arange(total, device=device, dtype=torch.int32)
    slot += _look_up((start - last + count).int(), token)
    # Two circular lists with a random rotation between them: with only one, tokens with close starts would select
    # similar channels. Each list is repeated, so that indices need no modulo.
    inner = _shuffled_channels(groups, hidden, _INNER_CIRCLE).repeat(2)
    outer = _shuffled_channels(groups, hidden, _OUTER_CIRCLE).repeat(2)
    return token, _look_up(outer, _look_up(inner, slot).add_(_look_up(turn.int(), token)))


def flat_positions(groups: Groups, hidden: int, token: Tensor, channel: Tensor) -> Tensor:
    """The index of each (token, channel) in the flattened embeddings, in the dtype of `random_positions`."""
    return _look_up(_starts_of_rows(groups, groups.rows, hidden), token).add_(channel)


def shuffle(groups: Groups, hidden: int, token: Tensor, channel: Tensor) -> Tensor:
    """Evaluate a random permutation of each group's positions at the selected scalars.

    There are four Feistel rounds: token += f(channel) and channel += f(token), twice. Then the channels are permuted,
    because in groups of few tokens the rounds alone would rotate the channels and not shuffle them. The sums are not
    reduced modulo tokens or hidden: every table is repeated three times, which covers the largest sums, and the last
    lookup of each half does the reduction. So a group of n tokens has 3 * n entries in a table over tokens and
    3 * hidden entries in a table over channels.

    Args:
        token, channel: int32 (selected,) each, as from `select`.

    Returns:
        The targets: (selected,), indices into the flattened (batch * length * hidden) embeddings.
    """
    device = groups.rows.device
    group = groups.index_of_rows()
    number_of_groups = len(groups.lengths)
    tripled = torch.arange(number_of_groups, device=device).repeat_interleave(
        3 * groups.lengths, output_size=3 * len(group)
    )
    unrolled_token = torch.arange(len(tripled), device=device) - 3 * groups.starts()[tripled]
    folded_token = unrolled_token % groups.lengths[tripled]
    columns = torch.arange(hidden, device=device)

    def shift_by_channel(round_: int) -> Tensor:
        keys = mix(groups.keys, _ROUND + round_)[:, None]
        return integers(keys, columns, groups.lengths[:, None]).int().repeat(1, 3).flatten()

    def shift_by_token(round_: int) -> Tensor:
        keys = mix(groups.keys, _ROUND + round_)
        return integers(keys[tripled], folded_token, hidden).int()

    at_token = _look_up((torch.arange(len(group), device=device) + 2 * groups.starts()[group]).int(), token)
    at_channel = channel.clone()
    if number_of_groups > 1:
        at_channel += _look_up((group * 3 * hidden).int(), token)
    for round_ in (0, 2):
        at_token += _look_up(shift_by_channel(round_), at_channel)
        at_channel += _look_up(shift_by_token(round_ + 1), at_token)
    start_of_row = _starts_of_rows(groups, groups.rows[groups.starts()[tripled] + folded_token], hidden)
    channel_label = _shuffled_channels(groups, hidden, _LAST_LABELS).repeat(3 * number_of_groups)
    return _look_up(start_of_row, at_token).add_(_look_up(channel_label, at_channel))


def _starts_of_rows(groups: Groups, rows: Tensor, hidden: int) -> Tensor:
    # int32 if the indices fit: the size of intermediate results determines most of the cost
    return (rows * hidden).to(torch.int32 if groups.tokens * hidden < 2**31 else torch.int64)


def _shuffled_channels(groups: Groups, hidden: int, purpose: int) -> Tensor:
    """int32 (hidden,): a random permutation of the channels, the same for all groups."""
    key = mix(torch.tensor(groups.common_key), purpose).to(groups.rows.device)
    return mix(key, torch.arange(hidden, device=key.device)).argsort(stable=True).int()


def _binomial(uniform: Tensor, trials: int, probability: float) -> Tensor:
    """int64: binomial random numbers from uniform ones, by the inverse of the distribution function."""
    distribution = _binomial_distribution(trials, probability, uniform.device)
    return torch.searchsorted(distribution, uniform, right=True).clamp_(max=trials)


@functools.lru_cache(maxsize=8)
def _binomial_distribution(trials: int, probability: float, device: torch.device) -> Tensor:
    """float64 (trials + 1,): P(at most i successes), computed on the CPU so that it is the same for all devices."""
    if probability == 1:
        certain = torch.cat([torch.zeros(trials, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
        return certain.to(device)
    log_factorial = [math.lgamma(i + 1) for i in range(trials + 1)]
    log_density = [
        log_factorial[trials]
        - log_factorial[i]
        - log_factorial[trials - i]
        + i * math.log(probability)
        + (trials - i) * math.log1p(-probability)
        for i in range(trials + 1)
    ]
    return torch.tensor(log_density, dtype=torch.float64).exp().cumsum(0).to(device)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    # On a CPU, with 1-D int32 tensors, index_select is several times faster than torch's other indexing functions
    return table.index_select(0, index)
