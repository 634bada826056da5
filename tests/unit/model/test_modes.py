"""The settings of SparseConfig on models: budgets, selection, tokens, dropout."""

import copy

import pytest
import torch
from families import tiny
from pydantic import ValidationError
from sparse_cases import adamw, both, plain_state, trainable
from torch import nn

from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import merge_and_unload, sparsify, unload
from sparse_zero.selection.config import SparseConfig

TOKENS = torch.tensor([[3, 4, 5, 4, 4, 9], [7, 3, 0, 3, 95, 94]])
MODES = {
    "stratified": {},
    "strips": {"granularity": 4},
    "bernoulli": {"selection": "bernoulli"},
    "magnitude": {"selection": "magnitude"},
    "magnitude-smallest": {"selection": "magnitude-smallest"},
    "rank": {"density": None, "rank_equivalent": 2},
    "rank-strips": {"density": None, "rank_equivalent": 2, "granularity": 8},
}
LINEAR = SparseConfig(density=0.05, targets="all-linear", seed=5)


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


def train(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer, losses = adamw(trainable(model)), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def changed(base: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """Flat positions of the scalars that differ, by parameter."""
    after = plain_state(merge_and_unload(copy.deepcopy(model)))
    return {name: (after[name] != tensor).flatten().nonzero().squeeze(1) for name, tensor in plain_state(base).items()}


# Selection


@pytest.mark.parametrize("mode", MODES)
def test_training_moves_the_selected_scalars_and_no_others(mode):
    base = tiny("llama")
    model = sparsify(copy.deepcopy(base), LINEAR.model_copy(update=MODES[mode]))
    train(model)
    moved = changed(base, model)
    for name, flat in moved.items():
        if name in model.sparsity.weights:
            selected = model.sparsity.weights[name].flat_positions()
            assert torch.isin(flat, selected).all()
            assert len(flat) > 0.9 * len(selected)
        else:
            assert len(flat) == 0


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_of_each_mode_opens_on_a_fresh_base(mode, tmp_path):
    base = tiny("llama")
    model = sparsify(copy.deepcopy(base), LINEAR.model_copy(update=MODES[mode]))
    train(model)
    save_adapter(model, tmp_path)
    assert (tmp_path / "adapter_positions.safetensors").exists() == mode.startswith("magnitude")
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert loss_of(loaded).item() == loss_of(model).item()
    assert train(loaded) == train(model)


@pytest.mark.parametrize("smallest", [False, True])
def test_magnitude_selects_the_largest_or_smallest_of_each_weight(smallest):
    base = tiny("llama")
    config = LINEAR.model_copy(update={"selection": "magnitude-smallest" if smallest else "magnitude"})
    model = sparsify(copy.deepcopy(base), config)
    for name, weight in model.sparsity.weights.items():
        magnitude = base.get_parameter(name).detach().flatten().abs()
        inside = torch.zeros(magnitude.numel(), dtype=torch.bool)
        inside[weight.flat_positions()] = True
        low, high = (inside, ~inside) if smallest else (~inside, inside)
        assert magnitude[low].max() <= magnitude[high].min()


def test_bernoulli_has_the_density_on_average_and_leaves_out_weights_that_drew_nothing():
    counts = []
    for seed in range(40):
        model = sparsify(tiny("llama"), LINEAR.model_copy(update={"selection": "bernoulli", "seed": seed}))
        assert all(weight.delta.numel() for weight in model.sparsity.weights.values())
        counts.append(model.sparsity.selected_parameters)
    wanted = 0.05 * model.sparsity.total_parameters
    # The standard deviation of one count is about sqrt(wanted); of the mean of 40, a sixth of that.
    assert abs(sum(counts) / 40 - wanted) < wanted**0.5
    assert len(set(counts)) > 10


def test_strips_fill_blocks_of_rows():
    model = sparsify(tiny("llama"), LINEAR.model_copy(update={"granularity": 4}))
    for weight in model.sparsity.weights.values():
        flat, columns = weight.flat_positions(), weight.shape[1]
        strips = torch.stack([flat // columns // 4, flat % columns]).unique(dim=1)
        assert strips.shape[1] * 4 == flat.numel()


# Budgets


def test_sparsity_is_one_minus_density():
    one = sparsify(tiny("llama"), SparseConfig(sparsity=0.95, targets="all-linear"))
    other = sparsify(tiny("llama"), SparseConfig(density=0.05, targets="all-linear"))
    for name, weight in one.sparsity.weights.items():
        assert torch.equal(weight.flat_positions(), other.sparsity.weights[name].flat_positions())


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_equivalent_counts_as_lora(rank):
    thin = {"targets": "all-linear", "exclude_modules": ["shared_expert_gate"]}
    model = sparsify(tiny("qwen2_moe"), SparseConfig(rank_equivalent=rank, **thin))
    for name, weight in model.sparsity.weights.items():
        *experts, rows, columns = weight.shape
        assert weight.delta.numel() == (experts[0] if experts else 1) * rank * (rows + columns), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.1, "sparsity": 0.9}, "density and sparsity exclude each other"),
        ({"sparsity": 0.9, "rank_equivalent": 4}, "sparsity and rank_equivalent exclude each other"),
        ({"granularity": 2, "selection": "bernoulli"}, "granularity: 2 requires selection: stratified"),
        ({"density": 0}, "greater than 0"),
        ({"sparsity": 1}, "less than 1"),
        ({"dropout": 1}, "less than 1"),
        ({"trainable_token_indices": [-1]}, "greater than or equal to 0"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValidationError, match=message):
        SparseConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.9}, r"lower the density to at most 0\.\d+, or add targets \(.*up_proj"),
        ({"sparsity": 0.1}, r"sparse.sparsity: 0.1 requires"),
        ({"rank_equivalent": 9}, r"rank_equivalent: 9 \* .* lower it to at most 5"),
        ({"granularity": 5, "targets": ["up_proj"]}, "granularity: 5 does not divide the 24 rows of .*up_proj"),
        ({"rank_equivalent": 1, "targets": ["norm"]}, "is a vector, and only matrices have a rank"),
        (
            {"trainable_token_indices": [96]},
            "96 is not in the vocabulary of 96 tokens: call model.resize_token_embeddings",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(settings, message):
    model = tiny("llama")
    with pytest.raises(UserError, match=message):
        sparsify(model, SparseConfig(**settings))
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "sparsity")


# Positions passed to sparsify


def test_explicit_positions(tmp_path):
    base = tiny("llama")
    chosen = {"model.layers.0.mlp.up_proj.weight": torch.tensor([0, 5, 383]), "model.norm.weight": torch.tensor([2])}
    model = sparsify(copy.deepcopy(base), SparseConfig(), positions=chosen)
    train(model)
    moved = {name: flat.tolist() for name, flat in changed(base, model).items() if len(flat)}
    assert moved == {name: flat.tolist() for name, flat in chosen.items()}
    save_adapter(model, tmp_path)
    assert loss_of(load_adapter(base, tmp_path)).item() == loss_of(model).item()


@pytest.mark.parametrize(
    ("name", "flat", "message"),
    [
        ("model.norm.wieght", [1], "no parameter 'model.norm.wieght'; did you mean 'model.norm.weight'"),
        ("model.norm.weight", [], "needs at least one position, strictly increasing, in 0 to 15"),
        ("model.norm.weight", [3, 3], "strictly increasing"),
        ("model.norm.weight", [3, 16], "in 0 to 15"),
        ("model.norm.weight", [-1, 3], "in 0 to 15"),
    ],
)
def test_positions_that_cannot_be(name, flat, message):
    with pytest.raises(UserError, match=message):
        sparsify(tiny("llama"), SparseConfig(), positions={name: torch.tensor(flat, dtype=torch.int64)})


def test_positions_in_a_module_that_is_trained_whole():
    with pytest.raises(UserError, match=r"'classifier\.bias' is already trained in full"):
        sparsify(tiny("bert", "sequence-classification"), SparseConfig(), positions={"classifier.bias": torch.ones(1)})


# Tokens


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [None, ["embed_tokens", "v_proj"]], ids=["rows-only", "rows-and-scalars"])
def test_rows_of_tokens_are_trained_whole(tied, targets, tmp_path):
    base = tiny("llama", tie_word_embeddings=tied)
    config = SparseConfig(density=0.1, trainable_token_indices=[95, 3], targets=targets)
    model = sparsify(copy.deepcopy(base), config)
    assert model.sparsity.trainable_parameters == round(0.1 * model.sparsity.total_parameters)
    train(model)
    moved = changed(base, model)
    rows = torch.tensor([3, 95])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        in_rows = moved[name][torch.isin(moved[name] // 16, rows)]
        assert len(in_rows) == 2 * 16
        assert (len(moved[name]) > 32) == (targets is not None and (tied or name != "lm_head.weight"))
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert loss_of(loaded).item() == pytest.approx(loss_of(model).item(), abs=1e-6)


@pytest.mark.parametrize("selection", ["bernoulli", "magnitude"])
def test_rows_of_tokens_beside_the_other_ways_to_select(selection, tmp_path):
    base = tiny("llama")
    config = SparseConfig(density=0.3, trainable_token_indices=[4], targets="all", selection=selection)
    model = sparsify(copy.deepcopy(base), config)
    train(model)
    moved = changed(base, model)["model.embed_tokens.weight"]
    assert (moved // 16 == 4).sum() == 16
    save_adapter(model, tmp_path)
    assert loss_of(load_adapter(base, tmp_path)).item() == pytest.approx(loss_of(model).item(), abs=1e-6)


def test_new_tokens_open_on_a_base_whose_new_rows_are_others(tmp_path):
    base = tiny("llama", tie_word_embeddings=True)
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(98)
    model = sparsify(grown, SparseConfig(density=0.1, trainable_token_indices=[96, 97]))
    tokens = torch.tensor([[3, 96, 97, 5]])
    optimizer = adamw(trainable(model))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    expected = model(input_ids=tokens).logits
    save_adapter(model, tmp_path)
    torch.manual_seed(99)
    with pytest.raises(UserError, match=r"resize_token_embeddings\(98\) for its new tokens"):
        load_adapter(base, tmp_path)
    base.resize_token_embeddings(98)
    loaded = load_adapter(base, tmp_path)
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=0, atol=1e-6)


# Dropout on the deltas


def dropped(model: nn.Module, base: nn.Module) -> torch.Tensor:
    """For each selected scalar, the factor of its delta in the last forward."""
    factors = []
    for name, weight in model.sparsity.weights.items():
        flat = weight.flat_positions()
        change = weight.weight.detach().flatten()[flat] - base.get_parameter(name).detach().flatten()[flat]
        factors.append(change / weight.delta.detach())
    return torch.cat(factors)


def test_dropout_leaves_deltas_out_and_scales_up_the_others():
    base, model = both("llama", dropout=0.4, density=0.1)
    with torch.no_grad():
        for weight in model.sparsity.weights.values():
            weight.delta.fill_(0.5)
    masks = []
    for _ in range(50):
        loss_of(model)
        factor = dropped(model, base)
        kept = factor > 0.5
        torch.testing.assert_close(factor[kept], torch.full_like(factor[kept], 1 / 0.6), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(factor[~kept], torch.zeros_like(factor[~kept]), rtol=0, atol=1e-5)
        masks.append(kept)
    share = torch.stack(masks).float().mean()
    assert abs(share - 0.6) < 0.01
    assert not torch.equal(masks[0], masks[1])


def test_dropout_has_the_gradient_of_its_own_mask():
    base, model = both("llama", dropout=0.5, density=0.1)
    with torch.no_grad():
        for weight in model.sparsity.weights.values():
            weight.delta.normal_(std=0.1)
    loss_of(model).backward()
    # The dense model with the weights of this forward
    dense = copy.deepcopy(base).requires_grad_(True)
    for name, weight in model.sparsity.weights.items():
        dense.get_parameter(name).data.copy_(weight.weight)
    factors = dropped(model, base)
    loss_of(dense).backward()
    expected = torch.cat([dense.get_parameter(n).grad.flatten()[w.flat_positions()] for n, w in weights_of(model)])
    found = torch.cat([weight.delta.grad for _, weight in weights_of(model)])
    torch.testing.assert_close(found, expected * factors.round(decimals=1), rtol=1e-4, atol=1e-6)
    assert ((found == 0).float().mean() - 0.5).abs() < 0.1


def weights_of(model: nn.Module):
    return model.sparsity.weights.items()


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_under_gradient_checkpointing(reentrant):
    _, model = both("llama", dropout=0.5, density=0.1)
    twin = copy.deepcopy(model)
    twin.sparsity.counter = model.sparsity.counter
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with torch.no_grad():
        for one, other in zip(trainable(model), trainable(twin), strict=True):
            other.copy_(one.normal_(std=0.1))
    loss_of(model).backward()
    model.sparsity.counter.training_forwards -= 1
    loss_of(twin).backward()
    for one, other in zip(trainable(model), trainable(twin), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_evaluation_and_merging_know_no_dropout():
    base, model = both("llama", dropout=0.5, density=0.1)
    plain = sparsify(copy.deepcopy(base), model.sparsity.config.model_copy(update={"dropout": 0.0}))
    with torch.no_grad():
        for one, other in zip(trainable(model), trainable(plain), strict=True):
            other.copy_(one.normal_(std=0.1))
    expected = plain.eval()(input_ids=TOKENS).logits
    loss_of(model)
    assert torch.equal(model.eval()(input_ids=TOKENS).logits, expected)
    loss_of(model.train())
    merged = merge_and_unload(copy.deepcopy(model)).eval()
    assert torch.equal(merged(input_ids=TOKENS).logits, expected)
    unloaded = unload(model)
    assert not unloaded._forward_pre_hooks
    assert torch.equal(unloaded.eval()(input_ids=TOKENS).logits, base.eval()(input_ids=TOKENS).logits)
