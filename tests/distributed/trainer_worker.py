"""One rank of SparseTrainer runs. Each case is trained; what was seen goes to OUT/rankN.json."""

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import tiny
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import PreTrainedModel

from sparse_zero import SparseConfig, SparseTrainer, sparsify
from sparse_zero.recipe.training import TrainingArguments
from sparse_zero.training.trainer import Backward, Forward
from sparse_zero.zero.parameters import optimizer_bytes


class WatchedTrainer(SparseTrainer):
    """Looks after each backward for gradients where there must be none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        self.frozen_with_gradient: set[str] = set()
        self.batches = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.batches += 1
        self.frozen_with_gradient |= {n for n, p in self.frozen.items() if p.requires_grad or p.grad is not None}
        return loss


def in_two_passes(forward: Forward, backward: Backward, step: int, micro_step: int) -> torch.Tensor:
    """The same gradient as one pass has, in two halves."""
    first = forward() / 2
    backward(first, False)
    second = forward() / 2
    backward(second, True)
    return first.detach() + second.detach()


def optimizer_state(optimizer: Any) -> dict[str, int]:
    """Scalars in the innermost optimizer: parameters that have state, and each kind of state."""
    counts = {"parameters": 0, "exp_avg": 0, "exp_avg_sq": 0}
    for parameter, state in innermost(optimizer).state.items():
        counts["parameters"] += parameter.numel()
        counts["exp_avg"] += state["exp_avg"].numel()
        counts["exp_avg_sq"] += state["exp_avg_sq"].numel()
    return counts


def optimizer_dtypes(optimizer: Any) -> list[str]:
    """Of what the innermost optimizer updates, and of its moments."""
    entries = innermost(optimizer).state.items()
    return sorted({str(t.dtype) for p, state in entries for t in (p, state["exp_avg"], state["exp_avg_sq"])})


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def run(case: dict[str, Any], out: Path) -> dict[str, Any]:
    arguments, model = build(case, out)
    sparsify(model, SparseConfig(density=tiny.density_of(model, case["task"])))
    objective = in_two_passes if case.get("two_passes") else None
    examples = tiny.examples(case["task"], case["examples"])
    trainer = WatchedTrainer(model, arguments, train_dataset=examples, eval_dataset=examples[:8], objective=objective)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model(str(out / "adapter"))
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "batches": trainer.batches,
        "losses": [entry["loss"] for entry in steps],
        "norms": [entry.get("grad_norm") for entry in steps],
        "state": optimizer_state(trainer.optimizer),
        "state_dtypes": optimizer_dtypes(trainer.optimizer),
        "optimizer_bytes": optimizer_bytes(trainer.optimizer),
        "bucket_size": getattr(getattr(trainer.deepspeed, "optimizer", None), "reduce_bucket_size", None),
        "trainable_dtypes": sorted({str(p.dtype) for p in model.parameters() if p.requires_grad}),
        "frozen_with_gradient": sorted(trainer.frozen_with_gradient),
        "frozen": len(trainer.frozen),
    }


def build(case: dict[str, Any], out: Path) -> tuple[TrainingArguments, PreTrainedModel]:
    """The base as the Trainer's users build it: under zero.Init where the arguments ask for ZeRO stage 3."""
    arguments = TrainingArguments(**settings_of(case, out))
    if arguments.deepspeed:
        deepspeed.init_distributed(verbose=False)  # on CPU Accelerate starts torch's group only
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    return arguments, tiny.AUTO_CLASS[case["task"]].from_pretrained(case["base"], dtype=dtype)


def settings_of(case: dict[str, Any], out: Path) -> dict[str, Any]:
    """The training arguments of a case."""
    settings = {
        "output_dir": str(out),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }
    return settings | case["training"]


def run_each(run: Callable[[dict[str, Any], Path], dict[str, Any]], cases: str, out: str) -> None:
    """Run each case as if it were alone in its process."""
    seen, environment = {}, dict(os.environ)
    for case in json.loads(Path(cases).read_text()):
        seen[case["name"]] = run(case, Path(out, case["name"]))
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()  # TrainingArguments leaves ACCELERATE_USE_DEEPSPEED there
        os.environ.update(environment)
    Path(out, f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))


def main(cases: str, out: str) -> None:
    run_each(run, cases, out)
