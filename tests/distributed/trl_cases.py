"""The smallest runs of TRL's four trainers: data, settings and trainers by objective."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, GRPOConfig, RewardConfig, SFTConfig

from sparse_zero import SparseConfig, sparsify
from sparse_zero.trl import SparseDPOTrainer, SparseGRPOTrainer, SparseRewardTrainer, SparseSFTTrainer

OBJECTIVES = ["sft", "dpo", "reward", "grpo"]
TRAINERS = {
    "sft": (SparseSFTTrainer, SFTConfig),
    "dpo": (SparseDPOTrainer, DPOConfig),
    "reward": (SparseRewardTrainer, RewardConfig),
    "grpo": (SparseGRPOTrainer, GRPOConfig),
}
EXAMPLES = 24


def text(start: int, count: int) -> str:
    return " ".join(tiny.WORDS[(start * 7 + step * 3) % len(tiny.WORDS)] for step in range(count))


def rows(objective: str, count: int = EXAMPLES) -> Dataset:
    columns = {
        "sft": lambda n: {"prompt": text(n, 3), "completion": " " + text(n + 1, 2 + n % 3)},
        "dpo": lambda n: {"prompt": text(n, 3), "chosen": " " + text(n + 1, 4), "rejected": " " + text(n + 2, 3)},
        "reward": lambda n: {"chosen": text(n, 6), "rejected": text(n + 2, 5)},
        "grpo": lambda n: {"prompt": text(n, 3), "wanted": tiny.WORDS[n]},
    }[objective]
    return Dataset.from_list([columns(n) for n in range(count)])


def reward(completions: list[str], wanted: list[str], **_: Any) -> list[float]:
    """The share of red words, and something for the wanted one."""
    return [
        sum(word.startswith("red") for word in completion.split()) / 8 + (word in completion)
        for completion, word in zip(completions, wanted, strict=True)
    ]


def rollout(prompts: list[str], trainer: Any) -> dict[str, list]:
    """Completions that depend on the prompt and on the place in its group only, in place of sampled ones."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    words = [[4 + (sum(prompt) * (1 + n % 2) + step * 11) % 60 for step in range(5)] for n, prompt in enumerate(ids)]
    return {"prompt_ids": ids, "completion_ids": words, "logprobs": None}


def save_base(directory: Path) -> None:
    """A language model, and in `reward` a model with one label."""
    tiny.save_llama(directory)
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1).save_pretrained(directory / "reward")


def base_model(base: Path, objective: str) -> PreTrainedModel:
    if objective == "reward":
        return AutoModelForSequenceClassification.from_pretrained(base / "reward", dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def sparse_model(base: Path, objective: str, **config: Any) -> PreTrainedModel:
    return sparsify(base_model(base, objective), SparseConfig(**{"density": 0.05, "targets": "all-linear"} | config))


def arguments(objective: str, out: Path, **settings: Any) -> Any:
    known = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_steps": 4,
        "save_steps": 1,
        "gradient_checkpointing": False,
    }
    if objective == "grpo":
        known |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
    if objective == "dpo":
        known |= {"beta": 0.5}
    return TRAINERS[objective][1](str(out), **known | settings)


def trainer(
    objective: str,
    base: Path,
    out: Path,
    model: PreTrainedModel | Callable[[], PreTrainedModel] | None = None,
    options: Any = None,
    **settings: Any,
) -> Any:
    options = dict(options or {})
    if objective == "grpo":
        options.setdefault("reward_funcs", reward)
    given = arguments(objective, out, **settings)  # before the model: under ZeRO stage 3 it is partitioned as it loads
    if given.deepspeed:
        deepspeed.init_distributed(verbose=False)  # on CPU Accelerate starts torch's group only
    model = sparse_model(base, objective) if model is None else model() if inspect.isfunction(model) else model
    data = {"train_dataset": rows(objective), "processing_class": AutoTokenizer.from_pretrained(base)}
    return TRAINERS[objective][0](model, args=given, **data | options)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
