"""Time of Random Position Noise, compared with permuting every scalar, in turns in one process.

    python benchmarks/noise.py                      (32, 512, 768), p = 0.1 and 0.3, and the fraction of a step
    python benchmarks/noise.py --dtype bfloat16 --device cuda --json noise.json

lookup       the plain embedding forward
permutation  as in the paper's public code: a 0/1 matrix of the selected scalars, a permutation of all positions, both
             gathered with it. As in that code the matrix is drawn once; this is not timed.
rpn          this library, with a new selection and new targets each time
The fraction of a step compares the noise and its backward with forward and backward of a model with the shape of the
one in configs/demo.yaml, twice, for the clean and the noisy pass. The model is frozen except for the gradient of the
input embeddings, so a real step takes longer. On a shared CPU, set OMP_NUM_THREADS=1: otherwise the threads wait for
each other in every small operation.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification
from turns import in_turns, ratio

from rpn.noise import move_scalars
from rpn.streams import Stream
from sparse_zero.training.device import device_name

VOCABULARY = 30522
DEMO_SHAPE = (16, 64, 384)


def permute_everything(embeddings: Tensor, selected: Tensor) -> Tensor:
    """Random Position Noise as in the public code: O(batch * length * hidden) for any number of selected scalars."""
    order = torch.randperm(embeddings.numel(), device=embeddings.device)
    arriving = (embeddings * selected).flatten()[order].view_as(embeddings)
    overwritten = selected.flatten()[order].view_as(selected)
    return embeddings - embeddings * overwritten + arriving


def measure_shape(arguments: argparse.Namespace) -> list[dict]:
    """One row for each method and probability: median seconds, and its ratio to rpn at the same probability."""
    shape, rows = tuple(arguments.shape), []
    options = {"dtype": getattr(torch, arguments.dtype), "device": arguments.device}
    weight = torch.randn(VOCABULARY, shape[-1], **options)
    ids = torch.randint(VOCABULARY, shape[:2], device=arguments.device)
    embeddings = torch.nn.functional.embedding(ids, weight)
    keep = torch.ones(shape[:2], dtype=torch.bool, device=arguments.device)
    for probability in arguments.probabilities:
        selected = (torch.rand(shape, device=arguments.device) < probability).to(embeddings.dtype)
        steps = iter(range(1 << 30))
        seconds = in_turns(
            {
                "lookup": lambda: torch.nn.functional.embedding(ids, weight),
                "permutation": lambda selected=selected: permute_everything(embeddings, selected),
                "rpn": lambda probability=probability, steps=steps: move_scalars(
                    embeddings, keep, Stream(step=next(steps), scope=arguments.scope), probability=probability
                ),
            },
            arguments.rounds,
            arguments.device,
        )
        for method, times in seconds.items():
            rows.append(
                {"shape": shape, "probability": probability, "method": method} | against(times, seconds["rpn"])
            )
    return rows


def measure_demo_step(arguments: argparse.Namespace) -> list[dict]:
    """One row for each probability: seconds of the noise and of the step, and the noise's fraction of the step."""
    torch.manual_seed(0)
    batch, length, hidden = DEMO_SHAPE
    config = BertConfig(hidden_size=hidden, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = BertForSequenceClassification(config).to(arguments.device).train().requires_grad_(False)
    ids = torch.randint(VOCABULARY, (batch, length), device=arguments.device)
    labels = torch.zeros(batch, dtype=torch.int64, device=arguments.device)
    keep = torch.ones_like(ids, dtype=torch.bool)
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    upstream = torch.randn_like(embeddings)
    steps = iter(range(1 << 30))

    def step() -> None:
        for _ in ("clean", "noisy"):
            model(inputs_embeds=embeddings, labels=labels).loss.backward()
        embeddings.grad = None

    def noise(probability: float) -> None:
        disturbed = move_scalars(
            embeddings, keep, Stream(step=next(steps), scope=arguments.scope), probability=probability
        )
        torch.autograd.grad(disturbed, embeddings, upstream)

    methods: dict[str, Callable[[], object]] = {"step": step}
    for probability in arguments.probabilities:
        methods[f"noise {probability}"] = lambda probability=probability: noise(probability)
    seconds = in_turns(methods, arguments.rounds, arguments.device)
    return [
        {
            "shape": DEMO_SHAPE,
            "probability": probability,
            "noise_seconds": statistics.median(seconds[f"noise {probability}"]),
            "step_seconds": statistics.median(seconds["step"]),
            "share_of_step": statistics.median(
                noise / step for noise, step in zip(seconds[f"noise {probability}"], seconds["step"], strict=True)
            ),
        }
        for probability in arguments.probabilities
    ]


def against(times: list[float], ours: list[float]) -> dict:
    ratios = ratio(times, ours)
    return {
        "seconds": statistics.median(times),
        "ratio_to_rpn": ratios["median"],
        "quartiles": [ratios["lower"], ratios["upper"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[32, 512, 768], metavar=("BATCH", "LENGTH", "HIDDEN"))
    parser.add_argument("--probabilities", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--scope", choices=["batch", "sequence"], default="batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()

    name = device_name() if arguments.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {arguments.dtype}, scope {arguments.scope}, {arguments.rounds} rounds")
    rows = measure_shape(arguments)
    print(f"{'shape':<15} {'p':>4}  {'method':<12} {'ms':>8} {'/ rpn':>7}   quartiles")
    for row in rows:
        print(
            f"{'x'.join(map(str, row['shape'])):<15} {row['probability']:>4}  {row['method']:<12} "
            f"{1e3 * row['seconds']:>8.2f} {row['ratio_to_rpn']:>7.2f}   "
            f"{row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f}"
        )
    shares = measure_demo_step(arguments)
    print(f"\n{'shape':<15} {'p':>4}  {'noise ms':>8} {'step ms':>8} {'share':>7}")
    for row in shares:
        print(
            f"{'x'.join(map(str, row['shape'])):<15} {row['probability']:>4}  {1e3 * row['noise_seconds']:>8.2f} "
            f"{1e3 * row['step_seconds']:>8.1f} {row['share_of_step']:>7.2%}"
        )
    if arguments.json:
        measured = {"arguments": vars(arguments) | {"json": None}, "device": name, "rows": rows, "shares": shares}
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
