"""Random Position Noise on a GPU: Triton kernels that draw the positions of rpn.noise and move the values at once.

Neither the positions nor tables of random numbers are stored: each program computes them with the same integer hashes
as rpn.noise, so they are the same bit for bit, and backward computes them again. Only the three permutations of the
channels are made before, by a kernel that counts for each channel how many have a smaller hash.

A program takes one token at a time. Its selected scalars are distributed over the lanes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpn.streams import Groups

SLOTS = 128
"""Number of selected scalars of a token that are computed together."""

CHANNELS, OTHERS = 32, 128
"""Each program compares CHANNELS channels with OTHERS others at a time."""

BOUNDS = 512
"""Number of bounds of the binomial distribution that a number is compared with at a time."""

MOVE, CLEAR, ADD = range(3)
"""What `_move_kernel` does: copy a value to its target, set the target to zero, or add the target's gradient to the
source."""


class Draw(NamedTuple):
    """What the positions of a forward depend on. Small: hidden and token counts only."""

    circles: Tensor
    """int32 (3, hidden): the inner circle, the outer circle and the last labels of the channels."""
    distribution: Tensor
    """float64 (hidden + 1,): P(at most i selected channels)."""
    rows: Tensor
    lengths: Tensor
    starts: Tensor
    keys: Tensor


def draw(groups: Groups, hidden: int, distribution: Tensor) -> Draw:
    """Args: distribution: float64 (hidden + 1,) on the device, as of `rpn.noise`."""
    circles = torch.empty(3, hidden, dtype=torch.int32, device=groups.rows.device)
    with torch.cuda.device_of(circles):
        _circles_kernel[(3, triton.cdiv(hidden, CHANNELS))](
            circles, groups.common_key, hidden, CHANNELS=CHANNELS, OTHERS=OTHERS
        )
    return Draw(circles, distribution, groups.rows, groups.lengths, groups.starts(), groups.keys)


def move(values: Tensor, drawn: Draw) -> Tensor:
    """Args: values (batch, length, hidden), any float dtype. Returns: a copy in which the drawn scalars have moved."""
    values = values.contiguous()
    result = values.clone()
    _launch(values, result, drawn, MOVE)
    return result


def move_back(gradient: Tensor, drawn: Draw) -> Tensor:
    """Args: gradient (batch, length, hidden), that of the result of `move`. Returns: that of its argument."""
    gradient = gradient.contiguous()
    result = gradient.clone()
    # Two launches: a source may be another one's target, which must be cleared before
    _launch(gradient, result, drawn, CLEAR)
    _launch(gradient, result, drawn, ADD)
    return result


def _launch(values: Tensor, result: Tensor, drawn: Draw, step: int) -> None:
    hidden, tokens, groups = values.shape[-1], len(drawn.rows), len(drawn.lengths)
    if not tokens:
        return
    programs = triton.cdiv(tokens, groups)
    with torch.cuda.device_of(values):
        _move_kernel[(groups * programs,)](
            values, result, *drawn, hidden, programs,
            STEP=step, SLOTS=SLOTS, BOUNDS=BOUNDS,
            SUM=tl.float64 if values.dtype == torch.float64 else tl.float32,
        )  # fmt: skip


@triton.jit
def _mix(key, counter):
    """rpn.streams.mix: a 64-bit hash. Both uint64."""
    x = key + counter * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _integers(key, counter, bound):
    """rpn.streams.integers: int32 in [0, bound), for int32 counters and bounds."""
    number = (_mix(key, counter.to(tl.uint64)) >> 32) * bound.to(tl.uint64)
    return (number >> 32).to(tl.int32)


@triton.jit
def _wrapped(number, bound):
    return tl.where(number >= bound, number - bound, number)


@triton.jit(do_not_specialize=["common_key"])
def _circles_kernel(circles, common_key, hidden, CHANNELS: tl.constexpr, OTHERS: tl.constexpr):
    """A permutation of the channels by their hashes, as argsort gives it, for each of the purposes 3, 4 and 5."""
    circle = tl.program_id(0)
    key = _mix(tl.cast(common_key, tl.uint64), (circle + 3).to(tl.uint64))
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    own = _mix(key, channel.to(tl.uint64)).to(tl.int64, bitcast=True)[:, None]
    rank = tl.full((CHANNELS,), 0, tl.int32)
    for first in range(0, hidden, OTHERS):
        other = first + tl.arange(0, OTHERS)
        theirs = _mix(key, other.to(tl.uint64)).to(tl.int64, bitcast=True)[None, :]
        is_before = (theirs < own) | ((theirs == own) & (other[None, :] < channel[:, None]))
        rank += tl.sum((is_before & (other < hidden)[None, :]).to(tl.int32), axis=1)
    tl.store(circles + circle * hidden + rank, channel, mask=channel < hidden)


@triton.jit
def _move_kernel(
    values, result, circles, distribution, rows, lengths, starts, keys, hidden, programs,
    STEP: tl.constexpr, SLOTS: tl.constexpr, BOUNDS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) // programs
    tokens = tl.load(lengths + group).to(tl.int32)
    first = tl.load(starts + group)
    key = tl.load(keys + group).to(tl.uint64, bitcast=True)
    for number in range(tl.program_id(0) % programs, tokens, programs):
        token = tl.cast(number, tl.int32)
        row = tl.load(rows + first + token) * hidden
        # The purposes of rpn.noise: 0 the number of selected channels, 1 and 2 where they begin on the two circles
        uniform = (_mix(_mix(key, tl.cast(0, tl.uint64)), token.to(tl.uint64)) >> 11).to(tl.float64)
        uniform *= 1.1102230246251565e-16  # 2**-53
        count = 0
        for begin in range(0, hidden + 1, BOUNDS):
            bound = begin + tl.arange(0, BOUNDS)
            below = tl.load(distribution + bound, mask=bound <= hidden, other=2.0) <= uniform
            count += tl.sum(below.to(tl.int32), axis=0)
        count = tl.minimum(count, hidden)
        start = _integers(_mix(key, tl.cast(1, tl.uint64)), token, tl.cast(hidden, tl.int32))
        turn = _integers(_mix(key, tl.cast(2, tl.uint64)), token, tl.cast(hidden, tl.int32))
        for begin in range(0, count, SLOTS):
            slot = begin + tl.arange(0, SLOTS)
            inside = slot < count
            inner = tl.load(circles + _wrapped(tl.where(inside, start + slot, 0), hidden))
            channel = tl.load(circles + hidden + _wrapped(inner + turn, hidden))
            target = _target(key, token, channel, tokens, hidden, circles, rows + first)
            source = row + channel
            if STEP == 0:
                tl.store(result + target, tl.load(values + source, mask=inside), mask=inside)
            if STEP == 1:
                tl.store(result + target, tl.full((SLOTS,), 0.0, result.dtype.element_ty), mask=inside)
            if STEP == 2:
                own = tl.load(result + source, mask=inside).to(SUM)
                total = own + tl.load(values + target, mask=inside).to(SUM)
                tl.store(result + source, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _target(key, token, channel, tokens, hidden, circles, rows):
    """The four Feistel rounds of rpn.noise.shuffle, purposes 6 to 9, and the last permutation of the channels."""
    bound = tl.cast(tokens, tl.int32)
    width = tl.cast(hidden, tl.int32)
    token = _wrapped(token + _integers(_mix(key, tl.cast(6, tl.uint64)), channel, bound), bound)
    channel = _wrapped(channel + _integers(_mix(key, tl.cast(7, tl.uint64)), token, width), width)
    token = _wrapped(token + _integers(_mix(key, tl.cast(8, tl.uint64)), channel, bound), bound)
    channel = _wrapped(channel + _integers(_mix(key, tl.cast(9, tl.uint64)), token, width), width)
    return tl.load(rows + token) * hidden + tl.load(circles + 2 * hidden + channel)
