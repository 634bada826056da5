"""One rank of what ZeRO stage 3 must not break. Trains, merges, or loads an adapter."""

from pathlib import Path
from typing import Any

import deepspeed
import tiny
import torch
from torch import nn
from trainer_worker import build, run_each

from sparse_zero import SparseConfig, SparseTrainer, load_adapter, merge_and_unload, sparsify


def run(case: dict[str, Any], out: Path) -> dict[str, Any]:
    arguments, model = build(case, out)
    seen: dict[str, Any] = {
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "partitioned": sum(hasattr(p, "ds_id") for p in model.parameters()),
        "parameters": len(list(model.parameters())),
    }
    examples = tiny.examples(case["task"], case["examples"])
    if "load" in case:
        load_adapter(model, case["load"])
        trainer = SparseTrainer(model, arguments)
        seen["logits"] = trainer.predict(examples).predictions.tolist()
    else:
        sparsify(model, SparseConfig(density=tiny.density_of(model, case["task"])))
        trainer = SparseTrainer(model, arguments, train_dataset=examples)
        trainer.train()
    trainer.save_model(str(out / "adapter"))
    merge_and_unload(model)
    torch.save(whole_weights(model), out / f"merged{arguments.process_index}.pt")
    return seen


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().clone()
    return weights


def main(cases: str, out: str) -> None:
    run_each(run, cases, out)
