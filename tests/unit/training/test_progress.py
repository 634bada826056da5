"""The bar, the lines and the curves of a run."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from sparse_zero import SparseConfig, SparseTrainer, sparsify
from sparse_zero.recipe.training import TrainingArguments
from sparse_zero.training import progress
from sparse_zero.training.curves import RunCurves, curve_directory
from sparse_zero.training.progress import WINDOW_SECONDS, JobProgress, Pace, count_batch, other_line, step_line


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Console(io.StringIO):
    """A stderr that is a terminal, or is none."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    @property
    def lines(self) -> list[str]:
        """What is not drawn over."""
        return [line for line in re.split(r"\r|\n|\x1b\[A", self.getvalue()) if line.startswith("step")]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def console(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> Console:
    """In the test's own body: between a fixture and its test pytest puts its own stderr in place."""
    stream = Console(is_terminal)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(progress, "peak_memory_bytes", lambda: 5 * 2**28)
    return stream


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"labels": torch.zeros(4), "input_ids": torch.zeros(4, 7)}, (4, 28)),
        ({"input_ids": torch.zeros(4, 3, 7)}, (4, 84)),  # multiple choice
        ({"inputs_embeds": torch.zeros(4, 7, 16)}, (4, 28)),
        ({"scale": torch.tensor(1.0), "pixel_values": torch.zeros(2, 3, 8, 8)}, (2, 0)),
        ({"texts": ["a", "b"]}, (0, 0)),
    ],
)
def test_count_batch(inputs: dict[str, Any], expected: tuple[int, int]) -> None:
    assert count_batch(inputs) == expected


def step(pace: Pace, clock: Clock, seconds: float, *batches: tuple[int, int]) -> None:
    for batch in batches:
        pace.count(*batch)
    clock.wait(seconds)
    pace.end_step()


def test_rates_are_of_all_ranks_and_micro_batches(clock: Clock) -> None:
    pace = Pace(ranks=3, clock=clock)
    assert (pace.samples_per_second, pace.tokens_per_second, pace.steps_per_second) == (0, 0, None)
    clock.wait(100)  # examples are skipped, the base is evaluated
    pace.begin()
    step(pace, clock, 0.5, (4, 28), (4, 40))
    assert (pace.samples_per_second, pace.tokens_per_second, pace.steps_per_second) == (48, 408, 2)
    step(pace, clock, 1.5, (4, 28), (4, 32))
    assert (pace.samples_per_second, pace.tokens_per_second, pace.steps_per_second) == (24, 192, 1)


def test_rates_are_of_the_last_steps(clock: Clock) -> None:
    pace = Pace(ranks=1, clock=clock)
    pace.begin()
    for _ in range(10):
        step(pace, clock, 2, (2, 20))
    assert pace.samples_per_second == 1
    for _ in range(round(WINDOW_SECONDS)):
        step(pace, clock, 1, (8, 80))
    assert (pace.samples_per_second, pace.tokens_per_second) == (8, 80)
    assert pace.steps_per_second == (10 + WINDOW_SECONDS) / (20 + WINDOW_SECONDS)
    step(pace, clock, 100, (50, 0))  # one step outlasts the window
    assert pace.samples_per_second == 0.5


def test_what_is_left_out_is_in_the_remaining_time_only(clock: Clock) -> None:
    pace = Pace(ranks=1, clock=clock)
    pace.begin()
    step(pace, clock, 1, (6, 60))
    clock.wait(9)
    pace.leave_out()
    step(pace, clock, 1, (6, 60))
    assert pace.samples_per_second == 6
    assert pace.steps_per_second == 2 / 11


def test_step_line(clock: Clock) -> None:
    pace = Pace(ranks=4, clock=clock)
    pace.begin()
    for _ in range(20):
        step(pace, clock, 0.5, (64, 1625))
    logs = {"loss": 0.43214, "grad_norm": 2.0, "learning_rate": 1.2e-3, "reward": 3.0, "epoch": 0.7}
    assert step_line(120, 500, logs, pace, 5 * 2**28) == (
        "step 120/500  loss 0.4321  lr 1.2e-03  reward 3.0000  512 samples/s  13.0k tokens/s  eta 0:03:10  "
        "peak 1.25 GiB"
    )


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        (
            {
                "eval_loss": 0.43021,
                "eval_accuracy": 0.81,
                "eval_runtime": 12.34,
                "eval_steps_per_second": 3.0,
                "epoch": 1,
            },
            "evaluation  loss 0.4302  accuracy 0.8100  in 12.3 s",
        ),
        ({"eval_de_loss": 2e-5, "eval_de_runtime": 1.0}, "evaluation de  loss 2.000e-05  in 1.0 s"),
        ({"test_f1": 0.5, "test_runtime": 1.0}, "test  f1 0.5000  in 1.0 s"),
        (
            {"train_runtime": 60.0, "train_samples_per_second": 9.0, "train_loss": 0.5},
            "training  loss 0.5000  in 60.0 s",
        ),
        ({"temperature": 0.5, "phase": "two", "epoch": 0.1}, "temperature 0.5000  phase two"),
    ],
)
def test_other_line(logs: dict[str, Any], expected: str) -> None:
    assert other_line(3, 9, logs) == f"step 3/9  {expected}"


def arguments(**settings: Any) -> Any:
    return SimpleNamespace(**{"disable_tqdm": False, "world_size": 2} | settings)


class Job:
    """Calls a JobProgress as the Trainer does."""

    def __init__(self, clock: Clock, start: int = 0, rank: int = 0, **settings: Any) -> None:
        self.progress = JobProgress(clock)
        self.clock = clock
        self.state = TrainerState(global_step=start, max_steps=20, is_world_process_zero=rank == 0)
        self.arguments = arguments(**settings)

    def tell(self, event: str, **kwargs: Any) -> None:
        getattr(self.progress, event)(self.arguments, self.state, TrainerControl(), **kwargs)

    def step(self, seconds: float = 2.0) -> None:
        self.tell("on_step_begin")
        self.progress.count({"input_ids": torch.zeros(4, 10)})
        self.clock.wait(seconds)
        self.state.global_step += 1
        self.tell("on_step_end")

    def evaluate(self) -> None:
        for _ in range(3):
            self.clock.wait(50)
            self.tell("on_prediction_step", eval_dataloader=[1, 2, 3])
        self.tell("on_log", logs={"eval_loss": 0.25, "eval_runtime": 150.0})
        self.tell("on_evaluate")

    def run(self) -> None:
        """The base is evaluated, two steps are made, and their loss is logged."""
        self.tell("on_train_begin")
        self.evaluate()
        self.clock.wait(500)  # a resumed run skips the examples that it has seen
        self.step()
        self.step()
        self.tell("on_log", logs={"loss": 0.5, "learning_rate": 1e-3})


def test_a_file_gets_lines_and_nothing_that_is_drawn_over(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    file = console(monkeypatch, is_terminal=False)
    job = Job(clock)
    job.run()
    job.tell("on_train_end")
    assert file.getvalue() == (
        "step 0/20  evaluation  loss 0.2500  in 150.0 s\n"
        "step 2/20  loss 0.5000  lr 1.0e-03  4.00 samples/s  40.0 tokens/s  eta 0:00:36  peak 1.25 GiB\n"
    )


def test_a_terminal_without_bars_gets_the_lines(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    terminal = console(monkeypatch, is_terminal=True)
    Job(clock, disable_tqdm=True).run()
    assert len(terminal.lines) == 2
    assert "\r" not in terminal.getvalue()


def test_a_resumed_run_counts_its_own_steps(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    file = console(monkeypatch, is_terminal=False)
    Job(clock, start=10).run()
    assert "step 12/20  loss" in file.lines[-1]
    assert "4.00 samples/s  40.0 tokens/s  eta 0:00:16" in file.lines[-1]


def test_one_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    terminal = console(monkeypatch, is_terminal=True)
    job = Job(clock, start=10)
    job.run()
    bar = job.progress.training_bar
    bar.refresh()
    assert (bar.initial, bar.n, bar.total) == (10, 12, 20)
    drawn = terminal.getvalue().rpartition("\r")[2]
    assert re.fullmatch(
        r" 60%\|.+\| 12/20 \[\d\d:\d\d<00:16, loss 0.5000, 4.00 samples/s, 40.0 tokens/s, peak 1.25 GiB\]", drawn
    )
    assert [line.split("  ")[:2] for line in terminal.lines] == [
        ["step 10/20", "evaluation"],
        ["step 12/20", "loss 0.5000"],
    ]
    job.tell("on_train_end")
    assert terminal.getvalue().endswith("\n")
    assert bar.disable  # closed


def test_an_evaluation_has_a_bar_of_its_own_while_it_lasts(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    console(monkeypatch, is_terminal=True)
    job = Job(clock)
    job.tell("on_train_begin")
    job.tell("on_prediction_step", eval_dataloader=[1, 2, 3])
    assert job.progress.prediction_bar.n == 1
    job.tell("on_evaluate")
    assert job.progress.prediction_bar is None
    assert job.progress.training_bar is not None


@pytest.mark.parametrize("is_terminal", [False, True])
def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, clock: Clock, is_terminal: bool) -> None:
    stream = console(monkeypatch, is_terminal)
    job = Job(clock, rank=1)
    job.run()
    job.tell("on_train_end")
    assert stream.getvalue() == ""


def test_a_stop_before_the_first_step(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    console(monkeypatch, is_terminal=True)
    job = Job(clock)
    job.tell("on_train_end")
    job.run()
    job.tell("on_train_end")
    job.tell("on_train_end")


def trainer(out: Path, **settings: Any) -> SparseTrainer:
    known = {"use_cpu": True, "report_to": "tensorboard", "per_device_train_batch_size": 4, "max_steps": 8}
    known |= {"logging_steps": 2, "save_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    known |= {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True}
    rows = [[3 + (row + column) % 50 for column in range(12)] for row in range(48)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = sparsify(tiny("llama"), SparseConfig(density=0.1))
    return SparseTrainer(
        model, TrainingArguments(str(out), **known | settings), train_dataset=data, eval_dataset=data[:6]
    )


def test_the_trainer_tells_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "count_batch", lambda inputs: (7, 70))
    counted = []
    monkeypatch.setattr(Pace, "count", lambda pace, *batch: counted.append(batch))
    trainer(tmp_path, report_to="none").train()
    printed = capsys.readouterr()
    steps = [line.split("  ")[0] for line in printed.err.splitlines() if "  loss" in line and "  lr" in line]
    assert steps == [f"step {number}/8" for number in (2, 4, 6, 8)]
    assert len([line for line in printed.err.splitlines() if "  evaluation  loss" in line]) == 3
    assert not re.search(r"\r|\{'", printed.err + printed.out)
    assert counted == [(7, 70)] * 16


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_it_stands_in_the_place_of_transformers_own(tmp_path: Path, disable_tqdm: bool) -> None:
    callbacks = trainer(tmp_path, disable_tqdm=disable_tqdm).callback_handler.callbacks
    assert [type(each) for each in callbacks if isinstance(each, ProgressCallback | PrinterCallback)] == [JobProgress]


def curves(directory: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(directory)).Reload()
    return {name: [event.step for event in events.Scalars(name)] for name in ("train/loss", "eval/loss")}


def test_a_resumed_run_goes_on_in_its_curves(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    (directory,) = (tmp_path / "runs").iterdir()
    assert curves(directory) == {"train/loss": [2, 4, 6, 8], "eval/loss": [0, 4, 8]}
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert list((tmp_path / "runs").iterdir()) == [directory]
    assert len(list(directory.iterdir())) == 2
    assert curves(directory) == {"train/loss": [2, 4, 6, 8], "eval/loss": [0, 4, 8]}
    again.evaluate()
    assert list((tmp_path / "runs").iterdir()) == [directory]


def test_a_fresh_start_has_curves_of_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        trainer(tmp_path, save_strategy="no").train()
    directories = sorted((tmp_path / "runs").iterdir())
    assert [curves(directory)["train/loss"] for directory in directories] == [[2, 4, 6, 8]] * 2


def test_an_evaluation_before_is_not_in_the_runs_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = trainer(tmp_path / "out")
    one.evaluate()
    (writer,) = [each.tb_writer for each in one.callback_handler.callbacks if isinstance(each, RunCurves)]
    one.train()
    assert writer.all_writers is None  # closed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    first, last = sorted((tmp_path / "out" / "runs").iterdir())
    assert last.name == "evaluation"
    assert curves(first)["train/loss"] == [2, 4, 6, 8]


def test_the_directory_that_the_user_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    trainer(tmp_path / "out", save_strategy="no").train()
    assert curves(tmp_path / "mine")["train/loss"] == [2, 4, 6, 8]
    assert not (tmp_path / "out" / "runs").exists()


def test_curve_directory(tmp_path: Path) -> None:
    first = curve_directory(tmp_path, "0a1b")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_0a1b", first.name)
    (tmp_path / "1999-01-01_00-00-00_0a1b").mkdir()
    assert curve_directory(tmp_path, "0a1b").name == "1999-01-01_00-00-00_0a1b"
    assert curve_directory(tmp_path, "0a1c").name.endswith("_0a1c")
