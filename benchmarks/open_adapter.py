"""Time of loading an adapter into a model of a billion parameters, compared with a floor and with PEFT.

    python benchmarks/open_adapter.py
    python benchmarks/open_adapter.py --layers 4 --rounds 3

All adapters have about the same number of scalars, on the value and output projections, or on all linear layers
(`--targets all-linear`). In each round all take turns; the figures are medians of the ratios to the floor.
    floor         reads the file, draws the positions, and adds the values, which every method must do; in chunks that
                  stay in the cache, with the weights distributed over the threads
    plain         the same in plain torch: one whole weight after the other
    stored        the floor with positions that are read from the file (int32)
    sparse-zero   load_adapter and the write into the weights: verified, removable with `unload`, and trainable
    lora          PeftModel.from_pretrained, then merge_and_unload
    shira         PeftModel.from_pretrained
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from methods import llama, llama_config
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_zero import SparseConfig, load_adapter, save_adapter, sparsify, unload
from sparse_zero.adapters.files import read_config
from sparse_zero.selection.draws import in_chunks
from sparse_zero.selection.threads import map_in_threads

TARGETS = {
    "value-output": ["v_proj", "o_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def model(layers: int) -> nn.Module:
    """A model with the shape of Llama 3.2 1B: 1.24 billion scalars with 16 layers. The values do not matter."""
    made = llama(llama_config("llama-1b", layers), device="meta").to_empty(device="cpu")
    for parameter in made.parameters():
        # Cheaper than random numbers, but touches every page
        parameter.data.uniform_(-0.02, 0.02)
    made.tie_weights()
    return made


def make_adapters(base: nn.Module, targets: list[str], rank: int, root: Path) -> dict[str, int]:
    """Write an adapter of each kind. Returns: the number of scalars of each."""
    counts = {}
    sparsify(base, SparseConfig(rank_equivalent=rank, targets=targets))
    with torch.no_grad():
        for weight in base.sparsity.weights.values():
            weight.delta.normal_(std=1e-3)
    counts["sparse-zero"] = base.sparsity.selected_parameters
    save_adapter(base, root / "sparse-zero")
    save_file(
        {name: weight.flat_positions().to(torch.int32) for name, weight in base.sparsity.weights.items()},
        root / "positions.safetensors",
    )
    unload(base)
    for name, config in (
        ("lora", LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)),
        ("shira", ShiraConfig(r=rank, target_modules=targets, init_weights=False)),
    ):
        adapted = get_peft_model(base, config)
        counts[name] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        adapted.save_pretrained(root / name)
        adapted.unload()
    return counts


@torch.no_grad()
def floor(base: nn.Module, root: Path, stored: bool) -> None:
    tensors = load_file(root / "sparse-zero" / "adapter_model.safetensors")
    positions = load_file(root / "positions.safetensors") if stored else {}
    drawn = {} if stored else read_config(root / "sparse-zero").tensors
    parameters = dict(base.named_parameters())

    @torch.no_grad()
    def add(name: str) -> None:
        values, weight = tensors[name], parameters[name].view(-1)
        chunks = in_chunks(positions[name]) if stored else drawn[name].selection(name).chunks()
        start = 0
        for flat in chunks:
            flat, stop = flat.long(), start + flat.numel()
            weight.index_copy_(0, flat, weight.index_select(0, flat).add_(values[start:stop]))
            start = stop

    map_in_threads(add, tensors)


@torch.no_grad()
def plain(base: nn.Module, root: Path) -> None:
    tensors, drawn = (
        load_file(root / "sparse-zero" / "adapter_model.safetensors"),
        read_config(root / "sparse-zero").tensors,
    )
    for name, values in tensors.items():
        flat, weight = drawn[name].selection(name).positions(), base.get_parameter(name).view(-1)
        weight.index_copy_(0, flat, weight.index_select(0, flat) + values)


def sparse_zero(base: nn.Module, root: Path) -> None:
    load_adapter(base, root / "sparse-zero")
    for weight in base.sparsity.weights.values():
        weight.refresh()


def ways(
    base: nn.Module, root: Path, methods: list[str]
) -> Iterator[tuple[str, Callable[[], object], Callable[[object], object]]]:
    """(name, the timed function, the function that undoes it). Before each, all weights are restored."""
    names = read_config(root / "sparse-zero").tensors
    before = {name: base.get_parameter(name).detach().clone() for name in names}

    def restore() -> None:
        for name, values in before.items():
            base.get_parameter(name).data.copy_(values)

    timed: dict[str, tuple[Callable[[], object], Callable[[object], object]]] = {
        "floor": (lambda: floor(base, root, stored=False), lambda _: None),
        "plain": (lambda: plain(base, root), lambda _: None),
        "stored": (lambda: floor(base, root, stored=True), lambda _: None),
        "sparse-zero": (lambda: sparse_zero(base, root), lambda _: unload(base)),
        "lora": (lambda: PeftModel.from_pretrained(base, root / "lora").merge_and_unload(), lambda _: None),
        "shira": (lambda: PeftModel.from_pretrained(base, root / "shira"), lambda adapted: adapted.unload()),
    }
    for name in methods:
        run, take_back = timed[name]
        restore()
        yield name, run, take_back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32, help="rank of LoRA; the other adapters have as many scalars")
    parser.add_argument("--targets", choices=TARGETS, default="all-linear")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="+", default=["floor", "plain", "stored", "sparse-zero", "lora", "shira"])
    options = parser.parse_args()
    base = model(options.layers)
    total = sum(p.numel() for p in base.parameters())
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        counts = make_adapters(base, TARGETS[options.targets], options.rank, root)
        for round_number in range(options.rounds + 1):
            for name, run, take_back in ways(base, root, options.methods):
                gc.collect()
                started = time.perf_counter()
                result = run()
                taken = time.perf_counter() - started
                take_back(result)
                if round_number:  # the first one warms up
                    seconds.setdefault(name, []).append(taken)
    print(f"{total:,} scalars, adapters of {counts} scalars, {options.targets}, {torch.get_num_threads()} threads")
    rows = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["floor"], strict=True)]
        rows[name] = {"seconds": statistics.median(times), "ratio": statistics.median(ratios)}
        low, high = min(ratios), max(ratios)
        print(
            f"{name:12s} {rows[name]['seconds']:8.3f} s   {rows[name]['ratio']:6.2f} x floor ({low:.2f} to {high:.2f})"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
