"""A run that resumes with other settings says what is taken from where, takes it, or refuses. One process."""

import json
from pathlib import Path

import pytest
import torch

from sparse_zero import SparseTrainer, UserError
from sparse_zero.checkpoint.directory import Checkpoint
from sparse_zero.checkpoint.settings import read_settings

SAVED = 2
RATE = 0.05


def rates(trainer: SparseTrainer) -> list[float]:
    """The learning rate of each step."""
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def losses(trainer: SparseTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def deltas(trainer: SparseTrainer) -> list[torch.Tensor]:
    return [weight.delta.detach().clone() for weight in trainer.model.sparsity.weights.values()]


def linear(rate: float) -> list[float]:
    """After warmup_steps=0, of six steps."""
    return [rate * (6 - step) / 6 for step in range(6)]


def from_there(run, tmp_path: Path, *args, **known) -> SparseTrainer:
    """Trains six steps in one directory, and from step 2 in another one, with other settings."""
    if not (tmp_path / "first").exists():
        run(tmp_path / "first")
    return run(tmp_path / "second", tmp_path / "first" / f"checkpoint-{SAVED}", *args, **known)


def test_the_checkpoints_rate_goes_on_and_that_is_said(tmp_path: Path, run, caplog) -> None:
    whole = run(tmp_path / "first")
    resumed = from_there(run, tmp_path, learning_rate=1e-5)
    assert rates(resumed) == pytest.approx(linear(RATE))
    assert losses(resumed) == losses(whole)
    (said,) = [record.message for record in caplog.records if "other settings" in record.message]
    assert said.splitlines() == [
        f"{tmp_path}/first/checkpoint-2 was saved with other settings:",
        "  setting                 checkpoint  now    used",
        "  training.learning_rate  0.05        1e-05  the checkpoint's; --reset learning_rate takes the new one",
    ]
    assert resumed.args.learning_rate == 1e-5
    # What is stored is what was used: a second resume says it again.
    assert read_settings(Checkpoint(tmp_path / "second" / "checkpoint-6"))["training"]["learning_rate"] == RATE
    caplog.clear()
    run(tmp_path / "second", True, learning_rate=1e-5)
    assert "the checkpoint's; --reset learning_rate" in caplog.text


def test_with_the_same_settings_nothing_is_said(tmp_path: Path, run, caplog) -> None:
    from_there(run, tmp_path)
    assert "other settings" not in caplog.text


@pytest.mark.parametrize("schedule", ["linear", "constant", "polynomial"])
def test_a_reset_rate_takes_the_checkpoints_place_in_the_schedule(tmp_path: Path, run, schedule: str, caplog) -> None:
    """polynomial: its factors contain the initial rate, so the checkpoint's own goes on only with that."""
    whole = run(tmp_path / "first", lr_scheduler_type=schedule)
    expected = run(tmp_path / "reference", lr_scheduler_type=schedule, learning_rate=0.5)
    kept = from_there(run, tmp_path, lr_scheduler_type=schedule, learning_rate=0.5)
    assert (rates(kept), losses(kept)) == (rates(whole), losses(whole))
    reset = from_there(run, tmp_path, lr_scheduler_type=schedule, learning_rate=0.5, reset=["learning_rate"])
    assert rates(reset) == pytest.approx(rates(whole)[:SAVED] + rates(expected)[SAVED:])
    assert losses(reset)[: SAVED + 1] == losses(whole)[: SAVED + 1]
    assert losses(reset)[SAVED + 1 :] != losses(whole)[SAVED + 1 :]
    assert "training.learning_rate  0.05        0.5  the new one" in caplog.text


def test_a_rate_of_zero_changes_nothing_any_more(tmp_path: Path, run) -> None:
    reset = from_there(run, tmp_path, learning_rate=0.0, reset=["learning_rate"])
    assert all(rate == 0 for rate in rates(reset)[SAVED:])
    at_checkpoint = run(tmp_path / "third", tmp_path / "first" / "checkpoint-2", max_steps=SAVED)
    assert all(torch.equal(*pair) for pair in zip(deltas(reset), deltas(at_checkpoint), strict=True))


def test_more_steps_stretch_the_schedule_from_the_next_step_on(tmp_path: Path, run) -> None:
    """The next step used to have the rate of the old schedule, which is 0 at its end."""
    run(tmp_path, max_steps=4)
    longer = run(tmp_path, True, max_steps=6)
    assert rates(longer)[4:] == pytest.approx(linear(RATE)[4:])


def test_a_weight_decay_is_the_new_one(tmp_path: Path, run, caplog) -> None:
    kept, decayed = from_there(run, tmp_path), from_there(run, tmp_path, weight_decay=0.5)
    assert decayed.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert losses(kept) != losses(decayed)
    assert "training.weight_decay  0.0         0.5  the new one" in caplog.text


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
PLATEAU |= {"metric_for_best_model": "loss"}


def test_another_kind_of_schedule_is_refused_or_reset(tmp_path: Path, run) -> None:
    with pytest.raises(UserError, match="saved with linear, whose state means nothing to reduce_lr_on_plateau"):
        from_there(run, tmp_path, **PLATEAU)
    reset = from_there(run, tmp_path, **PLATEAU, learning_rate=0.01, reset=["learning_rate"])
    assert rates(reset)[SAVED] == 0.01
    with pytest.raises(UserError, match="saved with reduce_lr_on_plateau, whose state means nothing to linear"):
        run(tmp_path / "second", True, max_steps=8)
    back = run(tmp_path / "second", tmp_path / "second" / "checkpoint-4", reset=["learning_rate"])
    assert rates(back)[4:] == pytest.approx(linear(RATE)[4:])


def test_the_settings_of_a_schedule_that_is_restored_are_the_checkpoints(tmp_path: Path, run, caplog) -> None:
    run(tmp_path / "first", **PLATEAU, lr_scheduler_kwargs={"patience": 0})
    resumed = from_there(run, tmp_path, **PLATEAU, lr_scheduler_kwargs={"patience": 9})
    assert resumed.lr_scheduler.patience == 0
    assert "training.lr_scheduler_kwargs.patience  0           9    the checkpoint's" in caplog.text


def test_another_optimizer_without_moments(tmp_path: Path, run) -> None:
    message = r"was saved with AdamW, but the optimizer of this run is SGD; .* with --reset optimizer"
    with pytest.raises(UserError, match=message):
        from_there(run, tmp_path, optim="sgd")
    reset = from_there(run, tmp_path, optim="sgd", reset=["optimizer"])
    assert rates(reset) == pytest.approx(linear(RATE))
    new = from_there(run, tmp_path, reset=["optimizer"])
    assert {float(state["step"]) for state in new.optimizer.state.values()} == {6 - SAVED}


# Data


def test_other_examples_are_refused(tmp_path: Path, run) -> None:
    with pytest.raises(UserError, match=r"other training examples.*\(48 training examples, now 40\).*--reset data"):
        from_there(run, tmp_path, examples=slice(40))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 3}, "training.seed: 42, now 3"),
        ({"data_seed": 3}, "training.data_seed: 42, now 3"),
        ({"train_sampling_strategy": "sequential"}, "training.train_sampling_strategy: random, now sequential"),
    ],
)
def test_another_order_is_refused(tmp_path: Path, run, changed: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_there(run, tmp_path, **changed)


def test_another_seed_that_leaves_the_order_is_taken(tmp_path: Path, run, caplog) -> None:
    whole = run(tmp_path / "first", train_sampling_strategy="sequential")
    resumed = from_there(run, tmp_path, train_sampling_strategy="sequential", seed=3)
    assert losses(resumed) == losses(whole)
    assert "training.seed  42          3    the new one" in caplog.text


def test_reset_data_begins_an_epoch_and_resumes_exactly_from_then_on(tmp_path: Path, run, monkeypatch) -> None:
    """Of the new examples in their order, with the new batch. A later checkpoint has the right place in that epoch."""
    seen: list[list[int]] = []
    step = SparseTrainer.training_step

    def record(self, model, inputs, *args):
        seen.append(inputs["input_ids"][:, 0].tolist())
        return step(self, model, inputs, *args)

    monkeypatch.setattr(SparseTrainer, "training_step", record)
    other = {"examples": slice(8, 32), "gradient_accumulation_steps": 1, "max_steps": 10}
    run(tmp_path / "fresh", **other, killed_at=8)
    expected = seen.copy()
    assert len(expected) == 8  # an epoch of six steps, and two of the next
    seen.clear()
    run(tmp_path / "first", killed_at=3)
    seen.clear()
    whole = from_there(run, tmp_path, **other, reset=["data"])
    assert seen == expected
    for name in ("checkpoint-5", "checkpoint-8", "checkpoint-9"):
        resumed = run(tmp_path / name, tmp_path / "second" / name, **other)
        assert losses(resumed) == losses(whole), name
        assert all(torch.equal(*pair) for pair in zip(deltas(resumed), deltas(whole), strict=True))


def test_fewer_steps_than_the_checkpoint_has_are_refused(tmp_path: Path, run) -> None:
    with pytest.raises(UserError, match=r"training\.max_steps: 1, but .*checkpoint-2 is of step 2"):
        from_there(run, tmp_path, max_steps=1)


def test_an_unknown_name_is_refused(tmp_path: Path, run) -> None:
    with pytest.raises(UserError, match=r"'learnin_rate' is none of .*; did you mean 'learning_rate'\?"):
        run(tmp_path, reset=["learnin_rate"])


# Recipes


def test_a_recipes_changes_are_said_or_refused(recipe, train, tmp_path: Path, caplog, capsys) -> None:
    file = recipe("run", training={"save_total_limit": 10})
    train(file)
    stored = json.loads((tmp_path / "run" / "checkpoint-2" / "settings.json").read_text())
    assert set(stored) == {"model", "data", "sparse", "rpn", "training", "examples"}
    assert "hub_token" not in stored["training"]
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(UserError, match=r"60 training examples, now 50; their contents; data.train_size: none, now"):
        train(file, "data.train_size=50", resume=checkpoint)
    assert (tmp_path / "run" / "checkpoint-4").exists()
    train(file, "data.train_size=50", "rpn.probability=0.5", resume=checkpoint, reset=["data"])
    assert "data.train_size  none        50   the new one" in caplog.text
    assert "rpn              none        set  the new one" in caplog.text
    assert "keeping" not in capsys.readouterr().err


def test_a_data_file_that_has_changed_is_refused(recipe, recipe_base: Path, train, tmp_path: Path) -> None:
    lines = (recipe_base / "train.jsonl").read_text().splitlines(keepends=True)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(lines))
    files = {"train": str(data), "test": str(recipe_base / "test.jsonl")}
    file = recipe("run", data={"data_files": files})
    train(file)
    data.write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(UserError, match=r"order of them \(their contents\), in which its place"):
        train(file, resume=str(tmp_path / "run" / "checkpoint-2"))
