"""A run that is resumed at any step ends bit for bit as the uninterrupted run. One process."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, TrainerCallback

import rpn
from sparse_zero import SparseConfig, SparseTrainer, UserError, sparsify
from sparse_zero.checkpoint.directory import newest_complete
from sparse_zero.checkpoint.export import export
from sparse_zero.ranks.stop_signals import Stopped, StopRequest
from sparse_zero.recipe.training import TrainingArguments
from sparse_zero.training.run import noisy_objective

EXAMPLES = 22
"""With batches of 4, in pairs: three steps per epoch, the last with a single micro-batch."""

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "by-length": {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2},
    "sequential": {"train_sampling_strategy": "sequential"},
    "workers": {"dataloader_num_workers": 1},
    "in-background": {"async_save": True},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2},
    "by-epoch": {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau"}
    | {"lr_scheduler_kwargs": {"patience": 0, "threshold": 0.1}, "metric_for_best_model": "loss"},
    "cosine": {"lr_scheduler_type": "cosine", "optim": "adamw_torch_fused", "weight_decay": 0.1},
    "columns": {"columns": 0.5},
    "whole-columns": {"columns": "whole", "gradient_accumulation_steps": 2},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
}


def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.3,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def examples(count: int) -> list[dict[str, list[int]]]:
    numbers = np.random.default_rng(0)
    rows = [numbers.integers(0, 40, size=12).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


@dataclasses.dataclass
class Run:
    losses: list[tuple[int, float]]
    """(step, loss) of each line of the log."""
    evaluations: list[tuple[int, float]]
    adapter: dict[str, torch.Tensor]
    trainer: SparseTrainer


def train(
    out: Path,
    resume: Path | None = None,
    callbacks: list[TrainerCallback] | None = None,
    stop: StopRequest | None = None,
    columns: float | str = 1,
    **settings: Any,
) -> Run:
    known = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 2, "learning_rate": 3e-2, "max_steps": 8}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 4}
    arguments = TrainingArguments(str(out), **quiet | known | settings)
    config = SparseConfig(density=0.25, targets=["v_proj", "o_proj"], modules_to_save=["lm_head"], dropout=0.2)
    config = config.model_copy(update={"columns": columns})
    sparse = sparsify(model(), config)
    objective = noisy_objective(sparse, rpn.RPNConfig(probability=0.2, passes=1), arguments)
    data = examples(EXAMPLES)
    trainer = SparseTrainer(
        sparse,
        arguments,
        train_dataset=data,
        eval_dataset=data[:6],
        callbacks=callbacks,
        objective=objective,
        stop=stop,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out / "adapter"))
    return described(trainer, out)


def described(trainer: SparseTrainer, out: Path) -> Run:
    history = trainer.state.log_history
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    return Run(losses, evaluations, load_file(out / "adapter" / "adapter_model.safetensors"), trainer)


def assert_same(resumed: Run, whole: Run) -> None:
    assert resumed.losses == whole.losses
    assert resumed.evaluations == whole.evaluations
    assert resumed.adapter.keys() == whole.adapter.keys()
    for name, values in whole.adapter.items():
        assert torch.equal(resumed.adapter[name], values), name


Undisturbed = Callable[..., tuple[Path, Run]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Gives a run of these settings and its directory, for reading only: it is made once."""
    made: dict[str, tuple[Path, Run]] = {}

    def undisturbed(stops_early: bool = False, **settings: Any) -> tuple[Path, Run]:
        key = repr((stops_early, sorted(settings.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed")
            made[key] = out, train(out, callbacks=early_stopping() if stops_early else None, **settings)
        return made[key]

    return undisturbed


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_from_any_step(undisturbed: Undisturbed, tmp_path: Path, name: str) -> None:
    directory, whole = undisturbed(**SETTINGS[name])
    assert len({loss for _, loss in whole.losses}) == 4
    for step in (1, 3, 6, 8):
        resumed = train(tmp_path / f"from-{step}", directory / f"checkpoint-{step}", **SETTINGS[name])
        assert_same(resumed, whole)


def test_the_seed_matters(tmp_path: Path) -> None:
    """Without this, the tests above could not detect a random generator that is not resumed."""
    runs = [train(tmp_path / str(seed), seed=seed, data_seed=0) for seed in (1, 2)]
    assert runs[0].losses[0] != runs[1].losses[0]


def test_a_checkpoint_holds_no_pickle_and_no_frozen_weight(undisturbed: Undisturbed) -> None:
    run, _ = undisturbed()
    files = sorted(path.name for path in (run / "checkpoint-3").iterdir())
    assert files == ["manifest.json", "settings.json", "shard-00000-of-00001.safetensors", "trainer_state.json"]
    shard = load_file(run / "checkpoint-3" / "shard-00000-of-00001.safetensors")
    trainable = sum(v.numel() for v in load_file(run / "adapter" / "adapter_model.safetensors").values())
    assert {name: v.numel() for name, v in shard.items() if not name.startswith("random.")} == dict.fromkeys(
        ("value", "exp_avg", "exp_avg_sq"), trainable
    )


def early_stopping() -> list[TrainerCallback]:
    return [EarlyStoppingCallback(early_stopping_patience=2)]


EARLY = {"metric_for_best_model": "loss", "greater_is_better": True}
"""The loss falls: the first evaluation is the best, and the third ends the training."""


@pytest.mark.parametrize("step", [1, 2, 3, 4, 6])
def test_early_stopping_keeps_its_count(undisturbed: Undisturbed, tmp_path: Path, step: int) -> None:
    settings = EARLY | {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 1}
    directory, whole = undisturbed(stops_early=True, **settings)
    assert whole.trainer.state.global_step == 6
    checkpoint = directory / f"checkpoint-{step}"
    resumed = train(tmp_path / "resumed", checkpoint, callbacks=early_stopping(), **settings)
    assert resumed.trainer.state.global_step == 6
    assert_same(resumed, whole)


class Raise(TrainerCallback):
    """Raises a stop request at the n-th occurrence of an event."""

    def __init__(self, stop: StopRequest, event: str, number: int) -> None:
        self.stop, self.left = stop, number
        setattr(self, event, self._count)

    def _count(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.stop.is_raised = True


STOPS = {
    "before-the-first-step": ("on_train_begin", 1, {"epoch": 0, "steps": 0}),
    "in-a-step": ("on_step_begin", 4, {"epoch": 4, "steps": 4}),
    "at-an-epochs-last-step": ("on_step_begin", 6, {"epoch": 6, "steps": 6}),
    "in-an-evaluation": ("on_prediction_step", 2, {"epoch": 6, "steps": 3}),
    "in-the-last-evaluation": ("on_prediction_step", 4, {"epoch": 8, "steps": 6}),
}
"""The event, which occurrence of it, and the step that is saved."""


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_a_run_resumed_after_a_signal_has_the_same_result(
    undisturbed: Undisturbed, tmp_path: Path, name: str, strategy: str
) -> None:
    event, number, steps = STOPS[name]
    settings = {"eval_strategy": strategy, "eval_steps": 3, "save_strategy": strategy, "save_steps": 3}
    settings |= {"per_device_eval_batch_size": 2}
    settings |= {"metric_for_best_model": "loss", "load_best_model_at_end": True}
    _, whole = undisturbed(stops_early=True, **settings)
    stop = StopRequest()
    callbacks = [*early_stopping(), Raise(stop, event, number)]
    with pytest.raises(Stopped) as stopped:
        train(tmp_path / "cut", callbacks=callbacks, stop=stop, **settings)
    found, problems = newest_complete(tmp_path / "cut")
    assert problems == []
    assert stopped.value.step == (found.step if found else 0) == steps[strategy]
    resume = found.directory if found else None
    resumed = train(tmp_path / "cut", resume, callbacks=early_stopping(), **settings)
    assert_same(resumed, whole)
    assert resumed.trainer.state.best_global_step == whole.trainer.state.best_global_step
    assert (
        Path(resumed.trainer.state.best_model_checkpoint).name == Path(whole.trainer.state.best_model_checkpoint).name
    )


def test_a_signal_in_the_evaluation_after_training(tmp_path: Path) -> None:
    stop = StopRequest()
    run = train(tmp_path / "run", save_strategy="no", stop=stop)
    stop.is_raised = True
    with pytest.raises(Stopped) as stopped:
        run.trainer.evaluate()
    assert stopped.value.checkpoint == str(tmp_path / "run" / "checkpoint-8")
    resumed = train(tmp_path / "again", tmp_path / "run" / "checkpoint-8", save_strategy="no")
    assert_same(resumed, run)


def test_the_adapter_of_a_checkpoint(undisturbed: Undisturbed, tmp_path: Path) -> None:
    directory, run = undisturbed()
    export(directory / "checkpoint-8", tmp_path / "adapter")
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert exported.keys() == run.adapter.keys()
    assert all(torch.equal(exported[name], values) for name, values in run.adapter.items())


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "batch": (lambda: {"per_device_train_batch_size": 2}, "was saved with 4 examples per step, but this run has 2"),
    "optimizer": (lambda: {"optim": "sgd"}, "was saved with AdamW, but the optimizer of this run is SGD"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_batch_or_optimizer_is_an_error(undisturbed: Undisturbed, tmp_path: Path, name: str) -> None:
    directory, _ = undisturbed()
    changed, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "other", directory / "checkpoint-2", **changed())


def test_another_selection_is_an_error(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = undisturbed()
    monkeypatch.setitem(globals(), "SparseConfig", functools.partial(SparseConfig, seed=1))
    with pytest.raises(UserError, match=r"checkpoint-2: has another selection \(tensors differ\)"):
        train(tmp_path / "other", directory / "checkpoint-2")


def test_another_base_model_is_an_error(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = undisturbed()
    other = model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.05)
    monkeypatch.setitem(globals(), "model", lambda: other)
    with pytest.raises(
        UserError, match=r"checkpoint-2: was saved with a base model whose weights differ in '.*up_proj.weight'"
    ):
        train(tmp_path / "other", directory / "checkpoint-2")


def test_a_failed_save_is_logged_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sparse_zero.checkpoint import writer

    writes = []

    def full(path: Path, *rest: Any) -> Any:
        writes.append(path)
        if len(writes) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(path, *rest)

    write = writer.write_tensors
    monkeypatch.setattr(writer, "write_tensors", full)
    run = train(tmp_path / "run", max_steps=3)
    assert run.trainer.state.global_step == 3
    assert "checkpoint-2: not saved: rank 0: " in caplog.text
    assert "shard-00000-of-00001.safetensors: No space left on device; training continues" in caplog.text
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["adapter", "checkpoint-1", "checkpoint-3"]


@pytest.mark.parametrize("in_background", [False, True])
def test_the_last_and_the_best_are_kept(tmp_path: Path, in_background: bool) -> None:
    settings = EARLY | {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 2}
    settings |= {"load_best_model_at_end": True}
    run = train(tmp_path / "run", async_save=in_background, **settings)
    assert run.trainer.state.best_global_step == 1
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-8"]
