"""Scalars can be selected from any kind of parameter: compared with dense gradients and masked dense training."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from families import VOCABULARY, tiny
from sparse_cases import adamw, assert_same_bits, plain_state, trainable
from torch import nn
from transformers import PreTrainedModel

from sparse_zero.errors import UserError
from sparse_zero.model.layers import sparse_class
from sparse_zero.model.sparsify import disable_adapter, merge_and_unload, sparsify, unload
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.targets import find_modules_to_save, find_targets

TOKENS = torch.tensor([[3, 4, 5, 4, 4, 9], [7, 3, 0, 3, 95, 94]])


class OwnModule(nn.Module):
    """A custom module: parameters of the root, one of them used twice, and the weight of a child that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))
        self.mix = nn.Parameter(torch.randn(2, 6, 6))
        self.inner = nn.Linear(6, 6)
        self.unread = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x * self.gain) @ self.mix[0] + (x @ self.mix[1]) * self.gain
        # Uses the weight of a linear layer whose forward never runs
        return self.inner(x).tanh() @ self.unread.weight.t() + self.unread.bias


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sequence = nn.Conv1d(4, 6, 3, padding=1, groups=2)
        self.image = nn.Conv2d(6, 5, 3, stride=2)
        self.back = nn.ConvTranspose2d(5, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.sequence(x)
        return self.back(self.image(x.unsqueeze(-1).expand(*x.shape, 7)))


class SharedLayer(nn.Module):
    """One layer that runs three times in each forward, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.layer(x).tanh()
        return x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Padded(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, **settings)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens))


class TransposedExperts(nn.Module):
    """Experts whose inputs are in the rows, as in Llama 4 and GPT-OSS: read one by one, and all together."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 6, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.stack([x[i] @ self.gate_up_proj[i] for i in range(3)]).chunk(2, dim=-1)
        return torch.bmm(gate.tanh() * up, self.down_proj) + torch.bmm(up, self.down_proj)


def of_model(**inputs: torch.Tensor) -> Callable[[nn.Module], torch.Tensor]:
    return lambda model: model(**inputs).loss


def squared(*shape: int) -> Callable[[nn.Module], torch.Tensor]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    return lambda model: model(x).square().sum()


def language(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


def experts(implementation: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = tiny("qwen2_moe", router_aux_loss_coef=0.0)
        # With its small random weights, the experts' gradients would vanish
        for name, parameter in model.named_parameters():
            if "experts" in name or "proj" in name:
                nn.init.normal_(parameter, std=0.3)
        model.set_experts_implementation(implementation)
        return model

    return build


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.Tensor], list[str] | str]] = {
    "embedding": (lambda: tiny("llama", tie_word_embeddings=False), language, ["embed_tokens"]),
    "embedding-padding": (lambda: Padded(padding_idx=4), lambda m: m(TOKENS).square().sum(), ["embedding", "head"]),
    "embedding-frequency": (
        lambda: Padded(scale_grad_by_freq=True),
        lambda m: m(TOKENS).square().sum(),
        ["embedding"],
    ),
    "scaled-embedding": (lambda: tiny("gemma3_text", tie_word_embeddings=False), language, ["embed_tokens"]),
    "positions": (lambda: tiny("gpt2"), language, ["wpe", "attn.c_attn"]),
    "norms": (lambda: tiny("llama"), language, ["*norm"]),
    "layer-norm-and-bias": (lambda: tiny("gpt2"), language, ["ln_1", "ln_f.bias", "c_fc.bias"]),
    "weight-and-bias": (lambda: tiny("qwen2"), language, ["v_proj", "v_proj.bias", "q_proj.bias"]),
    "tied": (lambda: tiny("llama", tie_word_embeddings=True), language, ["embed_tokens", "v_proj"]),
    "tied-conv1d": (lambda: tiny("gpt2"), language, ["lm_head"]),
    "tied-scaled": (lambda: tiny("gemma3_text", tie_word_embeddings=True), language, ["lm_head"]),
    "experts-eager": (experts("eager"), language, ["experts"]),
    "experts-grouped": (experts("grouped_mm"), language, ["experts", "mlp.gate"]),
    "experts-batched": (experts("batched_mm"), language, ["experts.down_proj"]),
    "experts-transposed": (TransposedExperts, squared(3, 5, 6), ["gate_up_proj", "down_proj"]),
    "convolutions": (Convolutions, squared(2, 4, 9), ["sequence", "image", "back", "*.bias"]),
    "own-module": (OwnModule, squared(5, 6), ["gain", "mix", "inner", "unread", "unread.bias"]),
    "shared-layer": (SharedLayer, squared(5, 8), ["layer", "layer.bias"]),
    "attention": (Attention, squared(2, 5, 8), ["in_proj_weight", "out_proj", "out_proj.bias", "in_proj_bias"]),
    "everything": (
        lambda: tiny("bert", "sequence-classification"),
        of_model(input_ids=TOKENS, labels=torch.tensor([0, 1])),
        "all",
    ),
}
DENSITY = 0.2
WITH_COLUMNS = [
    *("embedding-padding", "positions", "weight-and-bias", "tied", "tied-conv1d", "experts-eager", "experts-grouped"),
    *("experts-batched", "experts-transposed", "own-module", "shared-layer", "attention", "everything"),
]
"""Kinds some of whose scalars are drawn within columns."""
CASES = [(kind, {}) for kind in KINDS]
CASES += [(kind, {"columns": columns}) for kind in WITH_COLUMNS for columns in (0.5, "whole")]
CASES += [(kind, {"columns": 0.5, "indices": "regenerated"}) for kind in ("tied", "experts-transposed", "positions")]
EVERY_CASE = pytest.mark.parametrize(
    ("kind", "settings"), CASES, ids=["-".join([kind, *map(str, settings.values())]) for kind, settings in CASES]
)


def build(kind: str, **settings: object) -> tuple[nn.Module, nn.Module, Callable[[nn.Module], torch.Tensor]]:
    make, loss, targets = KINDS[kind]
    torch.manual_seed(0)
    base = make()
    chosen = SparseConfig(density=density_within(base, targets), targets=targets)
    return base, sparsify(copy.deepcopy(base), chosen.model_copy(update=settings)), loss


def density_within(base: nn.Module, targets: list[str] | str) -> float:
    """The density of the whole model that selects the fraction DENSITY of these targets."""
    config = SparseConfig(targets=targets)
    heads = find_modules_to_save(base, config)
    sizes = [target.shape.numel() for target in find_targets(base, config, heads).values()]
    whole = sum(p.numel() for name in heads for p in base.get_submodule(name).parameters())
    return (DENSITY * sum(sizes) + whole + len(sizes)) / sum(p.numel() for p in base.parameters())


def positions(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.selection.positions() for name, weight in model.sparsity.weights.items()}


def nudge(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.sparsity.weights.values():
            weight.delta.add_(0.05 * torch.randn(weight.delta.shape, generator=generator))


def dense_twin(base: nn.Module, model: nn.Module) -> nn.Module:
    """The base model with the deltas added to its weights."""
    dense = copy.deepcopy(base).requires_grad_(True)
    parameters = dict(dense.named_parameters())
    for name, flat in positions(model).items():
        parameters[name].data.view(-1)[flat] += model.sparsity.weights[name].delta.detach()
    return dense


@EVERY_CASE
def test_gradients_are_those_of_the_dense_model_at_the_selected_positions(kind, settings):
    base, model, loss = build(kind, **settings)
    nudge(model)
    dense = dense_twin(base, model)
    ours, theirs = loss(model), loss(dense)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ours.backward()
    theirs.backward()
    parameters = dict(dense.named_parameters())
    for name, flat in positions(model).items():
        gradient, expected = model.sparsity.weights[name].delta.grad, parameters[name].grad.flatten()[flat]
        scale = parameters[name].grad.abs().max()
        assert scale > 0, f"{name} has no gradient to compare"
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * scale.item())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@EVERY_CASE
def test_training_equals_masked_dense_training(kind, settings):
    base, model, loss = build(kind, **settings)
    selected = positions(model)
    optimizer, losses = adamw(trainable(model)), []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        losses.append(value.item())
        optimizer.step()
    torch.testing.assert_close(losses, masked_training(base, model, selected, loss), rtol=1e-4, atol=1e-5)


def masked_training(
    base: nn.Module, model: nn.Module, selected: dict[str, torch.Tensor], loss: Callable[[nn.Module], torch.Tensor]
) -> list[float]:
    dense = copy.deepcopy(base).requires_grad_(True)
    weights = dict(dense.named_parameters())
    pretrained = {name: weights[name].detach().flatten()[flat].clone() for name, flat in selected.items()}
    changes = {name: torch.zeros(flat.numel(), requires_grad=True) for name, flat in selected.items()}
    optimizer, losses = adamw([*changes.values(), *(weights[name] for name in model.sparsity.whole)]), []
    for _ in range(5):
        dense.zero_grad()
        value = loss(dense)
        value.backward()
        losses.append(value.item())
        for name, flat in selected.items():
            changes[name].grad = weights[name].grad.flatten()[flat]
        optimizer.step()
        with torch.no_grad():
            for name, flat in selected.items():
                weights[name].view(-1)[flat] = pretrained[name] + changes[name]
    return losses


@EVERY_CASE
def test_merging_disabling_and_unloading(kind, settings):
    base, model, loss = build(kind, **settings)
    nudge(model)
    before, adapted, plain = plain_state(base), loss(model).item(), loss(base).item()
    assert adapted != pytest.approx(plain, rel=5e-6)
    with disable_adapter(model):
        # torch's attention uses other kernels if a gradient is needed
        assert loss(model).item() == pytest.approx(plain, rel=1e-6)
    assert loss(model).item() == adapted
    merged = merge_and_unload(copy.deepcopy(model))
    assert loss(merged).item() == pytest.approx(adapted, rel=1e-6)
    assert_same_bits(plain_state(unload(model)), before)
    for plain_model in (merged, model):
        assert [type(m) for m in plain_model.modules()] == [type(m) for m in base.modules()]
        assert [n for n, _ in plain_model.named_parameters()] == [n for n, _ in base.named_parameters()]


@pytest.mark.parametrize("kind", ["tied", "tied-conv1d", "tied-scaled"])
def test_tied_weights_stay_tied(kind, tmp_path):
    base, model, loss = build(kind)
    nudge(model)
    adapted = loss(model).item()
    merged = merge_and_unload(model)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    merged.save_pretrained(tmp_path)
    reloaded = type(base).from_pretrained(tmp_path).train()
    assert reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight
    assert loss(reloaded).item() == pytest.approx(adapted, abs=1e-6)


@pytest.mark.parametrize("kind", ["norms", "experts-grouped", "tied", "weight-and-bias", "embedding"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("columns", [1, 0.5, "whole"])
def test_gradient_checkpointing(kind, reentrant, columns):
    base, model, loss = build(kind, columns=columns)
    nudge(model)
    dense = dense_twin(base, model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    loss(model).backward()
    loss(dense).backward()
    parameters = dict(dense.named_parameters())
    for name, flat in positions(model).items():
        expected = parameters[name].grad.flatten()[flat]
        torch.testing.assert_close(model.sparsity.weights[name].delta.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["weight-and-bias", "own-module", "tied", "experts-eager"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("columns", [1, 0.5, "whole"])
def test_copies_train_on_their_own(kind, how, columns):
    _, model, loss = build(kind, columns=columns)
    nudge(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    before = loss(model).item()
    assert loss(twin).item() == before
    loss(twin).backward()
    torch.optim.SGD(trainable(twin), lr=1.0).step()
    assert loss(twin).item() != before
    assert loss(model).item() == before


def test_a_graph_from_before_a_write_is_refused():
    # The tensor that was read shares the weight's memory, so autograd must detect the write
    _, model, loss = build("norms")
    value = loss(model)
    loss(model).backward()
    torch.optim.SGD(trainable(model), lr=1.0).step()
    loss(model)
    with pytest.raises(UserError, match="its deltas have changed between a forward and the backward"):
        value.backward()


def test_readers_outside_of_a_forward():
    _, model, _ = build("weight-and-bias")
    nudge(model)
    layer = model.model.layers[0].self_attn.v_proj
    weight = model.get_parameter("model.layers.0.self_attn.v_proj.weight")
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(weight, merge_and_unload(copy.deepcopy(model)).model.layers[0].self_attn.v_proj.weight)
    with torch.no_grad():
        assert layer.weight is layer._parameters["weight"]


def test_a_linear_layer_keeps_its_sampled_gradient_when_its_bias_is_selected_too():
    kinds = sparse_class(nn.Linear, frozenset({"weight", "bias"})).__mro__
    assert "SampledModule" in {kind.__name__ for kind in kinds}
    assert "SampledModule" not in {kind.__name__ for kind in sparse_class(nn.Linear, frozenset({"bias"})).__mro__}
