"""The bar and the lines of a run."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from sparse_zero.training import progress
from sparse_zero.training.progress import WINDOW_SECONDS, JobProgress, Throughput, count_batch, step_line, summary_line


class Clock:
    """A clock that only `wait` advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Console(io.StringIO):
    """A stderr that is, or is not, a terminal."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    @property
    def lines(self) -> list[str]:
        """The lines, without the bar."""
        return [line for line in re.split(r"\r|\n|\x1b\[A", self.getvalue()) if line.startswith("step")]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def console(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> Console:
    """Replaces stderr. Not a fixture, because pytest replaces stderr between a fixture and its test."""
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


def step(throughput: Throughput, clock: Clock, seconds: float, *batches: tuple[int, int]) -> None:
    for batch in batches:
        throughput.count(*batch)
    clock.wait(seconds)
    throughput.end_step()


def test_rates_are_of_all_ranks_and_micro_batches(clock: Clock) -> None:
    throughput = Throughput(world_size=3, clock=clock)
    assert (throughput.samples_per_second, throughput.tokens_per_second, throughput.steps_per_second) == (0, 0, None)
    clock.wait(100)  # skipped examples, and an evaluation
    throughput.begin()
    step(throughput, clock, 0.5, (4, 28), (4, 40))
    assert (throughput.samples_per_second, throughput.tokens_per_second, throughput.steps_per_second) == (48, 408, 2)
    step(throughput, clock, 1.5, (4, 28), (4, 32))
    assert (throughput.samples_per_second, throughput.tokens_per_second, throughput.steps_per_second) == (24, 192, 1)


def test_rates_are_of_the_last_steps(clock: Clock) -> None:
    throughput = Throughput(world_size=1, clock=clock)
    throughput.begin()
    for _ in range(10):
        step(throughput, clock, 2, (2, 20))
    assert throughput.samples_per_second == 1
    for _ in range(round(WINDOW_SECONDS)):
        step(throughput, clock, 1, (8, 80))
    assert (throughput.samples_per_second, throughput.tokens_per_second) == (8, 80)
    assert throughput.steps_per_second == (10 + WINDOW_SECONDS) / (20 + WINDOW_SECONDS)
    step(throughput, clock, 100, (50, 0))  # one step outlasts the window
    assert throughput.samples_per_second == 0.5


def test_skipped_time_counts_only_for_the_remaining_time(clock: Clock) -> None:
    throughput = Throughput(world_size=1, clock=clock)
    throughput.begin()
    step(throughput, clock, 1, (6, 60))
    clock.wait(9)
    throughput.skip_time()
    step(throughput, clock, 1, (6, 60))
    assert throughput.samples_per_second == 6
    assert throughput.steps_per_second == 2 / 11


def test_step_line(clock: Clock) -> None:
    throughput = Throughput(world_size=4, clock=clock)
    throughput.begin()
    for _ in range(20):
        step(throughput, clock, 0.5, (64, 1625))
    logs = {"loss": 0.43214, "grad_norm": 2.0, "learning_rate": 1.2e-3, "reward": 3.0, "epoch": 0.7}
    assert step_line(120, 500, logs, throughput, 5 * 2**28) == (
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
def test_summary_line(logs: dict[str, Any], expected: str) -> None:
    assert summary_line(3, 9, logs) == f"step 3/9  {expected}"


def arguments(**settings: Any) -> Any:
    return SimpleNamespace(**{"disable_tqdm": False, "world_size": 2} | settings)


class Job:
    """Calls a JobProgress as the Trainer does."""

    def __init__(self, clock: Clock, start: int = 0, rank: int = 0, **settings: Any) -> None:
        self.progress = JobProgress(clock)
        self.clock = clock
        self.state = TrainerState(global_step=start, max_steps=20, is_world_process_zero=rank == 0)
        self.arguments = arguments(**settings)

    def call(self, event: str, **kwargs: Any) -> None:
        getattr(self.progress, event)(self.arguments, self.state, TrainerControl(), **kwargs)

    def step(self, seconds: float = 2.0) -> None:
        self.call("on_step_begin")
        self.progress.count({"input_ids": torch.zeros(4, 10)})
        self.clock.wait(seconds)
        self.state.global_step += 1
        self.call("on_step_end")

    def evaluate(self) -> None:
        for _ in range(3):
            self.clock.wait(50)
            self.call("on_prediction_step", eval_dataloader=[1, 2, 3])
        self.call("on_log", logs={"eval_loss": 0.25, "eval_runtime": 150.0})
        self.call("on_evaluate")

    def run(self) -> None:
        """Evaluate the base model, take two steps, and log their loss."""
        self.call("on_train_begin")
        self.evaluate()
        self.clock.wait(500)  # a resumed run skips examples
        self.step()
        self.step()
        self.call("on_log", logs={"loss": 0.5, "learning_rate": 1e-3})


def test_a_file_gets_lines_and_no_bar(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    file = console(monkeypatch, is_terminal=False)
    job = Job(clock)
    job.run()
    job.call("on_train_end")
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
    job.call("on_train_end")
    assert terminal.getvalue().endswith("\n")
    assert bar.disable  # closed


def test_an_evaluation_has_another_bar_until_it_ends(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    console(monkeypatch, is_terminal=True)
    job = Job(clock)
    job.call("on_train_begin")
    job.call("on_prediction_step", eval_dataloader=[1, 2, 3])
    assert job.progress.prediction_bar.n == 1
    job.call("on_evaluate")
    assert job.progress.prediction_bar is None
    assert job.progress.training_bar is not None


@pytest.mark.parametrize("is_terminal", [False, True])
def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, clock: Clock, is_terminal: bool) -> None:
    stream = console(monkeypatch, is_terminal)
    job = Job(clock, rank=1)
    job.run()
    job.call("on_train_end")
    assert stream.getvalue() == ""


def test_a_stop_before_the_first_step(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    console(monkeypatch, is_terminal=True)
    job = Job(clock)
    job.call("on_train_end")
    job.run()
    job.call("on_train_end")
    job.call("on_train_end")


def test_the_trainer_shows_its_progress(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "count_batch", lambda inputs: (7, 70))
    counted = []
    monkeypatch.setattr(Throughput, "count", lambda throughput, *batch: counted.append(batch))
    trainer(tmp_path, report_to="none").train()
    printed = capsys.readouterr()
    steps = [line.split("  ")[0] for line in printed.err.splitlines() if "  loss" in line and "  lr" in line]
    assert steps == [f"step {number}/8" for number in (2, 4, 6, 8)]
    assert len([line for line in printed.err.splitlines() if "  evaluation  loss" in line]) == 3
    assert not re.search(r"\r|\{'", printed.err + printed.out)
    assert counted == [(7, 70)] * 16


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_it_replaces_the_callback_of_transformers(trainer: Any, tmp_path: Path, disable_tqdm: bool) -> None:
    callbacks = trainer(tmp_path, disable_tqdm=disable_tqdm).callback_handler.callbacks
    assert [type(each) for each in callbacks if isinstance(each, ProgressCallback | PrinterCallback)] == [JobProgress]
