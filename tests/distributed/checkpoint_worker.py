"""What the ranks of the checkpoint tests run, forked by fork_server.py."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import deepspeed
import tiny
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

import rpn
from sparse_zero import SparseConfig, SparseTrainer, sparsify
from sparse_zero.recipe.training import TrainingArguments
from sparse_zero.training.run import noisy_objective

FILE_LIMIT = 8000
"""Bytes, of the 12,000 that a shard of the tiny model has."""

QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 3e-2,
    "save_strategy": "steps",
}


def trainer_of(case: dict[str, Any]) -> SparseTrainer:
    """Args: case: base, task, out, training, and what else is asked for: noise, examples, dropout."""
    arguments = TrainingArguments(case["out"], **QUIET | case["training"])
    if arguments.deepspeed:
        deepspeed.init_distributed(verbose=False)  # on CPU Accelerate starts torch's group only
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    dropout = case.get("dropout", 0.0)
    model = tiny.AUTO_CLASS[case["task"]].from_pretrained(case["base"], dtype=dtype, hidden_dropout_prob=dropout)
    sparsify(model, SparseConfig(density=tiny.density_of(model, case["task"]), dropout=dropout))
    config = rpn.RPNConfig(probability=0.2, passes=1) if case.get("noise") else None
    data = tiny.examples(case["task"], case.get("examples", 72))
    objective = noisy_objective(model, config, arguments)
    return SparseTrainer(model, arguments, train_dataset=data, eval_dataset=data[:8], objective=objective)


def limit_files(size: int) -> None:
    """What a process writes beyond is refused by the kernel, in the middle of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class RoomAgain(TrainerCallback):
    """Somebody tidies the disk up after the first save."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > state.save_steps:
            limit_files(resource.RLIM_INFINITY)


def train(case: dict[str, Any]) -> None:
    """Trains, and leaves the losses, the adapter and what this rank holds in case["out"]."""
    trainer = trainer_of(case)
    if os.environ["RANK"] == str(case.get("full_on_rank")):
        limit_files(FILE_LIMIT)
        trainer.add_callback(RoomAgain())
    trainer.train(resume_from_checkpoint=case.get("resume"), reset=case.get("reset", ()))
    out = Path(case["out"])
    trainer.save_model(str(out / "adapter"))
    partition = trainer._partition()
    held = {
        f"{kind}/{f.name}/{f.start}": partition.view(f, kind).clone()
        for kind in ("value", "exp_avg", "exp_avg_sq")
        for f in partition.fragments
    }
    rank = os.environ["RANK"]
    save_file(held, out / f"held-{rank}.safetensors")
    losses = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    (out / f"rank-{rank}.json").write_text(json.dumps({"losses": losses, "steps": trainer.state.global_step}))
