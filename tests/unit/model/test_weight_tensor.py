"""Uses of a selected weight: the gradient against the dense one, and whether a dense one was allocated."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from families import VOCABULARY, tiny
from peak_bytes import peak_bytes
from torch import nn

from sparse_zero import SparseConfig, sparsify
from sparse_zero.errors import UserError
from sparse_zero.model.weight import SparseWeight

E, R, C = 4, 6, 5
MATRIX, EXPERTS = (R, C), (E, R, C)
IDS = torch.tensor([[3, 0, 3], [5, 3, 1]])
OF_SAMPLE = torch.tensor([2, 0, 2, 3, 2, -4])
OFFSETS = torch.tensor([3, 3, 7, 8], dtype=torch.int32)
Read = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def one_by_one(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return sum((F.linear(x, w[torch.tensor(e)]) * (e + 1)).tanh() for e in (0, 1, 3))


def biased_in_place(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, w)
    y.add_(torch.ones(R))
    return y.relu_()


def changed(copy: torch.Tensor, change: Read, *args: torch.Tensor) -> torch.Tensor:
    change(copy, *args)
    return copy


def changed_through_a_view(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    copy = w.clone()
    before = copy[1]
    copy[1].mul_(3)
    return F.linear(x, copy[2]) + F.linear(x, copy[1]).sin() + F.linear(x, before).cos()


SAMPLED: dict[str, tuple[tuple[int, ...], tuple[int, ...], Read]] = {
    "linear": (MATRIX, (7, C), lambda w, x: F.linear(x, w)),
    "linear-named": (MATRIX, (7, C), lambda w, x: F.linear(input=x, weight=w, bias=x.sum(0)[:1].expand(R))),
    "linear-turned": (MATRIX, (7, R), lambda w, x: F.linear(x, w.t())),
    "linear-vector": (MATRIX, (C,), lambda w, x: F.linear(x, w)),
    "linear-in-place": (MATRIX, (7, C), biased_in_place),
    "right": (MATRIX, (2, 7, R), lambda w, x: x @ w),
    "right-turned": (MATRIX, (2, 7, C), lambda w, x: x @ w.T),
    "right-permuted": (MATRIX, (7, C), lambda w, x: torch.mm(x, w.permute(1, 0))),
    "left": (MATRIX, (C, 7), lambda w, x: w @ x),
    "left-batch": (MATRIX, (2, C, 7), lambda w, x: torch.matmul(w, x)),
    "left-turned": (MATRIX, (R, 7), lambda w, x: w.mT.mm(x)),
    "left-vector": (MATRIX, (C,), lambda w, x: w @ x),
    "addmm": (MATRIX, (7, R), lambda w, x: torch.addmm(x.new_ones(C), x, w)),
    "bmm": (EXPERTS, (E, 7, R), lambda w, x: torch.bmm(x, w)),
    "bmm-turned": (EXPERTS, (E, 7, C), lambda w, x: x @ w.transpose(-2, -1)),
    "bmm-left": (EXPERTS, (E, C, 7), lambda w, x: torch.bmm(w, x)),
    "one-by-one": (EXPERTS, (7, C), one_by_one),
    "negative": (EXPERTS, (7, C), lambda w, x: F.linear(x, w[-2])),
    "select": (EXPERTS, (7, R), lambda w, x: x @ w.select(0, 2)),
    "iterated": (EXPERTS, (7, C), lambda w, x: sum(F.linear(x, part).sin() for part in w)),
    "unbound-turned": (EXPERTS, (7, R), lambda w, x: sum(F.linear(x, p.T).sin() for p in w.unbind())),
    "turned-unbound": (EXPERTS, (7, R), lambda w, x: sum(F.linear(x, p).sin() for p in w.mT.unbind(0))),
    "some-experts": (EXPERTS, (2, 7, R), lambda w, x: torch.bmm(x, w[1:3])),
    "halves": (EXPERTS, (7, C), lambda w, x: F.linear(x, w[1][: R // 2]) * F.linear(x, w[1, R // 2 :])),
    "chunks": (MATRIX, (7, C), lambda w, x: torch.stack([F.linear(x, p) for p in w.chunk(3)]).prod(0)),
    "uneven": (MATRIX, (7, C), lambda w, x: torch.cat([F.linear(x, p).sin() for p in w.split([1, 3, 2])], 1)),
    "viewed": (MATRIX, (7, C), lambda w, x: F.linear(x, w.view(2, 3, C)[1])),
    "flattened": (EXPERTS, (7, C), lambda w, x: F.linear(x, w.flatten(0, 1))),
    "wider": (MATRIX, (7, C), lambda w, x: F.linear(x.double(), w.double())),
    "wider-expert": (EXPERTS, (7, R), lambda w, x: x.double() @ w.to(torch.float64)[2]),
    "wider-turned": (EXPERTS, (7, C), lambda w, x: x.double() @ w.mT.double()[2]),
    "gathered": (EXPERTS, (6, 1, R), lambda w, x: torch.bmm(x, w[OF_SAMPLE])),
    "gathered-left": (EXPERTS, (6, C, 2), lambda w, x: torch.bmm(w[OF_SAMPLE], x)),
    "gathered-turned": (EXPERTS, (6, 1, C), lambda w, x: torch.bmm(x, w.mT[OF_SAMPLE])),
    "lookup": (MATRIX, (2, 3, C), lambda w, x: w[IDS] * x),
    "lookup-negative": (MATRIX, (3, C), lambda w, x: w[torch.tensor([-1, 5, -6])] * x),
    "embedding": (MATRIX, (2, 3, C), lambda w, x: F.embedding(IDS, w) * x),
    "embedding-padding": (MATRIX, (2, 3, C), lambda w, x: F.embedding(IDS, w, padding_idx=-3) * x),
    "embedding-frequency": (MATRIX, (2, 3, C), lambda w, x: F.embedding(IDS, w, scale_grad_by_freq=True) * x),
}
# torch's grouped_mm requires rows of 16 bytes, and leaves rows after the last offset uninitialised
GROUPED = {
    "grouped": ((E, 16, 8), (8, 16), lambda w, x: F.grouped_mm(x, w, offs=OFFSETS)),
    "grouped-turned": ((E, 16, 8), (8, 8), lambda w, x: F.grouped_mm(x, w.transpose(1, 2), offs=OFFSETS)),
    "grouped-fallback": (
        (E, 8, 4),
        (9, 8),
        lambda w, x: torch.ops.transformers.grouped_mm_fallback(x, w, offs=OFFSETS),
    ),
}
DENSE: dict[str, tuple[tuple[int, ...], tuple[int, ...], Read]] = {
    "elementwise": (MATRIX, (R, C), lambda w, x: w * x),
    "columns": (MATRIX, (7, 2), lambda w, x: F.linear(x, w[:, 1:3])),
    "of-each-expert": (EXPERTS, (7, C), lambda w, x: F.linear(x, w[:, 1])),
    "every-other-expert": (EXPERTS, (2, 7, R), lambda w, x: torch.bmm(x, w[::2])),
    "named-view": (MATRIX, (7, R), lambda w, x: x @ torch.transpose(input=w, dim0=0, dim1=1).T),
    "named-copy": (MATRIX, (7, R), lambda w, x: x @ torch.clone(input=w)),
    "broadcast": (EXPERTS, (7, R), lambda w, x: x @ w),
    "einsum": (EXPERTS, (7, R), lambda w, x: torch.einsum("nr,erc->enc", x, w)),
    "reshaped": (MATRIX, (7, R), lambda w, x: F.linear(x, w.view(C, R))),
    "copied-turned": (EXPERTS, (7, R), lambda w, x: F.linear(x, w[1].T.contiguous())),
    "masked": (EXPERTS, (7, C), lambda w, x: F.linear(x, w[torch.tensor([True, False, False, True])].sum(0))),
    "gathered-otherwise": (EXPERTS, (6, R, C), lambda w, x: w[OF_SAMPLE] * x),
    "gathered-view": (EXPERTS, (7, C), lambda w, x: F.linear(x, w[OF_SAMPLE][1])),
    "copy-changed": (MATRIX, (7, C), lambda w, x: F.linear(x, changed(w.clone(), lambda c: c.mul_(2)))),
    "wider-masked": (
        *(MATRIX, (7, R)),
        lambda w, x: x.double() @ changed(w.double(), lambda c: c.__setitem__(c > 0, 0)),
    ),
    "copy-changed-through-a-view": (EXPERTS, (7, C), changed_through_a_view),
    "gathered-changed": (EXPERTS, (6, 1, R), lambda w, x: torch.bmm(x, changed(w[OF_SAMPLE], lambda c: c.mul_(2)))),
    "addmm-scaled": (MATRIX, (7, R), lambda w, x: torch.addmm(x.new_ones(C), x, w, alpha=2)),
    "with-itself": (MATRIX, (R, R), lambda w, x: (w @ w.T) * x),
    "convolution": ((6, 4, 3), (2, 4, 9), lambda w, x: F.conv1d(x, w)),
    "normalised": (MATRIX, (7, C), lambda w, x: F.linear(x, F.normalize(w))),
}
READERS = SAMPLED | GROUPED | DENSE


class Reader(nn.Module):
    def __init__(self, shape: tuple[int, ...], read: Read) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self.table, x)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def tell_any_dense_gradient(model: nn.Module, beyond: int = 0) -> nn.Module:
    for weight in model.sparsity.weights.values():
        weight.transient_bytes = beyond
    return model


def build(name: str, dtype: torch.dtype = torch.float32, **settings: object) -> tuple[Reader, Reader, torch.Tensor]:
    shape, size, read = READERS[name]
    dense = Reader(shape, read).to(dtype)
    config = SparseConfig(density=0.4, targets=["table"]).model_copy(update=settings)
    return dense, tell_any_dense_gradient(sparsify(copy.deepcopy(dense), config)), torch.randn(size, dtype=dtype)


def table(model: nn.Module) -> SparseWeight:
    (weight,) = model.sparsity.weights.values()
    return weight


def sum_of_squares(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).double().square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", READERS)
def test_gradients_are_those_of_the_dense_weight(name, dtype):
    dense, model, x = build(name, dtype)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    for each, inputs in ((model, ours), (dense, theirs)):
        sum_of_squares(each, inputs).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    expected, scale = dense.table.grad.flatten()[table(model).flat_positions()].float(), dense.table.grad.abs().max()
    assert scale > 0
    torch.testing.assert_close(table(model).delta.grad, expected, rtol=0, atol=tolerance * scale.item())
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert table(model).warned_of_dense_gradient == (name in DENSE)


@pytest.mark.parametrize("name", READERS)
def test_dropout_and_scale_reach_every_reader(name):
    dense, model, x = build(name, dropout=0.5)
    torch.nn.init.normal_(table(model).delta)
    table(model).scale = 3.0
    sum_of_squares(model, x).backward()
    weight, factor = table(model), table(model).factor(table(model).setting)
    dense.table.data.view(-1)[weight.flat_positions()] += factor * weight.delta.detach()
    sum_of_squares(dense, x).backward()
    expected = factor * dense.table.grad.flatten()[weight.flat_positions()]
    assert (expected == 0).any()
    torch.testing.assert_close(weight.delta.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", READERS)
def test_a_graph_that_is_kept_gives_its_gradient_again(name):
    _, model, x = build(name)
    loss = sum_of_squares(model, x)
    loss.backward(retain_graph=True)
    once = table(model).delta.grad.clone()
    loss.backward()
    torch.testing.assert_close(table(model).delta.grad, 2 * once)


@pytest.mark.parametrize("name", ["one-by-one", "gathered", "grouped", "bmm", "linear", "lookup", "columns"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward(name, reentrant):
    dense, model, x = build(name)
    x.requires_grad_()
    output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
    output.square().sum().backward()
    dense(x).square().sum().backward()
    expected = dense.table.grad.flatten()[table(model).flat_positions()]
    torch.testing.assert_close(table(model).delta.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "bmm", "one-by-one", "addmm"])
def test_autocast(name):
    dense, model, x = build(name)
    for each in (model, dense):
        with torch.autocast("cpu", torch.bfloat16):
            output = each(x)
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
    expected = dense.table.grad.flatten()[table(model).flat_positions()]
    scale = expected.abs().max().item()
    torch.testing.assert_close(table(model).delta.grad, expected, rtol=0, atol=2e-2 * scale)


@pytest.mark.parametrize("name", ["one-by-one", "gathered", "grouped", "iterated", "chunks"])
def test_experts_without_a_selected_scalar(name):
    shape, size, read = READERS[name]
    dense, x = Reader(shape, read), torch.randn(size)
    model = sparsify(copy.deepcopy(dense), SparseConfig(density=1 / dense.table.numel(), targets=["table"]))
    assert table(model).delta.numel() == 1
    for each in (model, dense):
        sum_of_squares(each, x).backward()
    torch.testing.assert_close(table(model).delta.grad, dense.table.grad.flatten()[table(model).flat_positions()])


def test_readers_outside_of_the_modules_own_forward():
    dense, model, x = build("one-by-one")
    for each in (model, dense):
        (one_by_one(each.table, x) + F.linear(x, each.table[1])).square().sum().backward()
    expected = dense.table.grad.flatten()[table(model).flat_positions()]
    torch.testing.assert_close(table(model).delta.grad, expected, rtol=1e-5, atol=1e-5)


def test_what_is_read_is_a_parameter_to_those_who_ask_and_their_hooks_see_the_dense_gradient():
    dense, model, x = build("elementwise")
    read, seen = model.table, []
    assert isinstance(read, nn.Parameter)
    assert read.requires_grad
    assert torch.equal(read, dense.table)
    read.register_hook(seen.append)
    (read * x).sum().backward()
    assert torch.equal(seen[0], x)


def test_a_function_that_sees_no_subclass_gets_its_dense_gradient():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    _, model, x = build("elementwise")
    (Doubled.apply(model.table) * x).sum().backward()
    torch.testing.assert_close(table(model).delta.grad, 2 * x.flatten()[table(model).flat_positions()])


class OtherTensor(torch.Tensor):
    """A tensor subclass of another library, whose functions return the same subclass."""


def test_another_tensor_subclass_keeps_its_own_rules():
    dense, model, x = build("linear")
    for each in (model, dense):
        output = each(x.as_subclass(OtherTensor))
        assert type(output) is OtherTensor
        output.square().sum().backward()
    expected = dense.table.grad.flatten()[table(model).flat_positions()]
    torch.testing.assert_close(table(model).delta.grad, expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_a_gradient_is_refused_where_it_would_lack_a_part():
    _, model, x = build("linear")
    x.requires_grad_()
    with pytest.raises(UserError, match="table: second derivatives of a sparse model are not supported"):
        torch.autograd.grad(sum_of_squares(model, x), x, create_graph=True)


def test_a_dense_gradient_above_the_bound_is_warned_of_once_for_each_parameter(caplog):
    _, model, x = build("columns")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            sum_of_squares(model, x).backward()
    (record,) = caplog.records
    assert record.getMessage().startswith("table: ")
    assert "more than sparse.transient_mib" in record.getMessage()


def test_a_dense_gradient_within_the_bound_is_not_warned_of(caplog):
    _, model, x = build("columns")
    tell_any_dense_gradient(model, beyond=R * C * 4)
    sum_of_squares(model, x).backward()
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss"])
def test_mixtures_of_experts(family, implementation, dtype):
    model = tiny(family, hidden_size=32, moe_intermediate_size=16, intermediate_size=32, num_local_experts=4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.to(dtype).set_experts_implementation(implementation)
    dense = copy.deepcopy(model)
    targets = [f"experts.{weight}" for weight in ("gate_up_proj", "down_proj")]
    tell_any_dense_gradient(sparsify(model, SparseConfig(density=0.05, targets=targets)))
    tokens = torch.randint(3, VOCABULARY, (2, 12))
    ours, theirs = (each(input_ids=tokens, labels=tokens).loss for each in (model, dense))
    assert ours.item() == theirs.item()
    ours.backward()
    theirs.backward()
    parameters = dict(dense.named_parameters())
    for name, weight in model.sparsity.weights.items():
        gradient, scale = parameters[name].grad.flatten().float(), parameters[name].grad.abs().max().item()
        tolerance = (1e-5 if dtype == torch.float32 else 3e-2) * scale
        assert scale > 0
        torch.testing.assert_close(weight.delta.grad, gradient[weight.flat_positions()], rtol=0, atol=tolerance)
        assert not weight.warned_of_dense_gradient


@pytest.mark.parametrize("implementation", ["one-by-one", "grouped"])
def test_backward_holds_no_gradient_of_all_experts(implementation):
    read = {
        "one-by-one": lambda w, x: sum(F.linear(x[e], w[e]) for e in range(8)).unsqueeze(0),
        "grouped": lambda w, x: F.grouped_mm(x.flatten(0, 1), w.mT, offs=torch.arange(4, 33, 4, dtype=torch.int32)),
    }[implementation]
    dense = Reader((8, 256, 128), read)
    model, x = sparsify(copy.deepcopy(dense), SparseConfig(density=0.01, targets=["table"])), torch.randn(8, 4, 128)
    sum_of_squares(model, x).backward()
    ours, theirs = (each(x).square().sum() for each in (model, dense))
    whole = dense.table.numel() * 4
    assert peak_bytes(theirs.backward) >= whole
    assert peak_bytes(ours.backward) < 0.1 * whole
