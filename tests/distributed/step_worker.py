"""One rank that counts what a training step does, by case."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import tiny
import torch
from torch import nn

from sparse_zero import SparseConfig, sparsify
from sparse_zero.model.weight import SparseWeight
from sparse_zero.zero.parameters import fit_buckets

TASK, BATCH, WARM_UP = "causal-lm", 2, 3
"""Stage 3 learns in the first steps which module follows which."""


def run(base: str, case: dict[str, Any]) -> dict[str, Any]:
    model = tiny.AUTO_CLASS[TASK].from_pretrained(base).train()
    sparsify(model, SparseConfig(density=tiny.density_of(model, TASK)))
    micro_batches = case.get("micro_batches", 1)
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": dict(case["zero"]),
        "comms_logger": {"enabled": True, "prof_all": True, "verbose": False},
    }
    fit_buckets(config, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-2)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=config)
    rank, ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    examples = tiny.examples(TASK, (WARM_UP + 1) * micro_batches * ranks * BATCH)
    starts = range(rank * BATCH, len(examples), ranks * BATCH)
    buckets = [0]
    for parameter in trained:
        # In backward: stages 1 and 2 give their buckets back when it is over
        parameter.register_post_accumulate_grad_hook(lambda _: buckets.append(bucket_bytes(engine.optimizer)))
    with counted_writes() as writes:
        for number, start in enumerate(starts):
            if number == WARM_UP * micro_batches:
                deepspeed.comm.reset_log()
            rows = examples[start : start + BATCH]
            batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
            writes.append(0)
            engine.backward(engine(**batch).loss)
            engine.step()
    return {
        "sent": messages(),
        "writes": writes[-micro_batches:],
        "buckets": max(buckets),
        "bucket_size": config["zero_optimization"].get("reduce_bucket_size"),
        "parameters": {
            name: [numel(p), p.requires_grad, getattr(p, "ds_persist", False)] for name, p in model.named_parameters()
        },
    }


def numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


@contextlib.contextmanager
def counted_writes() -> Iterator[list[int]]:
    """How often deltas are written into their weights, added to the last entry of the list."""
    counts: list[int] = []
    alone, together = SparseWeight.write_values, SparseWeight.operands

    def counted_alone(weight: SparseWeight, *args: Any) -> None:
        counts[-1] += 1
        alone(weight, *args)

    def counted_together(weight: SparseWeight, *args: Any) -> Any:
        operands = together(weight, *args)
        counts[-1] += operands is not None
        return operands

    SparseWeight.write_values, SparseWeight.operands = counted_alone, counted_together
    yield counts
    SparseWeight.write_values, SparseWeight.operands = alone, together


def messages() -> dict[str, dict[int, int]]:
    """How many messages of how many bytes DeepSpeed's own logger has counted, by operation."""
    logged = deepspeed.comm.comm.comms_logger.get_raw_data()
    return {name: {size: entry[0] for size, entry in sizes.items()} for name, sizes in logged.items()}


def bucket_bytes(optimizer: Any) -> int:
    """What DeepSpeed has allocated to reduce gradients in: one tensor or two of each dtype."""
    held = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    tensors = [t for buffer in held for t in (buffer if isinstance(buffer, list) else [buffer]) if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main(base: str, cases: str, out: str) -> None:
    deepspeed.init_distributed(verbose=False)
    seen = {name: run(base, case) for name, case in json.loads(Path(cases).read_text()).items()}
    Path(out, f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
