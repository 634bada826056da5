"""Cases for trainer_worker.py: what is trained, how, and what each rank saw of it."""

import json
from pathlib import Path
from typing import Any

import tiny
from ranks import run_ranks

WORKER = Path(__file__).with_name("trainer_worker.py")


def zero_config(stage: int, **settings: Any) -> dict[str, Any]:
    """A DeepSpeed configuration whose values are the Trainer's to fill in."""
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return {
        **dict.fromkeys(automatic, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, **settings},
    }


def case(name: str, task: str, base: Path, examples: int, **training: Any) -> dict[str, Any]:
    """`training` holds TrainingArguments' names; the selection is that of tiny.selected_counts."""
    return {"name": name, "task": task, "base": str(base), "examples": examples, "training": training}


def run_cases(count: int, cases: list[dict[str, Any]], out: Path, **options: Any) -> list[dict[str, Any]]:
    """Train all cases in one launch. Returns: for each rank, what it saw by the name of the case."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "cases.json"
    file.write_text(json.dumps(cases))
    run_ranks(count, WORKER, file, out, **options)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(count)]
