"""Strips of g scalars instead of single scalars: the time that they save, and their accuracy.

    python benchmarks/granularity.py --cost         time of the gradient and of the step; granularity.json
    python benchmarks/granularity.py --accuracy     the runs that are missing; granularity.jsonl
    python benchmarks/granularity.py                no runs: page and plot of the existing results

Gradient: of one linear layer at its selected positions, in turns with the dense product of plain torch. Step: of a
Llama-shaped model with all linear layers as targets, in turns with forward and backward of the frozen model. Accuracy:
as in noise_quality.py, without noise: MiniLM-L6 on Rotten Tomatoes; all granularities of a seed have the same
sentences in the same order and the same head. Each granularity uses the learning rate with the best validation
accuracy among noise_quality.py's rates for sparse runs, with its seed for tuning. Each run is one line of the file, so
that an interrupted call can be repeated, and several calls share the runs.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from methods import TARGETS, Budget, llama, llama_config, prepare, sparse, trained_parameters, training_step
from noise_quality import append_row, claim, read_lines, train_and_measure
from noise_quality_plan import EPOCHS, SEEDS, TUNING_SIZE, Run, best, key_of, learning_rate_runs
from noise_quality_table import Accuracies, percent, points
from tables import RESULTS, Row, read, spread, table, write
from torch import nn
from turns import in_turns, ratio

from sparse_zero import SparseConfig, sparsify
from sparse_zero.training.device import device_name

GRANULARITIES = (1, 8, 16, 32, 64)
SENTENCES = TUNING_SIZE
COST, ACCURACY = RESULTS / "granularity.json", RESULTS / "granularity.jsonl"

# ---- cost


def gradients(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds of the gradient of one square weight, by granularity, and of the dense gradient."""
    size, torch_device = arguments.size, torch.device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    inputs, upstream = (
        torch.randn(arguments.tokens, size, generator=generator).to(torch_device, dtype) for _ in ("inputs", "outputs")
    )
    ways: dict[str, Callable[[], Any]] = {"dense": lambda: upstream.t() @ inputs}
    for granularity in GRANULARITIES:
        layer = nn.Sequential(nn.Linear(size, size, bias=False, dtype=dtype, device=torch_device))
        sparsify(layer, SparseConfig(density=arguments.density, targets="all", granularity=granularity))
        # The inputs need no gradient, so that only the delta's is timed
        ways[str(granularity)] = partial(
            torch.autograd.grad, layer(inputs), trained_parameters(layer), upstream, retain_graph=True
        )
    return in_turns(ways, arguments.rounds, arguments.device)


def steps(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of the step by granularity and of the floor, and the number of trained scalars."""
    base = llama(llama_config(arguments.model), dtype, arguments.device)
    budget = Budget.of(base, TARGETS["all-linear"], arguments.density)
    ids = torch.randint(base.config.vocab_size, (1, arguments.tokens), generator=torch.Generator().manual_seed(1))
    models = {"frozen": prepare("frozen", base, budget)}
    models |= {str(g): sparse(copy.deepcopy(base), budget, granularity=g) for g in GRANULARITIES}
    ways = {name: training_step(model, ids.to(arguments.device)) for name, model in models.items()}
    trainable = {name: sum(p.numel() for p in trained_parameters(model)) for name, model in models.items()}
    return in_turns(ways, arguments.rounds, arguments.device), trainable


def measure_cost(arguments: argparse.Namespace) -> list[Row]:
    results = []
    for dtype in ("float32", "bfloat16"):
        gradient = gradients(arguments, getattr(torch, dtype))
        step, trainable = steps(arguments, getattr(torch, dtype))
        results.append(
            {
                "machine": device_name(),
                "dtype": dtype,
                "model": arguments.model,
                "size": arguments.size,
                "tokens": arguments.tokens,
                "density": arguments.density,
                "rounds": arguments.rounds,
                "rows": [
                    {
                        "granularity": g,
                        "trainable": trainable[str(g)],
                        "gradient_seconds": gradient[str(g)],
                        "gradient_over_dense": ratio(gradient[str(g)], gradient["dense"]),
                        "gradient_over_single": ratio(gradient[str(g)], gradient["1"]),
                        "step_seconds": step[str(g)],
                        "step_over_frozen": ratio(step[str(g)], step["frozen"]),
                        "step_over_single": ratio(step[str(g)], step["1"]),
                    }
                    for g in GRANULARITIES
                ],
            }
        )
    return results


# ---- accuracy


Done = dict[tuple[int, str], Row]


def tuning_runs() -> list[Run]:
    return [run for run in learning_rate_runs() if run.method == "sparse"]


def planned_runs(done: Done) -> list[tuple[int, Run]]:
    """The tuning runs that choose each granularity's learning rate, then the runs with that rate, seed by seed, so
    that paired differences are complete early.
    """
    tuning = [(g, run) for run in tuning_runs() for g in GRANULARITIES]
    rates = {}
    for g in GRANULARITIES:
        if winner := best(tuning_runs(), {key: row for (granularity, key), row in done.items() if granularity == g}):
            rates[g] = winner.learning_rate
    return tuning + [
        (g, Run("sparse", "none", None, rate, SENTENCES, EPOCHS[SENTENCES], seed, "test"))
        for seed in SEEDS
        for g, rate in rates.items()
    ]


def finished_runs(path: Path) -> Done:
    return {(row["granularity"], key_of(row)): row for row in read_lines(path)}


def missing_runs(path: Path) -> list[tuple[int, Run]]:
    done = finished_runs(path)
    return [(granularity, run) for granularity, run in planned_runs(done) if (granularity, run.key) not in done]


def add_missing_runs(path: Path, device: str) -> None:
    torch.set_num_threads(1)
    while missing := missing_runs(path):
        for granularity, run in missing:
            held = claim(Path(f"{path}-{granularity}"), run)
            if held is None:
                continue
            with held:
                if (granularity, run.key) not in finished_runs(path):
                    _add_run(path, granularity, run, device)
            break
        else:
            time.sleep(5)  # another call works on all of them; what it finds may settle the next


def _add_run(path: Path, granularity: int, run: Run, device: str) -> None:
    row = {"granularity": granularity} | train_and_measure(run, device, granularity)
    append_row(path, row)
    print(
        f"{time.strftime('%H:%M:%S')} g {granularity:>2} seed {run.seed} rate {run.learning_rate:g} {run.split} "
        f"{row['trainable']:,} scalars {row['accuracy']:.4f} loss {row['loss']:.4f} {row['cpu_seconds']:.0f} s of CPU",
        flush=True,
    )


def accuracies(path: Path) -> tuple[dict[int, Accuracies], dict[int, Row]]:
    """Test accuracies by granularity and seed, and a row for each granularity."""
    done = finished_runs(path)
    found: dict[int, Accuracies] = {}
    rows = {}
    for granularity, run in planned_runs(done):
        if run.split == "test" and (row := done.get((granularity, run.key))):
            found.setdefault(granularity, {})[run.seed] = row["accuracy"]
            rows[granularity] = row
    return found, rows


# ---- page and plot


def page(results: list[Row]) -> str:
    return "\n\n".join(["# Strips of g scalars", *map(_cost_section, results), _accuracy_section(ACCURACY)])


def _cost_section(result: Row) -> str:
    rows = [
        [
            str(row["granularity"]),
            f"{row['trainable']:,}",
            f"{1e3 * statistics.median(row['gradient_seconds']):.1f}",
            spread(row["gradient_over_dense"]),
            spread(row["gradient_over_single"]),
            spread(row["step_over_frozen"]),
            spread(row["step_over_single"]),
        ]
        for row in result["rows"]
    ]
    return "\n\n".join(
        [
            f"## Cost, {result['dtype']}",
            f"{result['machine']}, {result['tokens']:,} tokens, {result['density']:.2%}, {result['rounds']} rounds; "
            f"medians [quartiles]. Gradient: of one weight, {result['size']} x {result['size']}; step: "
            f"{result['model']}, all linear layers.",
            table(["g", "trainable", "gradient, ms", "/ dense", "/ g = 1", "step / frozen", "step / g = 1"], rows),
        ]
    )


def _accuracy_section(path: Path) -> str:
    found, examples = accuracies(path)
    rows = []
    for granularity, scores in found.items():
        rows.append(
            [
                str(granularity),
                f"{examples[granularity]['trainable']:,}",
                f"{examples[granularity]['learning_rate']:g}",
                str(len(scores)),
                percent(scores.values()),
                "" if granularity == 1 else points(scores, found.get(1, {})),
            ]
        )
    missing = len(GRANULARITIES) * len(SEEDS) - sum(map(len, found.values()))
    return "\n\n".join(
        [
            "## Accuracy",
            f"Rotten Tomatoes, MiniLM-L6, {SENTENCES:,} training and 1,000 test sentences; percent, mean ± standard "
            "deviation over the seeds; paired difference to g = 1, mean ± standard error.",
            table(["g", "trainable", "rate", "seeds", "accuracy", "- g = 1"], rows),
            *([f"{missing} runs are missing."] if missing else []),
        ]
    )


def plot(results: list[Row], figure: Any) -> None:
    figure.set_size_inches(11, 3.6)
    time_of_gradient, time_of_step, accuracy = figure.subplots(1, 3)
    for result in results:
        x = [row["granularity"] for row in result["rows"]]
        for panel, kind in ((time_of_gradient, "gradient_over_dense"), (time_of_step, "step_over_frozen")):
            middle = [row[kind]["median"] for row in result["rows"]]
            low = [row[kind]["median"] - row[kind]["lower"] for row in result["rows"]]
            high = [row[kind]["upper"] - row[kind]["median"] for row in result["rows"]]
            panel.errorbar(x, middle, [low, high], marker="o", capsize=3, label=result["dtype"])
    time_of_gradient.set_ylabel("gradient / dense product")
    time_of_step.set_ylabel("step / frozen forward and backward")
    time_of_step.legend()
    found, _ = accuracies(ACCURACY)
    for seed in SEEDS:
        points = [(g, 100 * scores[seed]) for g, scores in found.items() if seed in scores]
        accuracy.plot(*zip(*points, strict=True), color="lightgray", marker=".") if points else None
    means = [(g, 100 * statistics.fmean(scores.values())) for g, scores in found.items()]
    accuracy.plot(*zip(*means, strict=True), color="black", marker="o", label="mean") if means else None
    accuracy.set_ylabel("test accuracy, % (gray: seeds)")
    for panel in (time_of_gradient, time_of_step, accuracy):
        panel.set_xscale("log", base=2)
        panel.set_xticks(GRANULARITIES, [str(g) for g in GRANULARITIES])
        panel.set_xlabel("scalars in a strip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--model", default="llama-120m")
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the single weight")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", type=Path, default=COST, help="results of --cost; page and plot go to the same directory"
    )
    arguments = parser.parse_args()
    results = measure_cost(arguments) if arguments.cost else read(arguments.json)
    if arguments.accuracy:
        add_missing_runs(ACCURACY, arguments.device)
    write(arguments.json, results, page, plot)
    print(page(results))


if __name__ == "__main__":
    main()
