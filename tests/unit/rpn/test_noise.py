"""Random Position Noise as pure functions: a slow reference, statistics, random streams and gradients."""

import hashlib

import pytest
import torch

from rpn.noise import move_scalars, random_positions, select
from rpn.streams import Stream, mix, stream_key

SCOPES = ("batch", "sequence")


def distinct(batch: int, length: int, hidden: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Embeddings in which no value occurs twice, so that each value identifies its original position."""
    return torch.arange(batch * length * hidden).to(dtype).view(batch, length, hidden)


def ragged(*lengths: int, side: str = "right") -> torch.Tensor:
    place = torch.arange(max(lengths)).expand(len(lengths), -1)
    kept = torch.tensor(lengths)[:, None]
    return place < kept if side == "right" else place >= max(lengths) - kept


def chi_square_bound(freedom: int) -> float:
    """Five standard deviations above the mean of the distribution."""
    return freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("probability", [0.05, 0.3, 1.0])
def test_equals_the_definition_written_out(scope: str, probability: float) -> None:
    keep = ragged(7, 3, 0, 5)
    batch, length, hidden = 4, 7, 6
    stream = Stream(seed=3, scope=scope)
    embeddings = torch.randn(batch, length, hidden)
    # The permutation, from a call in which all scalars move
    sent_from, sent_to = random_positions(stream.groups(keep), hidden, probability=1)
    pi = dict(zip(sent_to.tolist(), sent_from.tolist(), strict=True))
    allowed = keep[:, :, None].expand(-1, -1, hidden).flatten().nonzero().flatten().tolist()
    assert sorted(pi) == sorted(pi.values()) == allowed

    selected = set(random_positions(stream.groups(keep), hidden, probability)[0].tolist())
    expected = embeddings.flatten().clone()
    for q in allowed:
        if pi[q] in selected:
            expected[q] = embeddings.flatten()[pi[q]]
    assert torch.equal(move_scalars(embeddings, keep, stream, probability=probability).flatten(), expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_overwrites_as_many_positions_as_scalars_are_selected(scope: str) -> None:
    keep = ragged(40, 33, 12)
    embeddings = distinct(3, 40, 24)
    groups = Stream(scope=scope).groups(keep)
    sources, targets = random_positions(groups, 24, 0.3)
    assert len(sources.unique()) == len(targets.unique()) == len(sources) > 0
    moved = move_scalars(embeddings, keep, Stream(scope=scope), probability=0.3).flatten()
    assert torch.equal(moved[targets.long()], embeddings.flatten()[sources.long()])
    changed = (moved != embeddings.flatten()).nonzero().flatten()
    stayed = (sources == targets).sum()
    assert set(changed.tolist()) <= set(targets.tolist())
    assert len(changed) == len(targets) - stayed


def test_number_of_selected_scalars_is_binomial() -> None:
    keep, hidden, probability, draws = ragged(6, 4), 15, 0.2, 1000
    counts = torch.tensor(
        [len(select(Stream(step=step).groups(keep), hidden, probability)[0]) for step in range(draws)]
    ).double()
    scalars = 10 * hidden
    mean, variance = scalars * probability, scalars * probability * (1 - probability)
    assert abs(counts.mean() - mean) < 5 * (variance / draws) ** 0.5
    assert abs(counts.var() / variance - 1) < 5 * (2 / draws) ** 0.5


@pytest.mark.parametrize("keep", [ragged(4, 2), ragged(1), ragged(2)], ids=["two-rows", "one-token", "two-tokens"])
def test_sources_targets_and_their_pairs_are_uniform(keep: torch.Tensor) -> None:
    hidden, draws = 5, 1200
    allowed = keep[:, :, None].expand(-1, -1, hidden).flatten().nonzero().flatten()
    scalars = keep.numel() * hidden
    pairs, together = torch.zeros(scalars, scalars), torch.zeros(scalars, scalars)
    for step in range(draws):
        sources, targets = random_positions(Stream(step=step).groups(keep), hidden, 0.4)
        pairs[sources.long(), targets.long()] += 1
        selected = torch.zeros(scalars)
        selected[sources.long()] = 1
        together += selected[:, None] * selected
    pairs, together = pairs[allowed][:, allowed], together[allowed][:, allowed]
    n = len(allowed)
    for counts in (pairs.sum(1), pairs.sum(0), pairs.flatten()):
        expected = counts.mean()
        assert ((counts - expected) ** 2 / expected).sum() < chi_square_bound(len(counts) - 1)
    # Scalars are selected independently of each other, within a token and between tokens
    both = together[~torch.eye(n, dtype=torch.bool)]
    expected = draws * 0.4**2
    assert ((both - expected) ** 2 / expected).sum() / 2 < chi_square_bound(n * (n - 1) // 2)


@pytest.mark.parametrize("shape", [(8, 16), (1, 2), (1, 1)])
def test_adjacent_scalars_are_separated(shape: tuple[int, int]) -> None:
    # A permutation that only rotates tokens or channels would pass all tests of single positions
    keep, hidden, draws = torch.ones(shape, dtype=torch.bool), 32, 200
    next_channel, next_token = [], []
    for step in range(draws):
        sources, targets = random_positions(Stream(step=step).groups(keep), hidden, 1.0)
        target = torch.empty(keep.numel() * hidden, dtype=torch.int64)
        target[sources.long()] = targets.long()
        token, channel = (target // hidden).view(-1, hidden), (target % hidden).view(-1, hidden)
        next_channel.append((channel[:, 1:] - channel[:, :-1] == 1).double().mean())
        next_token.append((token[1:] - token[:-1] == 1).double().sum() / keep.numel() / hidden)
    assert sum(next_channel) / draws < 1.5 / hidden
    if shape == (8, 16):
        assert sum(next_token) / draws < 1.5 / keep.numel() + 1.5 / hidden


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_neither_source_nor_target(scope: str, side: str) -> None:
    keep = ragged(9, 4, 0, 1, side=side)
    embeddings = torch.randn(4, 9, 8).masked_fill(~keep[:, :, None], torch.nan)
    moved = move_scalars(embeddings, keep, Stream(scope=scope), probability=1.0)
    assert moved[~keep].isnan().all()
    assert not moved[keep].isnan().any()
    assert (moved[keep] != embeddings[keep]).float().mean() > 0.8
    assert torch.equal(moved[keep].flatten().sort()[0], embeddings[keep].flatten().sort()[0])


def test_batch_scope_crosses_examples_and_sequence_scope_does_not() -> None:
    keep = torch.ones(4, 6, dtype=torch.bool)
    owner = torch.arange(4.0)[:, None, None].expand(4, 6, 10)
    assert torch.equal(move_scalars(owner, keep, Stream(scope="sequence"), probability=0.5), owner)
    mixed = move_scalars(owner, keep, Stream(scope="batch"), probability=1.0)
    # All values move: three of four come from another example
    assert abs((mixed != owner).float().mean() - 0.75) < 0.1


def test_no_value_moves_to_another_sequence_of_a_packed_row() -> None:
    pieces = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    keep = torch.ones_like(pieces, dtype=torch.bool)
    owner = (pieces + 10 * torch.arange(2)[:, None])[:, :, None].expand(2, 6, 12).float()
    stream = Stream(scope="sequence", pieces=pieces)
    assert torch.equal(move_scalars(owner, keep, stream, probability=1.0), owner)
    embeddings = distinct(2, 6, 12)
    moved = move_scalars(embeddings, keep, stream, probability=1.0)
    # Every packed sequence has noise
    assert all((moved[owner == name] != embeddings[owner == name]).any() for name in owner.unique())


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_sequence_scope_depends_only_on_the_position_in_the_global_batch(world_size: int, micro_steps: int) -> None:
    lengths = (9, 3, 5, 8, 1, 4, 7, 2)
    hidden = 10
    embeddings = torch.randn(8, 9, hidden)
    keep = ragged(*lengths)
    whole = move_scalars(embeddings, keep, Stream(step=5, scope="sequence"), probability=0.4)
    batch = 8 // (world_size * micro_steps)
    for micro_step in range(micro_steps):
        for rank in range(world_size):
            first = (micro_step * world_size + rank) * batch
            rows = slice(first, first + batch)
            # Padded to the longest example of this micro-batch, as by a data collator
            longest = max(lengths[rows])
            stream = Stream(step=5, micro_step=micro_step, rank=rank, world_size=world_size, scope="sequence")
            part = move_scalars(embeddings[rows, :longest], keep[rows, :longest], stream, probability=0.4)
            assert torch.equal(part[keep[rows, :longest]], whole[rows][keep[rows]])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("coordinate", ["seed", "step", "micro_step", "pass_index", "rank"])
def test_the_noise_depends_on_each_coordinate_and_is_repeated_at_the_same_position(
    scope: str, coordinate: str
) -> None:
    keep = torch.ones(2, 8, dtype=torch.bool)
    embeddings = torch.randn(2, 8, 16)

    def noise(**place: int) -> torch.Tensor:
        return move_scalars(embeddings, keep, Stream(scope=scope, **place), probability=0.2)

    torch.manual_seed(0)
    first = noise(world_size=2)
    torch.manual_seed(1)
    assert torch.equal(noise(world_size=2), first)
    other = noise(world_size=2, **{coordinate: 1})
    # Two independent noises change few positions in the same way
    assert ((other != embeddings) & (other == first)).float().mean() < 0.02


def test_the_examples_of_a_batch_have_independent_noise() -> None:
    keep = torch.ones(2, 16, dtype=torch.bool)
    same = torch.randn(1, 16, 32).expand(2, -1, -1)
    first, second = move_scalars(same, keep, Stream(scope="sequence"), probability=0.3)
    assert (first != second).float().mean() > 0.3


@pytest.mark.parametrize("scope", SCOPES)
def test_the_gradient_flows_to_the_original_position(scope: str) -> None:
    keep = ragged(5, 2)
    stream = Stream(scope=scope)
    embeddings = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda e: move_scalars(e, keep, stream, probability=0.6), embeddings)

    # The same operation, differentiated by torch
    sources, targets = (i.long() for i in random_positions(stream.groups(keep), 3, 0.6))
    upstream = torch.randn(2, 5, 3, dtype=torch.float64)
    flat = embeddings.flatten()
    (flat.index_copy(0, targets, flat[sources]).view_as(embeddings) * upstream).sum().backward()
    expected, embeddings.grad = embeddings.grad, None
    (move_scalars(embeddings, keep, stream, probability=0.6) * upstream).sum().backward()
    assert torch.equal(embeddings.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_dtype_and_does_not_modify_its_argument(dtype: torch.dtype) -> None:
    embeddings = distinct(2, 4, 5, dtype)
    before = embeddings.clone()
    moved = move_scalars(embeddings, ragged(4, 3), Stream(), probability=0.5)
    assert moved.dtype == dtype
    assert not torch.equal(moved, embeddings)
    assert torch.equal(embeddings, before)


def test_embeddings_may_be_non_contiguous() -> None:
    embeddings = torch.randn(4, 3, 6).transpose(0, 1).requires_grad_()
    keep = torch.ones(3, 4, dtype=torch.bool)
    moved = move_scalars(embeddings, keep, Stream(), probability=0.5)
    assert torch.equal(moved, move_scalars(embeddings.contiguous(), keep, Stream(), probability=0.5))
    moved.sum().backward()
    assert embeddings.grad.sum() == embeddings.numel()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("shape", "keep", "probability"),
    [
        ((2, 3, 4), torch.zeros(2, 3, dtype=torch.bool), 0.5),
        ((2, 3, 4), torch.ones(2, 3, dtype=torch.bool), 1e-12),
        ((1, 1, 1), torch.ones(1, 1, dtype=torch.bool), 1.0),
        ((0, 3, 4), torch.ones(0, 3, dtype=torch.bool), 0.5),
    ],
    ids=["all-padding", "nothing-selected", "one-scalar", "empty-batch"],
)
def test_nothing_changes_if_no_scalar_can_move(scope, shape, keep, probability) -> None:
    embeddings = torch.randn(shape, requires_grad=True)
    moved = move_scalars(embeddings, keep, Stream(scope=scope), probability=probability)
    assert torch.equal(moved, embeddings)
    moved.sum().backward()
    assert torch.equal(embeddings.grad, torch.ones(shape))


def test_golden_positions() -> None:
    """A resumed run must repeat its noise, so a change of the positions is a breaking change."""
    digest = hashlib.sha256()
    for scope in SCOPES:
        for positions in random_positions(Stream(seed=1, step=2, scope=scope).groups(ragged(7, 5)), 11, 0.3):
            digest.update(positions.numpy().astype("<i4").tobytes())
    assert digest.hexdigest()[:16] == "2b1d1918d194661d"


def test_hash_is_splitmix64() -> None:
    # The first outputs of the published generator for seed 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    numbers = mix(1234567, torch.arange(1, 4))
    assert [number % 2**64 for number in numbers.tolist()] == expected
    assert mix(torch.tensor([1234567]), 3).item() % 2**64 == expected[2]


def test_keys_of_similar_coordinates_differ() -> None:
    assert len({stream_key(1, 23), stream_key(12, 3), stream_key(1, 2, 3), stream_key(123)}) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the CPU with a GPU")
@pytest.mark.parametrize("scope", SCOPES)
def test_positions_are_the_same_on_cpu_and_gpu(scope: str) -> None:
    keep = ragged(50, 20, 33)
    for on_cpu, on_gpu in zip(
        random_positions(Stream(scope=scope).groups(keep), 96, 0.3),
        random_positions(Stream(scope=scope).groups(keep.cuda()), 96, 0.3),
        strict=True,
    ):
        assert torch.equal(on_cpu, on_gpu.cpu())
