"""Random Position Noise (arXiv 2212.05961, section III) at the cost of the scalars that move. Pure functions.

Each scalar of the embedding output E is selected with probability p; a random permutation pi of all positions says
where values go: E'[q] = E[pi(q)] if pi(q) is selected, else E[q]. As many positions are overwritten as scalars are
selected. Tokens that are left out (padding; special tokens on request) are neither source nor target.

pi is never written out: only the targets of the selected scalars are computed.
- Sources. A token of `hidden` scalars has Binomial(hidden, p) selected ones, which is what independent choices give;
  they are that many consecutive slots of a shuffled circle of channels, at a start drawn for the token.
- Targets. A keyed bijection of the grid tokens x channels, a Feistel network whose two halves are the token and the
  channel (the alternation of Luby and Rackoff, 1988, over additions modulo tokens and modulo hidden). It is exact on
  grids of any size, so nothing is drawn twice and nothing walks in cycles; and since a half takes few values, its
  round functions are small tables and a round costs one look-up and one addition per moved scalar. Hashing each moved
  scalar instead takes about thirty passes over 64-bit numbers; permuting everything costs all B*T*H scalars.
All draws are integer hashes of (stream key, counter), not a generator's: the same positions on CPU and GPU.
`python benchmarks/noise.py` measures it against the full permutation.
"""

import functools
import math

import torch
from torch import Tensor

from rpn.streams import Groups, Stream, integers, mix, uniforms

# The purposes that draws are for: each has counters or keys of its own.
_COUNT, _CIRCLE_START, _CIRCLE_TURN, _INNER_CIRCLE, _OUTER_CIRCLE, _LAST_LABELS, _ROUND = range(7)


def move_scalars(embeddings: Tensor, keep: Tensor, stream: Stream, *, probability: float) -> Tensor:
    """Sends the values of randomly selected scalars to random positions of their group.

    embeddings: (batch, length, hidden), any float dtype; it is not modified. keep: bool (batch, length).
    Returns: (batch, length, hidden); the gradient of a moved value goes to the position that it came from.
    """
    sources, targets = random_positions(stream.groups(keep), embeddings.shape[-1], probability)
    return _Move.apply(embeddings, sources, targets)


class _Move(torch.autograd.Function):
    """embeddings.flatten() with the values at `sources` copied to `targets`, in which no index occurs twice.

    torch's own index_select and index_copy give the same gradient with twice the passes over B*T*H scalars.
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
        # overwritten values reach the loss no more; the moved ones reach it from where they went
        flat.scatter_(0, targets.long(), 0).index_add_(0, sources, moved)
        return grad, None, None


def random_positions(groups: Groups, hidden: int, probability: float) -> tuple[Tensor, Tensor]:
    """The selected scalars of `groups` and where each goes, within its own group.

    Returns: sources and targets, (selected,) each, indices into the flattened (batch * length * hidden) embeddings,
    int32 where that is enough; no index occurs twice in the one or in the other.
    """
    token, channel = select(groups, hidden, probability)
    return flat_positions(groups, hidden, token, channel), shuffle(groups, hidden, token, channel)


def select(groups: Groups, hidden: int, probability: float) -> tuple[Tensor, Tensor]:
    """Selects each scalar with `probability`.

    Returns: token, channel, int32 (selected,): the token as an index into groups.rows, in ascending order.
    """
    device = groups.rows.device
    group = groups.index_of_rows()
    key = groups.keys[group]
    # counted within the group: an example draws the same wherever its micro-batch puts it
    local_token = torch.arange(len(group), device=device) - groups.starts()[group]
    count = _binomial(uniforms(mix(key, _COUNT), local_token), hidden, probability)
    start = integers(mix(key, _CIRCLE_START), local_token, hidden)
    turn = integers(mix(key, _CIRCLE_TURN), local_token, hidden)

    last = count.cumsum(0)
    total = int(last[-1]) if len(last) else 0
    token = torch.arange(len(group), device=device, dtype=torch.int32).repeat_interleave(count, output_size=total)
    slot = torch.arange(total, device=device, dtype=torch.int32)
    slot += _look_up((start - last + count).int(), token)
    # two circles, turned against each other: with one, tokens whose starts are close would select alike;
    # each lies there twice, so that no index needs a modulo
    inner = _shuffled_channels(groups, hidden, _INNER_CIRCLE).repeat(2)
    outer = _shuffled_channels(groups, hidden, _OUTER_CIRCLE).repeat(2)
    return token, _look_up(outer, _look_up(inner, slot).add_(_look_up(turn.int(), token)))


def flat_positions(groups: Groups, hidden: int, token: Tensor, channel: Tensor) -> Tensor:
    """The index of each (token, channel) in the flattened embeddings, as `random_positions` returns them."""
    return _look_up(_starts_of_rows(groups, groups.rows, hidden), token).add_(channel)


def shuffle(groups: Groups, hidden: int, token: Tensor, channel: Tensor) -> Tensor:
    """A random permutation of each group's positions, evaluated at (token, channel), int32 (selected,) each.

    Returns: the targets, (selected,), indices into the flattened (batch * length * hidden) embeddings.
    Four Feistel rounds: token += f(channel), channel += f(token), twice; then the channels get new labels, since in
    groups of few tokens the rounds alone would turn the channels rather than shuffle them. Sums are not reduced: every
    table repeats three times, as far as a sum reaches, and the last look-up of each half folds it back. A group of n
    tokens has 3 * n entries in a table over tokens, and 3 * hidden in a table over channels.
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
    # int32 wherever it reaches: the bytes of the intermediate results are most of the cost
    return (rows * hidden).to(torch.int32 if groups.tokens * hidden < 2**31 else torch.int64)


def _shuffled_channels(groups: Groups, hidden: int, purpose: int) -> Tensor:
    """int32 (hidden,): a random permutation of the channels, the same for all groups."""
    key = mix(torch.tensor(groups.common_key), purpose).to(groups.rows.device)
    return mix(key, torch.arange(hidden, device=key.device)).argsort(stable=True).int()


def _binomial(uniform: Tensor, trials: int, probability: float) -> Tensor:
    """int64: the number of successes that each uniform draw stands for (inverse of the distribution function)."""
    distribution = _binomial_distribution(trials, probability).to(uniform.device)
    return torch.searchsorted(distribution, uniform, right=True).clamp_(max=trials)


@functools.lru_cache(maxsize=8)
def _binomial_distribution(trials: int, probability: float) -> Tensor:
    """float64 (trials + 1,): P(at most i successes), made on the CPU so that every device compares with the same."""
    if probability == 1:
        return torch.cat([torch.zeros(trials, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    log_factorial = [math.lgamma(i + 1) for i in range(trials + 1)]
    log_density = [
        log_factorial[trials]
        - log_factorial[i]
        - log_factorial[trials - i]
        + i * math.log(probability)
        + (trials - i) * math.log1p(-probability)
        for i in range(trials + 1)
    ]
    return torch.tensor(log_density, dtype=torch.float64).exp().cumsum(0)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    # of torch's ways to index, several times the fastest on the CPU where both are 1-D int32
    return table.index_select(0, index)
