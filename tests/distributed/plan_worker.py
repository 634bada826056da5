"""What a rank of a recipe's run really holds and sends, forked by fork_server.py."""

import json
import os
from pathlib import Path
from typing import Any

import deepspeed.comm
import torch
from transformers import TrainerCallback

from sparse_zero import SparseTrainer, sparsify
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.training.build import build, evaluation_settings, training_arguments
from sparse_zero.training.run import noisy_objective
from sparse_zero.zero.parameters import optimizer_state_tensors


class Watch(TrainerCallback):
    """Counts the bytes of collectives in the last step, and what is there after it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, dict[int, int]]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        log = deepspeed.comm.comm.comms_logger.comms_dict
        self.seen.append({name: {size: entry[0] for size, entry in sizes.items()} for name, sizes in log.items()})

    @property
    def last_step(self) -> dict[str, dict[int, int]]:
        before, after = self.seen[-2:]
        return {
            name: {size: count - before.get(name, {}).get(size, 0) for size, count in sizes.items()}
            for name, sizes in after.items()
        }


def measure(path: str, out: str) -> None:
    recipe = load_recipe(path)
    arguments = training_arguments(recipe)
    tokenizer, prepared, model, *_ = build(recipe, arguments)
    sparsify(model, recipe.sparse)
    watch = Watch()
    trainer = SparseTrainer(
        model,
        arguments,
        train_dataset=prepared.train,
        objective=noisy_objective(model, recipe.rpn, arguments),
        callbacks=[watch],
        **evaluation_settings(prepared, tokenizer),
    )
    trainer.train()
    seen = {"held": held(model, trainer.optimizer), "sent": watch.last_step}
    Path(out, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))


def held(model: torch.nn.Module, optimizer: Any) -> dict[str, int]:
    """Bytes by category; of a partitioned parameter its piece, and the whole where that stays."""
    selected = {id(weight.delta) for weight in model.sparsity.weights.values()}
    found = dict.fromkeys(("weights", "deltas", "persistent", "originals", "indices", "buffers"), 0)
    for parameter in model.parameters():
        kind = "deltas" if id(parameter) in selected else "weights"
        cut = getattr(parameter, "ds_tensor", None)
        found[kind] += size_of(parameter if cut is None else cut)
        if cut is not None:
            found["persistent"] += size_of(parameter.data) if parameter.ds_persist else 0
    for name, buffer in model.named_buffers():
        kind = "originals" if name.endswith("_base") else "indices" if name.endswith("_strips") else "buffers"
        found[kind] += size_of(buffer)
    states = optimizer_state_tensors(optimizer)
    return found | {"optimizer": sum(map(size_of, states))}


def size_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
