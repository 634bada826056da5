"""What a run tells while it trains: one bar for the whole job on a terminal, and a readable line wherever it logs.

All of it comes from rank 0. What the other ranks do is reckoned from rank 0's own batches: nothing is sent, and no
device is waited for.
"""

import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_zero.zero.parameters import peak_memory_bytes

WINDOW_SECONDS = 30.0
"""Rates are of the last steps that took this long."""


def count_batch(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Samples and tokens of one rank's batch, from shapes alone: no value is read, so no device is waited for.

    Samples are the rows of the batch (with packing, sequences of several examples). Tokens are all positions of
    `input_ids` or `inputs_embeds`, padding included; 0 where there is neither (images, audio).
    """
    if torch.is_tensor(ids := inputs.get("input_ids")):
        return ids.shape[0], ids.numel()
    if torch.is_tensor(embeddings := inputs.get("inputs_embeds")):
        return embeddings.shape[0], embeddings.shape[:-1].numel()
    rows = next((value.shape[0] for value in inputs.values() if torch.is_tensor(value) and value.dim() > 0), 0)
    return rows, 0


class Pace:
    """How fast a job of `ranks` ranks trains.

    Its samples and tokens are this rank's, times the ranks: exact for samples (all ranks' batches have as many rows),
    and right on average for tokens (the ranks pad to lengths of their own). A batch counts once, however many passes
    the objective makes over it.
    """

    def __init__(self, ranks: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._ranks = ranks
        self._clock = clock
        self._recent: deque[tuple[float, int, int]] = deque()
        """Seconds, samples and tokens of each step of the window; their sums:"""
        self._seconds, self._samples, self._tokens = 0.0, 0, 0
        self._batches = (0, 0)
        self._steps = 0
        self._began: float | None = None
        self._since = 0.0

    def begin(self) -> None:
        """The first step begins. What came before (an evaluation, examples that are skipped) is no training."""
        if self._began is None:
            self._began = self._since = self._clock()

    def leave_out(self) -> None:
        """The time since the last step was spent on something else: an evaluation, a save."""
        self._since = self._clock()

    def count(self, samples: int, tokens: int) -> None:
        """One batch of this rank, of the step that is under way."""
        self._batches = self._batches[0] + samples, self._batches[1] + tokens

    def end_step(self) -> None:
        now = self._clock()
        step = (now - self._since, *self._batches)
        self._since, self._batches = now, (0, 0)
        self._steps += 1
        self._recent.append(step)
        self._add(step, 1)
        while len(self._recent) > 1 and self._seconds - self._recent[0][0] >= WINDOW_SECONDS:
            self._add(self._recent.popleft(), -1)

    def _add(self, step: tuple[float, int, int], sign: int) -> None:
        self._seconds += sign * step[0]
        self._samples += sign * step[1]
        self._tokens += sign * step[2]

    @property
    def samples_per_second(self) -> float:
        """Of all ranks, in the last steps; evaluations and saves take no part. 0 before the first step has ended."""
        return self._ranks * self._samples / self._seconds if self._seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """As samples_per_second."""
        return self._ranks * self._tokens / self._seconds if self._seconds > 0 else 0.0

    @property
    def steps_per_second(self) -> float | None:
        """Since the first step that was made here, evaluations and saves included: they will come again. None before
        that step has ended.
        """
        if not self._steps or (elapsed := self._clock() - self._began) <= 0:
            return None
        return self._steps / elapsed

    def describe(self) -> list[str]:
        """`["512 samples/s", "13.0k tokens/s"]`; nothing before the first step has ended."""
        if not self._recent:
            return []
        rates = [f"{tqdm.format_sizeof(self.samples_per_second)} samples/s"]
        if self._tokens:
            rates.append(f"{tqdm.format_sizeof(self.tokens_per_second)} tokens/s")
        return rates


def step_line(step: int, steps: int, logs: Mapping[str, Any], pace: Pace, peak_bytes: int) -> str:
    """`step 120/500  loss 0.4321  lr 1.2e-03  512 samples/s  13.0k tokens/s  eta 0:03:12  peak 1.20 GiB`

    Args: logs: what the Trainer logs of some steps; a figure that is not the Trainer's own follows the learning rate.
    """
    parts = [f"step {step}/{steps}", f"loss {_figure(logs['loss'])}"]
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.1e}")
    known = ("loss", "learning_rate", "grad_norm", "epoch", "num_input_tokens_seen", "total_flos")
    parts += [f"{key} {_figure(logs[key])}" for key in logs if key not in known and not key.startswith("train_")]
    parts += pace.describe()
    if rate := pace.steps_per_second:
        parts.append(f"eta {timedelta(seconds=round((steps - step) / rate))}")
    return "  ".join([*parts, f"peak {gibibytes(peak_bytes)}"])


def other_line(step: int, steps: int, logs: Mapping[str, Any]) -> str:
    """`step 120/500  evaluation  loss 0.4302  accuracy 0.8100  in 12.3 s`, of an evaluation or of the whole training;
    whatever else is logged, by its own names.
    """
    parts = [f"step {step}/{steps}"]
    prefix = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), None)
    if prefix is None:
        return "  ".join(parts + [f"{key} {_figure(value)}" for key, value in logs.items() if key != "epoch"])
    figures = {key.removeprefix(f"{prefix}_"): value for key, value in logs.items() if key.startswith(f"{prefix}_")}
    seconds = figures.pop("runtime")
    parts.append("training" if prefix == "train" else prefix.replace("eval", "evaluation", 1).replace("_", " "))
    parts += [
        f"{key} {_figure(value)}"
        for key, value in figures.items()
        if not key.endswith(("_per_second", "_preparation_time"))
    ]
    return "  ".join([*parts, f"in {seconds:.1f} s"])


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"
    return textwrap.shorten(str(value), 100, placeholder=" ...")


class _Bar(tqdm):
    """A bar that asks what to say when it is drawn, and not at every step."""

    def __init__(self, pace: Pace, postfix: Callable[[], str], **settings: Any) -> None:
        self._pace, self._say = pace, postfix
        super().__init__(**settings)

    @property
    def format_dict(self) -> dict[str, Any]:
        # tqdm's remaining time is what it makes of this rate.
        return super().format_dict | {"postfix": self._say(), "rate": self._pace.steps_per_second}


class JobProgress(ProgressCallback):
    """One bar for the whole job on rank 0, and a line at each logging step and evaluation; all of it on stderr.

    Without a terminal (a batch job's log file), or with TrainingArguments.disable_tqdm, there are the lines alone.
    Evaluations have transformers' own bar, under the same conditions. A resumed run's bar starts at its step.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self._clock = clock
        self._pace: Pace | None = None
        self._loss: float | None = None

    def count(self, inputs: Mapping[str, Any]) -> None:
        """This rank's next batch."""
        if self._pace is not None:
            self._pace.count(*count_batch(inputs))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._pace, self._loss = Pace(args.world_size, self._clock), None
        if _has_bars(args):
            self.training_bar = _Bar(
                self._pace,
                self._postfix,
                total=state.max_steps,
                initial=state.global_step,
                miniters=1,
                dynamic_ncols=True,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def _postfix(self) -> str:
        loss = [] if self._loss is None else [f"loss {_figure(self._loss)}"]
        return ", ".join([*loss, *self._pace.describe(), f"peak {gibibytes(peak_memory_bytes())}"])

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._pace is not None:
            self._pace.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._pace is not None:
            self._pace.end_step()
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.training_bar.n)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        if self._pace is not None:
            self._pace.leave_out()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        if self._pace is not None:
            self._pace.leave_out()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if _has_bars(args):
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # What is measured of a model that was not trained here is its caller's to show.
        if not state.is_world_process_zero or not state.max_steps:
            return
        if "loss" in logs and self._pace is not None:
            self._loss = logs["loss"]
            line = step_line(state.global_step, state.max_steps, logs, self._pace, peak_memory_bytes())
        else:
            line = other_line(state.global_step, state.max_steps, {k: v for k, v in logs.items() if k != "total_flos"})
        tqdm.write(line, file=sys.stderr)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = self._pace = None


def _has_bars(args: TrainingArguments) -> bool:
    return not args.disable_tqdm and sys.stderr.isatty()
