"""One rank of SparseTrainer runs: CASES.json OUT. Each case is trained; what was seen goes to OUT/rankN.json."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import TrainingArguments

from sparse_zero import SparseConfig, SparseTrainer, sparsify
from sparse_zero.zero import optimizer_bytes


class WatchedTrainer(SparseTrainer):
    """Looks after each backward for gradients where there must be none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        self.frozen_with_gradient: set[str] = set()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.frozen_with_gradient |= {n for n, p in self.frozen.items() if p.requires_grad or p.grad is not None}
        return loss


def optimizer_state(optimizer: Any) -> dict[str, int]:
    """Scalars in the innermost optimizer: parameters that have state, and each kind of state."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    counts = {"parameters": 0, "exp_avg": 0, "exp_avg_sq": 0}
    for parameter, state in optimizer.state.items():
        assert {parameter.dtype, state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float32}
        counts["parameters"] += parameter.numel()
        counts["exp_avg"] += state["exp_avg"].numel()
        counts["exp_avg_sq"] += state["exp_avg_sq"].numel()
    return counts


def run(case: dict[str, Any], out: Path) -> dict[str, Any]:
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
    arguments = TrainingArguments(**settings | case["training"])
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    model = tiny.AUTO_CLASS[case["task"]].from_pretrained(case["base"], dtype=dtype)
    built = {"dtypes": sorted({str(p.dtype) for p in model.parameters()})}
    built["partitioned"] = all(hasattr(p, "ds_id") for p in model.parameters())
    sparsify(model, SparseConfig(density=tiny.density_of(model, case["task"])))
    trainer = WatchedTrainer(model, arguments, train_dataset=tiny.examples(case["task"], case["examples"]))
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model(str(out / "adapter"))
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "built": built,
        "losses": [entry["loss"] for entry in steps],
        "norms": [entry.get("grad_norm") for entry in steps],
        "state": optimizer_state(trainer.optimizer),
        "optimizer_bytes": optimizer_bytes(trainer.optimizer),
        "trainable_dtypes": sorted({str(p.dtype) for p in model.parameters() if p.requires_grad}),
        "frozen_with_gradient": sorted(trainer.frozen_with_gradient),
        "frozen": len(trainer.frozen),
    }


def main(cases: str, out: str) -> None:
    seen, environment = {}, dict(os.environ)
    for case in json.loads(Path(cases).read_text()):
        seen[case["name"]] = run(case, Path(out, case["name"]))
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()  # TrainingArguments leaves ACCELERATE_USE_DEEPSPEED there
        os.environ.update(environment)
    Path(out, f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
