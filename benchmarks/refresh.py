"""The time of a step for writing deltas into their weights, and for the optimizer, at each ZeRO stage.

    torchrun --nproc-per-node 2 benchmarks/refresh.py
    torchrun --nproc-per-node 2 benchmarks/refresh.py --stages 3 --model llama-350m --json refresh.json
    torchrun --nproc-per-node 2 benchmarks/refresh.py --granularity 16 --indices regenerated

A Llama-shaped model of 120M parameters with random weights, 1% of its linear weights selected. The first table has
medians over the steps of rank 0: a step (forward, backward, optimizer), and its parts. All deltas are written by a few
calls, at stage 3 by one for each gathered weight. Stage 3 has two rows: one for models below DeepSpeed's limit of live
parameters (a billion), and one in which every weight is gathered again for backward, as in larger models. The second
table has only the update of as many scalars: in one tensor per selected weight, or in a single tensor, as in
DeepSpeed's partitions.
"""

import argparse
import gc
import json
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from methods import SHAPES, TARGETS, Budget, llama, llama_config
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from turns import in_turns

from sparse_zero import SparseConfig, sparsify
from sparse_zero.model import writes
from sparse_zero.model.weight import SparseWeight
from sparse_zero.training.device import device_name
from sparse_zero.zero.parameters import fit_buckets

ZERO = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3, two gathers": {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0},
}


class Clock:
    """Seconds since `reset`, and number of calls, by purpose."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.times: dict[str, int] = defaultdict(int)

    @contextmanager
    def measures(self, name: str) -> Iterator[None]:
        started = now()
        yield
        self.seconds[name] += now() - started
        self.times[name] += 1


def now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Time all writes and updates."""
    refresh, refresh_copy, started = writes.refresh, SparseWeight.refresh_copy, []

    def timed(write: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            with clock.measures("write"):
                write(*args, **kwargs)

        return run

    def after(*_: Any) -> None:
        clock.seconds["update"] += now() - started.pop()

    hooks = [
        register_optimizer_step_pre_hook(lambda *_: started.append(now())),
        register_optimizer_step_post_hook(after),
    ]
    writes.refresh, SparseWeight.refresh_copy = timed(refresh), timed(refresh_copy)
    yield
    writes.refresh, SparseWeight.refresh_copy = refresh, refresh_copy
    for hook in hooks:
        hook.remove()


def sparse_llama(arguments: argparse.Namespace) -> torch.nn.Module:
    model = llama(llama_config(arguments.model), getattr(torch, arguments.dtype))
    budget = Budget.of(model, TARGETS["all-linear"], arguments.density)
    config = SparseConfig(
        rank_equivalent=budget.rank,
        targets=budget.targets,
        granularity=arguments.granularity,
        indices=arguments.indices,
    )
    return sparsify(model, config)


def steps_at(stage: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row of the first table: medians over the steps of this rank."""
    model = sparse_llama(arguments)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": arguments.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": dict(ZERO[stage]),
    }
    fit_buckets(config, model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=config)
    clock, steps = Clock(), []
    with watched(clock):
        for number in range(arguments.steps + 2):
            ids = torch.randint(50304, (1, arguments.tokens), device=engine.device)
            clock.reset()
            with clock.measures("step"):
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                with clock.measures("engine.step"):
                    engine.step()
            if number >= 2:  # warm-up; stage 3 learns the order of the modules in the first step
                steps.append(clock.seconds | {"calls": clock.times["write"]})
    row = {
        "stage": stage,
        "seconds": statistics.median(step["step"] for step in steps),
        "calls": statistics.median(step["calls"] for step in steps),
    }
    for part in ("write", "update", "engine.step"):
        row[part] = statistics.median(step[part] / step["step"] for step in steps)
    engine.destroy()
    return row


def updates(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The second table: optimizers in turns, on one tensor per delta, and on a single tensor of all deltas."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    counts = [p.numel() for p in sparse_llama(arguments).parameters() if p.requires_grad]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    makers: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
        "AdamW, loop": lambda deltas: torch.optim.AdamW(deltas, foreach=False),
        "AdamW, foreach": lambda deltas: torch.optim.AdamW(deltas, foreach=True),
        "AdamW, fused": lambda deltas: torch.optim.AdamW(deltas, fused=True),
        "DeepSpeed CPU Adam": lambda deltas: DeepSpeedCPUAdam(deltas),
    }
    contenders = {}
    for name, make in makers.items():
        for layout, sizes in (("each", counts), ("flat", [sum(counts)])):
            deltas = [torch.zeros(n, device="cpu" if "CPU" in name else device).requires_grad_() for n in sizes]
            for delta in deltas:
                delta.grad = torch.ones_like(delta)
            contenders[name, layout] = make(deltas)
    steps = {key: optimizer.step for key, optimizer in contenders.items()}
    seconds = in_turns(steps, 4 * arguments.steps, str(device))
    return [
        {"optimizer": name}
        | {layout: statistics.median(seconds[name, layout]) for layout in ("each", "flat")}
        | {"tensors": len(counts), "scalars": sum(counts)}
        for name in makers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=ZERO, default=list(ZERO))
    parser.add_argument("--density", type=float, default=0.01, help="fraction of the linear weights")
    parser.add_argument("--granularity", type=int, default=1)
    parser.add_argument("--indices", choices=["stored", "regenerated"], default="stored")
    parser.add_argument("--model", choices=SHAPES, default="llama-120m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each rank's step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    # DeepSpeed calls functions that torch has renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(verbose=False)
    rows = []
    for stage in arguments.stages:
        rows.append(steps_at(stage, arguments))
        gc.collect()
    ranks = torch.distributed.get_world_size()
    if torch.distributed.get_rank() == 0:
        optimizers = updates(arguments)
        show(rows, optimizers, arguments, ranks)
        if arguments.json:
            settings = vars(arguments) | {"json": None, "ranks": ranks, "device": device_name()}
            text = json.dumps({"arguments": settings, "steps": rows, "updates": optimizers}, indent=2)
            arguments.json.write_text(text + "\n")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def show(rows: list[dict], optimizers: list[dict], arguments: argparse.Namespace, ranks: int) -> None:
    print(
        f"{ranks} ranks, {device_name()}, {arguments.dtype}, {arguments.tokens} tokens per rank, "
        f"{arguments.density:.2%} of the linear weights, strips of {arguments.granularity}, indices "
        f"{arguments.indices}, {arguments.steps} steps"
    )
    print(f"{'ZeRO stage':<15} {'s / step':>9} {'calls':>7} {'writing':>8} {'update':>8} {'engine.step':>12}")
    for row in rows:
        print(
            f"{row['stage']:<15} {row['seconds']:>9.3f} {row['writes']:>7.0f} {row['write']:>8.2%} "
            f"{row['update']:>8.2%} {row['engine.step']:>12.2%}"
        )
    print(f"\n{optimizers[0]['scalars']:,} scalars of {optimizers[0]['tensors']} weights, whole, on one rank")
    print(f"{'update, ms':<20} {'one by one':>11} {'in one':>8}")
    for row in optimizers:
        print(f"{row['optimizer']:<20} {row['each'] * 1e3:>11.2f} {row['flat'] * 1e3:>8.2f}")


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    main()
