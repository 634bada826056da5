"""The noises with which RPN is compared: their definitions, which tokens they change, and their random streams."""

import functools
import math

import pytest
import torch

from rpn.baselines import FreeLB, gaussian, neftune, salt_and_pepper, symnoise
from rpn.streams import Stream

HIDDEN = 64
LENGTHS = (20, 7, 0, 1)
KEEP = torch.arange(20) < torch.tensor(LENGTHS)[:, None]
NOISES = {
    "gaussian": functools.partial(gaussian, std=0.1),
    "salt-and-pepper": functools.partial(salt_and_pepper, probability=0.3),
    "neftune": functools.partial(neftune, alpha=5.0),
    "symnoise": functools.partial(symnoise, alpha=5.0),
    "freelb": FreeLB(step=0.1, radius=0.5),
}


@pytest.fixture
def embeddings() -> torch.Tensor:
    return torch.randn(4, 20, HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("name", NOISES)
def test_changes_real_tokens_only_and_not_its_argument(name: str, scope: str, embeddings: torch.Tensor) -> None:
    before = embeddings.clone()
    disturbed = NOISES[name](embeddings, KEEP, Stream(scope=scope))
    assert torch.equal(embeddings, before)
    assert torch.equal(disturbed[~KEEP], embeddings[~KEEP])
    assert (disturbed[KEEP] != embeddings[KEEP]).any(1).all()


@pytest.mark.parametrize("name", NOISES)
def test_keeps_the_dtype(name: str, embeddings: torch.Tensor) -> None:
    disturbed = NOISES[name](embeddings.bfloat16(), KEEP, Stream())
    assert disturbed.dtype == torch.bfloat16
    assert not torch.equal(disturbed, embeddings.bfloat16())


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("keep", [torch.zeros(2, 3, dtype=torch.bool), torch.ones(0, 3, dtype=torch.bool)])
def test_accepts_a_batch_of_padding(name: str, keep: torch.Tensor) -> None:
    embeddings = torch.randn(*keep.shape, HIDDEN)
    assert torch.equal(NOISES[name](embeddings, keep, Stream()), embeddings)


@pytest.mark.parametrize("name", NOISES)
def test_sequence_scope_does_not_depend_on_ranks_or_padding(name: str, embeddings: torch.Tensor) -> None:
    whole = NOISES[name](embeddings, KEEP, Stream(step=2, scope="sequence"))
    stream = Stream(step=2, rank=1, world_size=4, scope="sequence")
    alone = NOISES[name](embeddings[1:2, :7], KEEP[1:2, :7], stream)
    torch.testing.assert_close(alone[0], whole[1, :7])


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_repeats_by_position_for_any_state_of_the_global_generator(
    name: str, scope: str, embeddings: torch.Tensor
) -> None:
    torch.manual_seed(0)
    first = NOISES[name](embeddings, KEEP, Stream(scope=scope))
    torch.manual_seed(1)
    assert torch.equal(NOISES[name](embeddings, KEEP, Stream(scope=scope)), first)
    for other in (Stream(scope=scope, step=1), Stream(scope=scope, rank=1, world_size=2), Stream(scope=scope, seed=1)):
        assert not torch.equal(NOISES[name](embeddings, KEEP, other)[1], first[1])


def test_gaussian_has_its_standard_deviation(embeddings: torch.Tensor) -> None:
    noise = (gaussian(embeddings, KEEP, Stream(), std=0.1) - embeddings)[KEEP]
    assert abs(noise.std() - 0.1) < 0.1 * 5 / math.sqrt(2 * noise.numel())
    assert abs(noise.mean()) < 0.1 * 5 / math.sqrt(noise.numel())


def test_salt_is_the_largest_value_and_pepper_is_zero(embeddings: torch.Tensor) -> None:
    noisy = {
        scope: salt_and_pepper(embeddings, KEEP, Stream(scope=scope), probability=0.3)
        for scope in ("batch", "sequence")
    }
    real = embeddings.masked_fill(~KEEP[:, :, None], -torch.inf)
    largest = {"batch": real.max().expand(4), "sequence": real.amax((1, 2))}
    for scope, disturbed in noisy.items():
        changed = disturbed != embeddings
        salt = disturbed == largest[scope][:, None, None]
        assert torch.equal(changed, changed & (salt | (disturbed == 0)))
        scalars = KEEP.sum() * HIDDEN
        assert abs(changed.sum() / scalars - 0.3) < 5 * math.sqrt(0.3 * 0.7 / scalars)
        assert abs((changed & salt).sum() / changed.sum() - 0.5) < 5 * 0.5 / math.sqrt(changed.sum())


def test_overwritten_scalars_have_no_gradient(embeddings: torch.Tensor) -> None:
    embeddings.requires_grad_()
    disturbed = salt_and_pepper(embeddings, KEEP, Stream(), probability=0.3)
    disturbed.sum().backward()
    assert torch.equal(embeddings.grad, (disturbed == embeddings).float())


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_neftune_is_scaled_by_the_real_length(scope: str, embeddings: torch.Tensor) -> None:
    noise = neftune(embeddings, KEEP, Stream(scope=scope), alpha=5.0) - embeddings
    for row, length in enumerate(LENGTHS):
        if length:
            bound = 5.0 / math.sqrt(length * HIDDEN)
            largest = noise[row, :length].abs().max()
            assert 0.85 * bound < largest <= bound + 1e-6


def ascend(noise: FreeLB, embeddings: torch.Tensor, slope: torch.Tensor, pass_index: int) -> torch.Tensor:
    """One pass under the loss (slope * embeddings).sum(); returns the perturbation."""
    disturbed = noise(embeddings, KEEP, Stream(pass_index=pass_index))
    (disturbed * slope).sum().backward()
    return (disturbed - embeddings).detach()


def test_freelb_moves_along_the_normalized_gradient_of_each_example(embeddings: torch.Tensor) -> None:
    noise = FreeLB(step=0.1, radius=100.0)
    slope = torch.randn(4, 20, HIDDEN) * torch.tensor([1.0, 1e3, 1.0, 1e-3])[:, None, None]
    first, second = (ascend(noise, embeddings, slope, k) for k in (0, 1))
    slope = slope * KEEP[:, :, None]
    norm = slope.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None]
    torch.testing.assert_close(second - first, 0.1 * slope / norm, atol=1e-5, rtol=1e-4)


def test_freelb_stays_within_its_radius(embeddings: torch.Tensor) -> None:
    noise = FreeLB(step=0.5, radius=0.3)
    slope = torch.randn(4, 20, HIDDEN)
    norms = torch.stack([ascend(noise, embeddings, slope, k).flatten(1).norm(dim=1) for k in range(3)])
    # The first perturbation is uniform in +-radius / sqrt(n): its norm is about radius / sqrt(3)
    torch.testing.assert_close(norms[0, 0], torch.tensor(0.3 / 3**0.5), rtol=0.1, atol=0)
    real = torch.tensor(LENGTHS) > 0
    torch.testing.assert_close(norms[1:, real], torch.full_like(norms[1:, real], 0.3))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_symnoise_has_one_size_and_opposite_signs_in_pairs_of_passes(scope: str, embeddings: torch.Tensor) -> None:
    noises = [
        symnoise(embeddings, KEEP, Stream(scope=scope, pass_index=number), alpha=5.0) - embeddings
        for number in range(4)
    ]
    for row, length in enumerate(LENGTHS):
        if length:
            size = 5.0 / math.sqrt(length * HIDDEN)
            real = noises[0][row][KEEP[row]]
            torch.testing.assert_close(real.abs(), torch.full_like(real, size), rtol=0, atol=1e-5)
            assert abs((real > 0).float().mean() - 0.5) < 2.5 / math.sqrt(real.numel())
    torch.testing.assert_close(noises[1], -noises[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(noises[3], -noises[2], rtol=0, atol=1e-5)
    assert not torch.allclose(noises[2], noises[0], atol=1e-3)


@pytest.mark.parametrize("overflow", [torch.inf, torch.nan, 0.0])
def test_freelb_keeps_its_perturbation_without_a_direction(overflow: float, embeddings: torch.Tensor) -> None:
    noise = FreeLB(step=0.1, radius=1.0)
    slope = torch.ones(4, 20, HIDDEN)
    slope[0, :20] = overflow
    first, second = (ascend(noise, embeddings, slope, k) for k in (0, 1))
    torch.testing.assert_close(second[0], first[0])
    assert not torch.equal(second[1], first[1])


def test_freelb_needs_the_backward_of_the_previous_pass(embeddings: torch.Tensor) -> None:
    noise = FreeLB(step=0.1, radius=1.0)
    noise(embeddings, KEEP, Stream())
    with pytest.raises(RuntimeError, match="pass 1 needs the gradient of pass 0"):
        noise(embeddings, KEEP, Stream(pass_index=1))
