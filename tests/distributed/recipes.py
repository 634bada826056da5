"""Recipes over small local files: classification of sentences, and prompts with completions."""

import json
import random
from pathlib import Path
from typing import Any

import tiny
import yaml

COLUMNS = {
    "causal-lm": {"prompt": "prompt", "completion": "completion"},
    "sequence-classification": {"text": "text", "label": "label"},
}


def write_data(directory: Path) -> None:
    """train.jsonl and test.jsonl with the columns text, label ("odd" or "even"), prompt, completion and source."""
    rng = random.Random(0)
    for split, count in (("train", 60), ("test", 19)):
        with (directory / f"{split}.jsonl").open("w") as file:
            for _ in range(count):
                words = rng.choices(tiny.WORDS, k=rng.randint(2, 12))
                row = {
                    "text": " ".join(words),
                    "label": "odd" if words[0][-1] in "13579" else "even",
                    "prompt": " ".join(words),
                    "completion": " ".join(words[: rng.randint(1, 6)]),
                    "source": "here",
                }
                file.write(json.dumps(row) + "\n")


def write_recipe(file: Path, base: Path, task: str, data: Path, /, **sections: dict[str, Any]) -> Path:
    """A recipe over the files of `write_data` in `data`; `sections` are laid over its own. Outputs go beside it."""
    recipe: dict[str, dict[str, Any]] = {
        "model": {"name": str(base), "task": task},
        "data": {
            "path": "json",
            "data_files": {split: str(data / f"{split}.jsonl") for split in ("train", "test")},
            "eval_split": "test",
            "columns": COLUMNS[task],
        },
        "sparse": {"density": 0.02},
        "training": {
            "output_dir": str(file.parent / file.stem),
            "use_cpu": True,
            "report_to": "none",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 0.03,
            "save_strategy": "no",
        },
    }
    for name, section in sections.items():
        recipe[name] = recipe.get(name, {}) | section
    file.write_text(yaml.safe_dump(recipe))
    return file
