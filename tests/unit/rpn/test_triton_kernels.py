"""The kernels of Random Position Noise against torch's operators, on a GPU if there is one, else interpreted."""

import importlib.util
import os

import pytest
import torch

from rpn import noise
from rpn.streams import Stream

if importlib.util.find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("triton is not installed", allow_module_level=True)

from triton_cases import interpret

from rpn import triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    torch.manual_seed(0)
    interpret(monkeypatch, triton_kernels)
    monkeypatch.setattr(noise, "_has_kernels", lambda device: device.type == DEVICE)


def by_torch(embeddings, keep, stream, probability, upstream) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and the gradient of move_scalars on a CPU without kernels."""
    embeddings = embeddings.detach().cpu().requires_grad_()
    positions = noise.random_positions(stream.groups(keep.cpu()), embeddings.shape[-1], probability)
    moved = noise._Move.apply(embeddings, *positions)
    moved.backward(upstream.cpu())
    return moved.detach(), embeddings.grad


def assert_same(shape, keep, stream, probability, dtype=torch.float32, layout=lambda x: x) -> None:
    """Bit for bit, the signs of zeros included."""
    embeddings = layout(torch.randn(shape).to(dtype)).to(DEVICE)
    upstream = torch.randn(shape).to(dtype)
    upstream[torch.rand(shape) < 0.1] = -0.0
    upstream = upstream.to(DEVICE)
    before = embeddings.clone()
    given = embeddings.requires_grad_()
    moved = noise.move_scalars(given, keep.to(DEVICE), stream, probability=probability)
    assert "_MoveOnGPU" in type(moved.grad_fn).__name__
    (gradient,) = torch.autograd.grad(moved, given, upstream)
    expected, expected_gradient = by_torch(embeddings, keep, stream, probability, upstream)
    for got, wanted in ((moved, expected), (gradient, expected_gradient)):
        assert got.dtype == dtype
        assert torch.equal(got.detach().cpu(), wanted)
        assert torch.equal(got.detach().cpu().signbit(), wanted.signbit())
    assert torch.equal(embeddings, before)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("probability", [1e-9, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("hidden", [1, 2, 33])
def test_values_and_gradients_have_torchs_bits(hidden, probability, scope):
    keep = torch.arange(6) < torch.tensor([6, 0, 1, 4])[:, None]
    assert_same((4, 6, hidden), keep, Stream(seed=3, step=2, scope=scope), probability)


@pytest.mark.parametrize("probability", [0.1, 1.0])
def test_loops_of_several_rounds(probability):
    """More channels and moved scalars than the kernels compute together."""
    hidden = 530
    assert hidden > max(triton_kernels.BOUNDS, triton_kernels.SLOTS, triton_kernels.OTHERS)
    assert_same((1, 3, hidden), torch.tensor([[True, False, True]]), Stream(seed=3), probability)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_every_dtype(dtype):
    assert_same((3, 5, 40), torch.rand(3, 5) < 0.8, Stream(seed=1), 0.5, dtype)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize(("rank", "micro_step", "pass_index"), [(0, 0, 1), (1, 0, 0), (3, 2, 1)])
def test_every_rank_and_pass(rank, micro_step, pass_index, scope):
    place = {"rank": rank, "world_size": 4, "micro_step": micro_step, "pass_index": pass_index}
    assert_same((2, 7, 24), torch.rand(2, 7) < 0.7, Stream(seed=9, step=100, scope=scope, **place), 0.3)


def test_packed_sequences():
    pieces = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]]).to(DEVICE)
    embeddings = torch.randn(2, 7, 12, device=DEVICE)
    keep = torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    stream = Stream(scope="sequence", pieces=pieces)
    moved = noise.move_scalars(embeddings, keep, stream, probability=0.8).cpu()
    stream = Stream(scope="sequence", pieces=pieces.cpu())
    sources, targets = noise.random_positions(stream.groups(keep.cpu()), 12, 0.8)
    assert torch.equal(moved, noise._Move.apply(embeddings.cpu(), sources, targets))


@pytest.mark.parametrize("layout", [lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x[..., ::1]])
def test_embeddings_may_be_non_contiguous(layout):
    assert_same((4, 5, 16), torch.ones(4, 5, dtype=torch.bool), Stream(), 0.5, layout=layout)


@pytest.mark.parametrize(
    ("shape", "keep"),
    [((2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)), ((0, 3, 4), torch.ones(0, 3, dtype=torch.bool))],
    ids=["all-padding", "empty-batch"],
)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_nothing_to_move(shape, keep, scope):
    assert_same(shape, keep, Stream(scope=scope), 0.5)


def test_the_gradient_of_the_gradient_is_the_noise_again():
    """The noise is linear, x -> J x, and its backward y -> J^T y, whose own backward is J. Compared with J as torch's
    operators give it."""
    keep = torch.tensor([[True, True, False], [True, True, True]], device=DEVICE)
    stream, size = Stream(seed=5), 2 * 3 * 4
    positions = noise.random_positions(stream.groups(keep.cpu()), 4, 0.6)
    jacobian = torch.stack(
        [noise._Move.apply(unit.view(2, 3, 4), *positions).flatten() for unit in torch.eye(size)], 1
    )
    embeddings, upstream, third = (torch.randn(2, 3, 4, device=DEVICE, requires_grad=True) for _ in range(3))
    moved = noise.move_scalars(embeddings, keep, stream, probability=0.6)
    (gradient,) = torch.autograd.grad(moved, embeddings, upstream, create_graph=True)
    torch.testing.assert_close(gradient.cpu().flatten(), jacobian.T @ upstream.cpu().flatten())
    (again,) = torch.autograd.grad(gradient, upstream, third)
    torch.testing.assert_close(again.cpu().flatten(), jacobian @ third.cpu().flatten())


@pytest.mark.parametrize("hidden", [1, 31, 200])
def test_the_circles_are_the_permutations_of_torch(hidden):
    groups = Stream(seed=7).groups(torch.ones(2, 3, dtype=torch.bool, device=DEVICE))
    distribution = noise._binomial_distribution(hidden, 0.1, groups.rows.device)
    circles = triton_kernels.draw(groups, hidden, distribution).circles
    for circle, purpose in zip(circles, (noise._INNER_CIRCLE, noise._OUTER_CIRCLE, noise._LAST_LABELS), strict=True):
        assert torch.equal(circle, noise._shuffled_channels(groups, hidden, purpose))


def test_backward_keeps_no_positions():
    """Only what the positions are computed from: less than a tenth of the two indices of each moved scalar."""
    batch, length, hidden = 4, 16, 256
    embeddings = torch.randn(batch, length, hidden, device=DEVICE, requires_grad=True)
    keep = torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
    moved = noise.move_scalars(embeddings, keep, Stream(), probability=0.5)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in moved.grad_fn.saved_tensors)
    assert kept < 0.1 * 2 * 4 * 0.5 * embeddings.numel()
