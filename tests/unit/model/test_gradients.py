"""Selection by gradients, against dense gradients of plain torch."""

import copy

import pytest
import torch
from families import tiny
from sparse_cases import plain_state
from torch import nn

from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify, unload
from sparse_zero.selection.config import SparseConfig

BATCHES = [
    {"input_ids": ids, "labels": ids}
    for ids in (torch.tensor([[3, 4, 5, 4], [7, 3, 0, 3]]), torch.tensor([[9, 8, 7, 6, 5, 4]]))
]
TARGETS = ["v_proj", "down_proj", "embed_tokens"]


def config(selection: str, **settings) -> SparseConfig:
    return SparseConfig(density=0.05, targets=TARGETS, selection=selection, **settings)


def dense_gradients(base: nn.Module) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(base).eval()
    sum(model(**batch).loss for batch in BATCHES).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def positions(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.flat_positions() for name, weight in model.sparsity.weights.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("selection", ["gradient", "snip"])
def test_the_largest_of_each_weight_are_selected(selection, tied):
    base = tiny("llama", tie_word_embeddings=tied)
    gradients, state = dense_gradients(base), dict(base.named_parameters())
    chosen = positions(sparsify(copy.deepcopy(base), config(selection), batches=BATCHES))
    drawn = sparsify(copy.deepcopy(base), config("stratified")).sparsity.weights
    assert {n: len(p) for n, p in chosen.items()} == {n: w.selection.count for n, w in drawn.items()}
    for name, flat in chosen.items():
        wanted = gradients[name].abs() * (state[name].detach().abs() if selection == "snip" else 1)
        expected = wanted.flatten().argsort(descending=True, stable=True)[: len(flat)].sort().values
        assert flat.tolist() == expected.tolist()


def test_rows_of_tokens_are_selected_in_full():
    base = tiny("llama")
    model = sparsify(copy.deepcopy(base), config("gradient", trainable_token_indices=[2, 60]), batches=BATCHES)
    name, width = "model.embed_tokens.weight", base.config.hidden_size
    flat, wanted = positions(model)[name], dense_gradients(base)[name].abs().flatten()
    rows = torch.cat([torch.arange(row * width, (row + 1) * width) for row in (2, 60)])
    assert torch.isin(rows, flat).all()
    others = flat[~torch.isin(flat, rows)]
    wanted[rows] = -1
    assert others.tolist() == wanted.argsort(descending=True, stable=True)[: len(others)].sort().values.tolist()


def test_the_model_is_otherwise_as_it_was(tmp_path):
    base = tiny("llama")
    base.train()
    base.model.norm.eval()
    base.lm_head.requires_grad_(False)
    base.model.norm.weight.grad = torch.ones_like(base.model.norm.weight)
    before, modes = plain_state(base), [module.training for module in base.modules()]
    model = sparsify(copy.deepcopy(base), config("gradient"), batches=BATCHES)
    save_adapter(model, tmp_path)
    assert positions(load_adapter(copy.deepcopy(base), tmp_path)).keys() == positions(model).keys()
    unload(model)
    assert [module.training for module in model.modules()] == modes
    assert not model.lm_head.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain_state(model).items())
    target = base.model.layers[0].self_attn.v_proj.weight
    sparsify(base, config("gradient"), batches=BATCHES)
    assert base.model.norm.weight.grad.sum() == base.config.hidden_size
    assert target.grad is None


def test_a_loss_of_your_own():
    torch.manual_seed(0)
    base, inputs = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 6)
    own = SparseConfig(density=0.2, targets=["0"], selection="gradient")
    model = sparsify(copy.deepcopy(base), own, batches=[inputs], loss=lambda model, batch: model(batch).square().sum())
    base(inputs).square().sum().backward()
    [flat] = positions(model).values()
    assert flat.tolist() == base[0].weight.grad.abs().flatten().topk(len(flat)).indices.sort().values.tolist()


def test_a_weight_that_no_batch_reaches_is_named(caplog):
    base = nn.ModuleDict({"used": nn.Linear(6, 6), "unused": nn.Linear(6, 6)})
    own = SparseConfig(density=0.2, targets=["used", "unused"], selection="gradient")
    sparsify(base, own, batches=[torch.ones(2, 6)], loss=lambda model, batch: model["used"](batch).sum())
    assert "give no gradient to ['unused.weight']" in caplog.text


@pytest.mark.parametrize(
    ("selection", "given", "message"),
    [
        ("gradient", {}, "sparse.selection: gradient needs examples: pass batches= to sparsify"),
        ("snip", {"batches": []}, "there is no batch to compute gradients of"),
        ("snip", {"batches": [{"input_ids": BATCHES[0]["input_ids"]}]}, "returns no loss for the batch"),
        ("gradient", {"batches": [{}], "loss": lambda model, _: model.lm_head.weight.sum() * torch.nan}, "not finite"),
        ("stratified", {"batches": BATCHES}, "batches are for selection: gradient and snip, not stratified"),
    ],
)
def test_what_cannot_be_selected_is_refused(selection, given, message):
    base = tiny("llama", tie_word_embeddings=True)
    before = {name: (p.requires_grad, p.grad) for name, p in base.named_parameters()}
    with pytest.raises(UserError, match=message):
        sparsify(base, config(selection), **given)
    assert {name: (p.requires_grad, p.grad) for name, p in base.named_parameters()} == before
