"""One rank that trains every kind of parameter, and works with the adapters."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kinds
import tiny
import torch
from partitioned_worker import whole_weights
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from trainer_worker import build, run_each

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
from sparse_zero.model.layers import SparseWeight
from sparse_zero.zero.parameters import is_partitioned


def run(case: dict[str, Any], out: Path) -> dict[str, Any]:
    arguments, model = build(case, out)
    if "adapters" in case:
        return work_with(model, case["adapters"], out)
    model.set_experts_implementation(case["experts"])
    sparsify(model, SparseConfig(**case["sparse"]), batches=kinds.batches_of(case["sparse"]))
    examples = tiny.examples(case["task"], case["examples"])
    trainer = SparseTrainer(model, arguments, train_dataset=examples, eval_dataset=examples[:8])
    with watched_copies(model) as kept:
        trainer.train()
    adapted = trainer.evaluate()["eval_loss"]
    with disable_adapter(model):
        disabled = trainer.evaluate()["eval_loss"]
    again = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(out / "adapter"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "adapted": [adapted, again], "disabled": disabled, "copies": kept}


@contextlib.contextmanager
def watched_copies(model: nn.Module) -> Iterator[dict[str, int]]:
    """Counts the gathered copies into which deltas are written in a forward, and those still there at its end."""
    made: list[StorageWeakRef] = []
    counts = {"made": 0, "kept": 0}
    write = SparseWeight.write_values

    def watched(weight: SparseWeight, *args: Any) -> None:
        write(weight, *args)
        if is_partitioned(weight.weight):
            made.append(StorageWeakRef(weight.weight.untyped_storage()))

    def after_forward(*_: Any) -> None:
        gc.collect()
        counts["made"] += len(made)
        counts["kept"] += sum(not reference.expired() for reference in made)
        made.clear()

    SparseWeight.write_values = watched
    hooks = [model.register_forward_pre_hook(lambda *_: made.clear()), model.register_forward_hook(after_forward)]
    yield counts
    SparseWeight.write_values = write
    for hook in hooks:
        hook.remove()


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


def main(cases: str, out: str) -> None:
    run_each(run, cases, out)
