"""The progress of a run: one bar for the whole job on a terminal, and a readable line at each logging step.

Only rank 0 prints. It extrapolates the throughput of all ranks from its own batches, so that nothing is sent and no
device is synchronised.
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

from sparse_zero.training.device import peak_memory_bytes

WINDOW_SECONDS = 30.0
"""Rates are means over the last steps that took this long together."""


def count_batch(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Count the samples and tokens of one rank's batch from shapes alone, so that no device is synchronised.

    Samples are the rows of the batch (with packing, sequences of several examples). Tokens are all positions of
    `input_ids` or `inputs_embeds`, or of `prompt_ids` and `completion_ids`, including padding; 0 if the batch has none
    (images, audio).

    Returns: (samples, tokens).
    """
    if torch.is_tensor(ids := inputs.get("input_ids")):
        return ids.shape[0], ids.numel()
    if torch.is_tensor(embeddings := inputs.get("inputs_embeds")):
        return embeddings.shape[0], embeddings.shape[:-1].numel()
    if torch.is_tensor(prompts := inputs.get("prompt_ids")):
        return prompts.shape[0], prompts.numel() + inputs["completion_ids"].numel()
    rows = next((value.shape[0] for value in inputs.values() if torch.is_tensor(value) and value.dim() > 0), 0)
    return rows, 0


class Throughput:
    """The throughput of a job.

    Samples and tokens are those of this rank times the number of ranks. This is exact for samples (all ranks have the
    same batch size) and right on average for tokens (each rank pads to its own length). A batch counts once, also if
    the objective makes several passes over it.
    """

    def __init__(self, world_size: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Args: clock: returns seconds."""
        self._world_size = world_size
        self._clock = clock
        self._recent: deque[tuple[float, int, int]] = deque()
        """Seconds, samples and tokens of each step in the window, of which the next three are the sums."""
        self._seconds, self._samples, self._tokens = 0.0, 0, 0
        self._batches = (0, 0)
        self._steps = 0
        self._began: float | None = None
        self._step_began = 0.0

    def begin(self) -> None:
        """Call at the beginning of each step.

        The time before the first step (an evaluation, skipped examples) does not count.
        """
        if self._began is None:
            self._began = self._step_began = self._clock()

    def skip_time(self) -> None:
        """Exclude the time since the last step from the rates: it was an evaluation or a save."""
        self._step_began = self._clock()

    def count(self, samples: int, tokens: int) -> None:
        """Count one batch of this rank in the current step."""
        self._batches = self._batches[0] + samples, self._batches[1] + tokens

    def end_step(self) -> None:
        """Call at the end of each step."""
        now = self._clock()
        step = (now - self._step_began, *self._batches)
        self._step_began, self._batches = now, (0, 0)
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
        """Of all ranks, in the last steps, without evaluations and saves. 0 before the first step has ended."""
        return self._world_size * self._samples / self._seconds if self._seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Like samples_per_second."""
        return self._world_size * self._tokens / self._seconds if self._seconds > 0 else 0.0

    @property
    def steps_per_second(self) -> float | None:
        """Since the first step of this process, including evaluations and saves, because the remaining steps have them
        too. None before that step has ended.
        """
        if not self._steps or (elapsed := self._clock() - self._began) <= 0:
            return None
        return self._steps / elapsed

    def describe(self) -> list[str]:
        """The rates, as in `["512 samples/s", "13.0k tokens/s"]`. Empty before the first step has ended."""
        if not self._recent:
            return []
        rates = [f"{tqdm.format_sizeof(self.samples_per_second)} samples/s"]
        if self._tokens:
            rates.append(f"{tqdm.format_sizeof(self.tokens_per_second)} tokens/s")
        return rates


def step_line(step: int, steps: int, logs: Mapping[str, Any], throughput: Throughput, peak_bytes: int) -> str:
    """`step 120/500  loss 0.4321  lr 1.2e-03  512 samples/s  13.0k tokens/s  eta 0:03:12  peak 1.20 GiB`

    Args:
        logs: the Trainer's log of the last steps. Values that others have added follow the learning rate.
        peak_bytes: the peak memory of rank 0.
    """
    parts = [f"step {step}/{steps}", f"loss {_figure(logs['loss'])}"]
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.1e}")
    known = ("loss", "learning_rate", "grad_norm", "epoch", "num_input_tokens_seen", "total_flos")
    parts += [f"{key} {_figure(logs[key])}" for key in logs if key not in known and not key.startswith("train_")]
    parts += throughput.describe()
    if rate := throughput.steps_per_second:
        parts.append(f"eta {timedelta(seconds=round((steps - step) / rate))}")
    return "  ".join([*parts, f"peak {gibibytes(peak_bytes)}"])


def summary_line(step: int, steps: int, logs: Mapping[str, Any]) -> str:
    """`step 120/500  evaluation  loss 0.4302  accuracy 0.8100  in 12.3 s`, for an evaluation or for the whole
    training. Other logs appear under their own names.
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
    """A bar that computes its postfix only when it is drawn, not at every step."""

    def __init__(self, throughput: Throughput, postfix: Callable[[], str], **settings: Any) -> None:
        self._throughput, self._get_postfix = throughput, postfix
        super().__init__(**settings)

    @property
    def format_dict(self) -> dict[str, Any]:
        # tqdm computes the remaining time from this rate.
        return super().format_dict | {"postfix": self._get_postfix(), "rate": self._throughput.steps_per_second}


class JobProgress(ProgressCallback):
    """One bar for the whole job on rank 0, and a line at each logging step and evaluation, all on stderr.

    Without a terminal (the log file of a batch job), or with TrainingArguments.disable_tqdm, there are only the lines.
    Under the same conditions evaluations have transformers' own bar. The bar of a resumed run starts at its step.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self._clock = clock
        self._throughput: Throughput | None = None
        self._loss: float | None = None

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Count this rank's next batch."""
        if self._throughput is not None:
            self._throughput.count(*count_batch(inputs))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._throughput, self._loss = Throughput(args.world_size, self._clock), None
        if _has_bars(args):
            self.training_bar = _Bar(
                self._throughput,
                self._postfix,
                total=state.max_steps,
                initial=state.global_step,
                miniters=1,
                dynamic_ncols=True,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def _postfix(self) -> str:
        loss = [] if self._loss is None else [f"loss {_figure(self._loss)}"]
        return ", ".join([*loss, *self._throughput.describe(), f"peak {gibibytes(peak_memory_bytes())}"])

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._throughput is not None:
            self._throughput.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._throughput is not None:
            self._throughput.end_step()
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.training_bar.n)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        if self._throughput is not None:
            self._throughput.skip_time()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        if self._throughput is not None:
            self._throughput.skip_time()

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
        # Without training, the caller of evaluate shows its metrics.
        if not state.is_world_process_zero or not state.max_steps:
            return
        if "loss" in logs and self._throughput is not None:
            self._loss = logs["loss"]
            line = step_line(state.global_step, state.max_steps, logs, self._throughput, peak_memory_bytes())
        else:
            line = summary_line(
                state.global_step, state.max_steps, {k: v for k, v in logs.items() if k != "total_flos"}
            )
        tqdm.write(line, file=sys.stderr)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = self._throughput = None


def _has_bars(args: TrainingArguments) -> bool:
    return not args.disable_tqdm and sys.stderr.isatty()
