"""One rank that trains every kind of parameter, and works with the adapters: CASES.json OUT."""

import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from partitioned_worker import whole_weights
from torch import nn
from trainer_worker import build, main

from sparse_zero import (
    SparseConfig,
    SparseTrainer,
    disable_adapter,
    load_adapter,
    merge_adapter,
    set_adapter,
    sparsify,
    unload,
    unmerge_adapter,
)


def run(case: dict[str, Any], out: Path) -> dict[str, Any]:
    arguments, model = build(case, out)
    if "adapters" in case:
        return work_with(model, case["adapters"], out)
    sparsify(model, SparseConfig(**case["sparse"]))
    examples = tiny.examples(case["task"], case["examples"])
    trainer = SparseTrainer(model, arguments, train_dataset=examples, eval_dataset=examples[:8])
    trainer.train()
    adapted = trainer.evaluate()["eval_loss"]
    with disable_adapter(model):
        disabled = trainer.evaluate()["eval_loss"]
    again = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(out / "adapter"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "adapted": [adapted, again], "disabled": disabled}


def work_with(model: nn.Module, adapters: dict[str, str], out: Path) -> dict[str, Any]:
    """Load all, switch to each, merge and unmerge it, and unload the last."""
    before = whole_weights(model)
    for name, directory in adapters.items():
        load_adapter(model, directory, adapter_name=name)
    for name in [*adapters][::-1]:
        set_adapter(model, name)
        merge_adapter(model)
        torch.save(whole_weights(model), out.with_name(f"{out.name}-{name}.pt"))
        unmerge_adapter(model)
    after = whole_weights(unload(model))
    return {
        "partitioned": sum(hasattr(p, "ds_id") for p in model.parameters()),
        "changed": [name for name in before if not torch.equal(before[name], after[name])],
    }


if __name__ == "__main__":
    main(run, *sys.argv[1:])
