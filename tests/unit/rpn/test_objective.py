"""The training objective: the gradient of the sum of all passes, with the memory of one pass."""

import weakref

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import rpn
from rpn import RPNConfig, Stream

OWN_SETTINGS = {
    "rpn": {"probability": 0.3},
    "gaussian": {"std": 0.2},
    "salt-and-pepper": {"probability": 0.3},
    "neftune": {"alpha": 15.0},
    "symnoise": {"alpha": 15.0},
    "freelb": {"ascent_step": 0.3, "ascent_radius": 1.0},
}


class Trainer:
    """A tiny BERT with noise, and a record of its forwards and backwards."""

    def __init__(self, config: RPNConfig, noise=None):
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.model = BertForSequenceClassification(
            BertConfig(vocab_size=60, **shape, **no_dropout, initializer_range=0.2)
        ).train()
        self.config = config
        self.handle = rpn.attach(self.model, config, noise=noise)
        self.ids = torch.randint(5, 60, (8, 9))
        self.mask = torch.arange(9) < torch.tensor([9, 4, 6, 2, 8, 9, 3, 5])[:, None]
        self.labels = torch.arange(8) % 2
        self.events: list = []

    def loss(self, rows: slice = slice(None)) -> Tensor:
        self.events.append("forward")
        return self.model(self.ids[rows], attention_mask=self.mask[rows], labels=self.labels[rows]).loss

    def backward(self, loss: Tensor, last: bool) -> None:
        self.events.append(("backward", last))
        loss.backward()

    def run(self) -> dict[str, Tensor]:
        return rpn.run_passes(self.handle, self.config, self.loss, self.backward)

    def take_gradients(self) -> dict[str, Tensor]:
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return gradients


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert any(gradient.abs().sum() > 1e-3 for gradient in expected.values())
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("noise", ["rpn", "gaussian", "salt-and-pepper", "neftune", "symnoise"])
@pytest.mark.parametrize("clean", [True, False])
def test_equals_the_summed_loss_in_one_graph(noise: str, clean: bool) -> None:
    config = RPNConfig(
        noise=noise,
        clean=clean,
        passes=3,
        clean_weight=0.7,
        noisy_weight=0.4,
        scope="sequence",
        **OWN_SETTINGS[noise],
    )
    trainer = Trainer(config)
    trainer.handle.place(step=3)
    losses = trainer.run()
    actual = trainer.take_gradients()

    with trainer.handle.clean():
        clean_loss = trainer.loss()
    noisy = []
    for pass_index in range(3):
        with trainer.handle.noisy(pass_index):
            noisy.append(trainer.loss())
    total = 0.4 * sum(noisy) + (0.7 * clean_loss if clean else 0)
    total.backward()
    assert_same_gradients(actual, trainer.take_gradients())
    # Each pass had different noise
    assert len({loss.item() for loss in [clean_loss, *noisy]}) == 4
    torch.testing.assert_close(losses["total"], total.detach())
    torch.testing.assert_close(losses["noisy"], (sum(noisy) / 3).detach())
    assert ("clean" in losses) == clean
    if clean:
        assert losses["clean"] == clean_loss
    assert not any(loss.requires_grad for loss in losses.values())


@pytest.mark.parametrize(
    ("settings", "backwards"),
    [
        ({"passes": 2}, [False, False, True]),
        ({"passes": 2, "clean": False}, [False, True]),
        ({"passes": 1, "clean": False}, [True]),
        ({"passes": 0}, [True]),
        ({"noise": "none", "passes": 3}, [True]),
        ({"noise": "freelb", "passes": 2}, [False, False, True]),
    ],
)
def test_passes_run_one_after_another_and_only_the_last_one_is_last(settings: dict, backwards: list[bool]) -> None:
    trainer = Trainer(RPNConfig(**settings))
    trainer.run()
    assert trainer.events == [event for last in backwards for event in ("forward", ("backward", last))]


@pytest.mark.parametrize("settings", [{"passes": 0}, {"noise": "none", "passes": 2}])
def test_without_noise_it_is_the_clean_loss(settings: dict) -> None:
    trainer = Trainer(RPNConfig(**settings))
    losses = trainer.run()
    actual = trainer.take_gradients()
    trainer.handle.detach()
    expected = trainer.loss()
    expected.backward()
    assert_same_gradients(actual, trainer.take_gradients())
    assert losses == {"total": expected.detach(), "clean": expected.detach()}
    assert rpn.run_passes(None, RPNConfig(passes=2), trainer.loss, trainer.backward) == losses


def test_keeps_the_graph_of_one_pass_only() -> None:
    trainer = Trainer(RPNConfig(passes=3))
    alive_before: list[int] = []
    graphs: list[weakref.ref] = []

    class Saved(torch.autograd.Function):
        """Its saved tensor lives as long as the graph of its pass."""

        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.activation = torch.zeros(1)
            graphs.append(weakref.ref(ctx.activation))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return gradient

    def forward() -> Tensor:
        alive_before.append(sum(graph() is not None for graph in graphs))
        return Saved.apply(trainer.loss())

    rpn.run_passes(trainer.handle, trainer.config, forward, trainer.backward)
    assert alive_before == [0, 0, 0, 0]
    assert len(graphs) == 4


@pytest.mark.parametrize("noise", ["rpn", "gaussian", "salt-and-pepper", "neftune", "symnoise", "freelb"])
@pytest.mark.parametrize(("ranks", "micro_steps"), [(2, 1), (4, 1), (2, 2), (1, 4)])
def test_sequence_scope_gives_the_same_training_on_any_number_of_ranks(
    noise: str, ranks: int, micro_steps: int
) -> None:
    trainer = Trainer(RPNConfig(noise=noise, passes=2, scope="sequence", seed=5, **OWN_SETTINGS[noise]))
    trainer.handle.place(step=1)
    whole = trainer.run()
    expected = trainer.take_gradients()

    parts = ranks * micro_steps
    losses = []
    for micro_step in range(micro_steps):
        for rank in range(ranks):
            first = (micro_step * ranks + rank) * 8 // parts
            rows = slice(first, first + 8 // parts)
            trainer.handle.place(step=1, micro_step=micro_step, rank=rank, world_size=ranks)
            losses.append(
                rpn.run_passes(
                    trainer.handle,
                    trainer.config,
                    lambda rows=rows: trainer.loss(rows),
                    lambda loss, last: (loss / parts).backward(),
                )["total"]
            )
    torch.testing.assert_close(sum(losses) / parts, whole["total"], atol=1e-5, rtol=0)
    assert_same_gradients(trainer.take_gradients(), expected)


def test_batch_scope_has_different_noise_on_each_rank() -> None:
    trainer = Trainer(RPNConfig(clean=False))
    losses = set()
    for rank in range(3):
        trainer.handle.place(step=1, rank=rank, world_size=3)
        losses.add(trainer.run()["total"].item())
    assert len(losses) == 3


def test_resuming_repeats_the_noise() -> None:
    config = RPNConfig(passes=2, noise="rpn", seed=9)
    trainer = Trainer(config)
    for step in range(3):
        trainer.handle.place(step=step)
        losses = trainer.run()
    resumed = Trainer(config)
    resumed.handle.place(step=2)
    assert resumed.run() == losses


def test_the_loss_increases_from_pass_to_pass_with_freelb() -> None:
    trainer = Trainer(RPNConfig(noise="freelb", clean=False, passes=4, ascent_step=0.5, ascent_radius=2.0))
    losses: list[float] = []

    def forward() -> Tensor:
        loss = trainer.loss()
        losses.append(loss.item())
        return loss

    trainer.handle.place(step=0)
    total = rpn.run_passes(trainer.handle, trainer.config, forward, trainer.backward)["total"]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 0.01
    assert total.item() == pytest.approx(sum(losses))
    # It works with a frozen model as well: the perturbation still requires a gradient
    trainer.model.bert.requires_grad_(False)
    assert trainer.run()["total"] == total
    # The next step starts with a new perturbation
    trainer.handle.place(step=1)
    assert trainer.run()["total"] != total


def test_a_custom_noise_is_called_in_every_pass() -> None:
    seen: list[int] = []

    def count(embeddings: Tensor, keep: Tensor, stream: Stream) -> Tensor:
        seen.append(stream.pass_index)
        return embeddings

    trainer = Trainer(RPNConfig(passes=3), noise=count)
    trainer.run()
    assert seen == [0, 1, 2]


def test_an_objective_without_terms_is_an_error() -> None:
    config = RPNConfig(clean=False)
    with pytest.raises(ValueError, match="no loss to train on"):
        rpn.run_passes(None, config, lambda: torch.zeros(()), lambda loss, last: None)
    for settings in ({"passes": 0}, {"noise": "none"}):
        with pytest.raises(ValidationError, match="clean: false leaves no loss to train on"):
            RPNConfig(clean=False, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"probability": 0},
        {"probability": 1.1},
        {"passes": -1},
        {"clean_weight": 0},
        {"noise": "pgd"},
        {"scope": "token"},
        {"std": 0},
        {"pases": 1},
    ],
)
def test_settings_out_of_range_are_errors_that_name_the_key(settings: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        RPNConfig(**settings)


@pytest.mark.parametrize("noise", OWN_SETTINGS)
@pytest.mark.parametrize(
    ("setting", "value", "owners"),
    [
        ("probability", 0.2, ("rpn", "salt-and-pepper")),
        ("std", 0.2, ("gaussian",)),
        ("alpha", 15.0, ("neftune", "symnoise")),
        ("ascent_step", 0.3, ("freelb",)),
        ("ascent_radius", 1.0, ("freelb",)),
    ],
)
def test_a_setting_of_another_noise_is_an_error_that_names_both(
    noise: str, setting: str, value: float, owners: tuple[str, ...]
) -> None:
    if noise in owners:
        assert getattr(RPNConfig(noise=noise, **{setting: value}), setting) == value
        return
    with pytest.raises(
        ValidationError, match=f"{setting} is a setting of noise: {' and '.join(owners)}, not of noise: {noise};"
    ):
        RPNConfig(noise=noise, **{setting: value})


@pytest.mark.parametrize("noise", OWN_SETTINGS)
def test_defaults_belong_to_every_noise(noise: str) -> None:
    config = RPNConfig(noise=noise, **OWN_SETTINGS[noise])
    assert RPNConfig(**config.model_dump()) == config


def test_noise_none_allows_any_setting() -> None:
    assert RPNConfig(noise="none", **{key: value for own in OWN_SETTINGS.values() for key, value in own.items()})


def test_runs_on_a_model_that_is_not_from_transformers() -> None:
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, 12), nn.Linear(12, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.table(input_ids).tanh().mean(1))

    torch.manual_seed(0)
    model, config = Bag(), RPNConfig(probability=0.5)
    handle = rpn.attach(model, config)
    losses = rpn.run_passes(
        handle,
        config,
        lambda: model(torch.arange(12).view(2, 6)).logsumexp(1).mean(),
        lambda loss, last: loss.backward(),
    )
    assert losses["noisy"] != losses["clean"]
    assert model.table.weight.grad[:12].abs().sum() > 0
