"""How long a save stalls training, compared with DeepSpeed's save_checkpoint, and its cost in bytes and memory.

    torchrun --nproc-per-node 2 benchmarks/checkpoint.py
    torchrun --nproc-per-node 2 benchmarks/checkpoint.py --density 0.02 --stage 3 --json checkpoint.json

A Llama-shaped model of 124M parameters is trained for a step, so that the optimizer has its moments. Then, in turns:
DeepSpeed's save (without frozen weights), ours, and ours in the background while training continues. A stall is the
time for which the training thread waits; the slowest rank counts. DeepSpeed leaves its files in the kernel's cache;
ours are on the disk, with checksums, when the save ends. The export runs in a separate process.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import deepspeed
import torch
from allocations import peak_of
from methods import llama, llama_config

from sparse_zero import SparseConfig, SparseTrainer, sparsify
from sparse_zero.checkpoint.directory import Checkpoint
from sparse_zero.ranks.stop_signals import StopRequest
from sparse_zero.recipe.training import TrainingArguments
from sparse_zero.training.device import device_name

EXCHANGES = 500

EXPORT = """
import json, sys
sys.path.insert(0, sys.argv[3])
from allocations import peak_of
from sparse_zero.checkpoint.export import export
print(json.dumps({"extra": peak_of(lambda: export(sys.argv[1], sys.argv[2]))[1]}))
"""


def build(arguments: argparse.Namespace, out: str) -> SparseTrainer:
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    zero = {**dict.fromkeys(automatic, "auto"), "zero_optimization": {"stage": arguments.stage}}
    settings = TrainingArguments(
        out,
        deepspeed=zero,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        max_steps=1,
        per_device_train_batch_size=1,
        save_strategy="no",
    )
    deepspeed.init_distributed(verbose=False)
    config = llama_config("llama-120m")
    model = sparsify(llama(config), SparseConfig(density=arguments.density, targets="all-linear"))
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(config.vocab_size, (8, 32)).tolist()]
    trainer = SparseTrainer(model, settings, train_dataset=rows, stop=StopRequest())
    trainer.train()
    return trainer


def one_step(trainer: SparseTrainer) -> None:
    ids = torch.randint(trainer.model.config.vocab_size, (1, 32), device=trainer.args.device)
    trainer.deepspeed.backward(trainer.deepspeed(input_ids=ids, labels=ids).loss)
    trainer.deepspeed.step()


def in_background(trainer: SparseTrainer) -> float:
    """Save in the background while training continues. Returns: the seconds for which training stalled."""
    started = time.perf_counter()
    trainer._write(in_background=True)
    stall = time.perf_counter() - started
    while trainer._ranks.any(trainer._writer.is_writing)[0]:
        one_step(trainer)
    started = time.perf_counter()
    trainer._writer.finish()
    return stall + time.perf_counter() - started


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    out = arguments.out or tempfile.mkdtemp(prefix="checkpoint-") if os.environ["RANK"] == "0" else None
    torch.distributed.init_process_group("gloo") if not torch.distributed.is_initialized() else None
    shared = [out]
    torch.distributed.broadcast_object_list(shared)
    out = shared[0]
    trainer = build(arguments, out)
    ranks = trainer._ranks
    theirs, ours, behind = [], [], []
    extra = peak_of(trainer._write)[1]
    extra_behind = peak_of(lambda: (trainer._write(in_background=True), trainer._writer.finish()))[1]
    for round_number in range(arguments.rounds + 1):
        save = functools.partial(trainer.deepspeed.save_checkpoint, f"{out}/theirs", exclude_frozen_parameters=True)
        seconds = peak_of(save)[0]
        sync = peak_of(trainer._write)[0]
        stalls = ranks.gather((seconds, sync, in_background(trainer)))
        slowest = [max(values) for values in zip(*stalls, strict=True)]
        if round_number:  # the first warms up
            for values, value in zip((theirs, ours, behind), slowest, strict=True):
                values.append(value)
    step = statistics.median(peak_of(lambda: one_step(trainer))[0] for _ in range(5))
    started = time.perf_counter()
    for _ in range(EXCHANGES):
        ranks.any(False, False)
    exchange = (time.perf_counter() - started) / EXCHANGES
    checkpoint = Checkpoint(f"{out}/checkpoint-1")
    shard = checkpoint.manifest.shards[ranks.rank].file.bytes
    extras = ranks.gather((extra / shard, extra_behind / shard))
    largest, largest_behind = (max(values) for values in zip(*extras, strict=True))
    figures: dict[str, object] = {}
    if ranks.rank == 0:
        shards = [shard.file.bytes for shard in checkpoint.manifest.shards]
        scalars = sum(checkpoint.manifest.sizes().values())
        mean = sum(shards) / len(shards)
        figures = {
            "device": device_name(),
            "ranks": ranks.world_size,
            "stage": arguments.stage,
            "scalars": scalars,
            "bytes_per_scalar": sum(p.stat().st_size for p in checkpoint.directory.iterdir()) / scalars,
            "theirs_bytes_per_scalar": sum(p.stat().st_size for p in Path(out, "theirs").rglob("*.pt"))
            / len(list(Path(out, "theirs").glob("global_step*")))
            / scalars,
            "largest_shard_over_mean": max(shards) / mean,
            "theirs_seconds": statistics.median(theirs),
            "ours_seconds": statistics.median(ours),
            "background_seconds": statistics.median(behind),
            "ours_over_theirs": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
            "background_over_theirs": statistics.median(a / b for a, b in zip(behind, theirs, strict=True)),
            "step_seconds": step,
            "exchange_microseconds": exchange * 1e6,
            "extra_memory_over_shard": largest,
            "extra_memory_in_background_over_shard": largest_behind,
            "export_extra_mebibytes": exported(checkpoint, out) / 2**20,
            "largest_tensor_mebibytes": max(checkpoint.manifest.sizes().values()) * 4 / 2**20,
        }
        if not arguments.out:
            shutil.rmtree(out)
    return figures


def exported(checkpoint: Checkpoint, out: str) -> int:
    command = [sys.executable, "-c", EXPORT, str(checkpoint.directory), f"{out}/adapter", str(Path(__file__).parent)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["extra"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.1, help="trainable fraction of the model")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="write and keep the checkpoints here; default: a temporary directory")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    figures = measure(arguments)
    if figures:
        for name, value in figures.items():
            print(f"{name:40} {value:.4g}" if isinstance(value, float) else f"{name:40} {value}")
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
