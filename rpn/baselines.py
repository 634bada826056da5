"""The noises with which Random Position Noise is compared. Their arguments are those of a custom noise function:

    embeddings  (batch, length, hidden), any float dtype; not modified
    keep        bool (batch, length), False where no noise is allowed
    stream      rpn.streams.Stream
    returns     (batch, length, hidden)

Gaussian and uniform numbers are drawn by torch's generators, seeded by the keys of the stream: they repeat exactly on
one kind of device, but differ between CPU and GPU. With scope "sequence" they are the same for any padding and any
number of ranks.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rpn.noise import flat_positions, select
from rpn.streams import Groups, Stream, mix

# Separates the random choice between salt and pepper from the random numbers of rpn.noise
_SALT = 1 << 32


def gaussian(embeddings: Tensor, keep: Tensor, stream: Stream, *, std: float) -> Tensor:
    """Add N(0, std^2) to every scalar (the first baseline of arXiv 2212.05961)."""
    groups = stream.groups(keep)
    noise = _draw(groups, embeddings.shape[-1], lambda part, generator: part.normal_(0, std, generator=generator))
    return _add(embeddings, groups, noise)


def salt_and_pepper(embeddings: Tensor, keep: Tensor, stream: Stream, *, probability: float) -> Tensor:
    """Overwrite each scalar with `probability`: with 0 (pepper) or the largest value of its group (salt), half each.

    This is the second baseline of arXiv 2212.05961, with the two values of the authors' code. A group is the
    micro-batch or the example, according to the stream's scope. Overwritten scalars have no gradient.
    """
    groups = stream.groups(keep)
    hidden = embeddings.shape[-1]
    token, channel = select(groups, hidden, probability)
    positions = flat_positions(groups, hidden, token, channel).long()
    group = groups.index_of_rows()
    largest_of_row = embeddings.detach().reshape(-1, hidden).amax(1)[groups.rows]
    largest = largest_of_row.new_zeros(len(groups.lengths)).scatter_reduce_(
        0, group, largest_of_row, "amax", include_self=False
    )
    local_token = torch.arange(len(group), device=group.device) - groups.starts()[group]
    is_salt = mix(mix(groups.keys[group] + _SALT, local_token)[token], channel.long()) & 1
    flat = embeddings.reshape(-1)
    return flat.scatter(0, positions, largest[group][token] * is_salt).view_as(embeddings)


def neftune(embeddings: Tensor, keep: Tensor, stream: Stream, *, alpha: float) -> Tensor:
    """Add uniform noise in +-alpha / sqrt(L * hidden) for L tokens with noise in the example (arXiv 2310.05914)."""
    groups = stream.groups(keep, per_example=True)
    return _add(embeddings, groups, _scaled_uniform(groups, embeddings.shape[-1], alpha))


def symnoise(embeddings: Tensor, keep: Tensor, stream: Stream, *, alpha: float) -> Tensor:
    """Add +-alpha / sqrt(L * hidden) with random signs for L tokens with noise in the example (arXiv 2312.01523).

    Passes 2k and 2k + 1 have opposite signs, so with two passes and no clean one the losses are those of the paper.
    """
    even = replace(stream, pass_index=stream.pass_index - stream.pass_index % 2)
    groups = even.groups(keep, per_example=True)

    def fill(part: Tensor, generator: torch.Generator):
        bound = alpha / math.sqrt(part.numel())
        part.bernoulli_(0.5, generator=generator).mul_(2 * bound).sub_(bound)

    noise = _draw(groups, embeddings.shape[-1], fill)
    return _add(embeddings, groups, -noise if stream.pass_index % 2 else noise)


class FreeLB:
    """Adversarial perturbations, algorithm 1 of arXiv 1909.11764. Keeps the perturbation between the passes of a step.

    Pass 0 draws delta uniformly in +-radius / sqrt(L * hidden). Each later pass moves it by `step` along the gradient
    of the previous pass, and then projects it onto the ball of `radius`. Both norms are computed over the tokens with
    noise of an example. Unlike in the paper, dropout masks differ between the passes.
    """

    def __init__(self, step: float, radius: float):
        self.step, self.radius = step, radius
        self.delta: Tensor | None = None

    def __call__(self, embeddings: Tensor, keep: Tensor, stream: Stream) -> Tensor:
        """Add the perturbation to the embeddings.

        Raises:
            RuntimeError: in a pass after the first, if the previous pass left no gradient.
        """
        groups = stream.groups(keep, per_example=True)
        hidden = embeddings.shape[-1]
        if stream.pass_index == 0:
            delta = _scaled_uniform(groups, hidden, self.radius)
        else:
            delta = self._ascended(groups, hidden, stream.pass_index)
        self.delta = delta.requires_grad_()
        return _add(embeddings, groups, self.delta)

    def _ascended(self, groups: Groups, hidden: int, pass_index: int) -> Tensor:
        if self.delta is None or self.delta.grad is None or self.delta.shape != (len(groups.rows), hidden):
            raise RuntimeError(
                f"freelb: pass {pass_index} needs the gradient of pass {pass_index - 1} on the same micro-batch; "
                "run one forward of the model, then its backward, in each pass (rpn.run_passes does)"
            )
        gradient = self.delta.grad
        norm = _norm_of_groups(gradient, groups)
        # With an overflow of fp16 loss scaling (norm inf or nan) there is no direction: the perturbation stays the
        # same
        stride = torch.where(norm > 0, self.step / norm, 0)
        delta = self.delta.detach() + stride * gradient.nan_to_num(0, 0, 0)
        return delta * (self.radius / _norm_of_groups(delta, groups).clamp(min=self.radius))


def _norm_of_groups(values: Tensor, groups: Groups) -> Tensor:
    """The norm of each group's part of `values` (tokens, hidden), repeated for each of its tokens: (tokens, 1)."""
    norms = [part.norm() for part in values.split(groups.lengths.tolist())]
    return torch.stack(norms)[groups.index_of_rows(), None] if norms else values.new_zeros(0, 1)


def _scaled_uniform(groups: Groups, hidden: int, scale: float) -> Tensor:
    """float32 (tokens, hidden): uniform in +-scale / sqrt(tokens of the group * hidden)."""

    def fill(part: Tensor, generator: torch.Generator):
        bound = scale / math.sqrt(part.numel())
        part.uniform_(-bound, bound, generator=generator)

    return _draw(groups, hidden, fill)


def _draw(groups: Groups, hidden: int, fill: Callable[[Tensor, torch.Generator], object]) -> Tensor:
    """float32 (tokens, hidden). `fill` draws each group's part, with a generator that is seeded by the group's key."""
    values = torch.empty(len(groups.rows), hidden, device=groups.rows.device)
    generator = torch.Generator(values.device)
    for key, part in zip(groups.keys.tolist(), values.split(groups.lengths.tolist()), strict=True):
        fill(part, generator.manual_seed(key))
    return values


def _add(embeddings: Tensor, groups: Groups, noise: Tensor) -> Tensor:
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    return flat.index_add(0, groups.rows, noise.to(embeddings.dtype)).view_as(embeddings)
