"""Cases for trainer_worker.py: what is trained, how, and what each rank saw of it."""

import json
from pathlib import Path
from typing import Any

from ranks import ForkServer


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


def run_cases(
    fork_server: ForkServer, count: int, cases: list[dict[str, Any]], out: Path, worker: str = "trainer_worker"
) -> list[dict[str, Any]]:
    """Run all cases in one launch of `count` ranks. Returns: for each rank, what it saw by the name of the case."""
    file = out / "cases.json"
    file.write_text(json.dumps(cases))
    fork_server.call(count, f"{worker}:main", [file, out], out)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(count)]
