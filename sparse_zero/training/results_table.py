"""The table that is printed at the end of a run."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparse_zero.data.metrics import METRICS
from sparse_zero.recipe.method import SPARSE
from sparse_zero.recipe.secrets import hide_values, is_secret

PREFERENCES = ("reward", "kl", "margin", "rewards/margins", "rewards/accuracies", "mean_token_accuracy")
"""Metrics of TRL's trainers."""


def print_results(results: dict[str, Any], recipe: Sequence[str]) -> None:
    """Print the results of a run.

    Args:
        results: the content of results.json.
        recipe: its path and the overrides, for the suggested next command.
    """
    table = Table(title=None, show_header=False, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for key in (*METRICS, "loss", *PREFERENCES):
        if key in results:
            before, digits = results.get(f"{key}_before"), 2 if key == "perplexity" else 4
            shown = f"{results[key]:.{digits}f}"
            table.add_row(key.replace("_", " "), shown if before is None else f"{before:.{digits}f} -> {shown}")
    trainable, total = results["trainable_parameters"], results["total_parameters"]
    table.add_row("evaluated on", f"{results['eval_examples']:,} held-out examples")
    if results.get("method", SPARSE) != SPARSE:
        table.add_row("method", _method(results))
    for key, value in results.get("test", {}).items():
        table.add_row(f"test {key.replace('_', ' ')}", f"{value:.4f}")
    if "forgetting" in results:
        text = results["forgetting"]
        table.add_row("loss on a text", f"{text['loss_before']:.4f} -> {text['loss']:.4f}")
    table.add_row("trainable", f"{trainable:,} of {total:,} scalars ({100 * trainable / total:.2f}%)")
    table.add_row(
        "training",
        f"{results['train_seconds']:.1f} s, {results['steps']:,} steps, {results['train_examples']:,} examples",
    )
    table.add_row("ranks", f"{results['world_size']}, {_partitioning(results)}, {results['device']}")
    table.add_row("optimizer state", _per_rank(results["optimizer_bytes_per_rank"]))
    table.add_row("peak memory", _per_rank(results["peak_memory_bytes_per_rank"]))
    paths = results["paths"]
    result = "adapter" if "adapter" in paths else "model"
    table.add_row(result, f"{paths[result]} ({mebibytes(results[f'{result}_bytes'])})")
    if "merged" in paths:
        table.add_row("merged model", paths["merged"])
    if Path(paths["logs"]).is_dir():
        table.add_row("logs", shlex.join(["tensorboard", "--logdir", paths["logs"]]))
    if "merged" in paths or results.get("method", SPARSE) != SPARSE:
        words = ["evaluate", *_without_secrets(recipe, "launch.", "training.output_dir="), "--adapter", paths[result]]
    else:
        words = ["merge", paths["adapter"], str(Path(paths["adapter"]).with_name("merged"))]
    _print(table, words)


def print_rates(found: dict[str, Any], recipe: Sequence[str]) -> None:
    """Print the losses of several learning rates.

    Args:
        found: the result of `find_rate`.
        recipe: its path and the overrides, for the suggested next command.
    """
    table = Table(title=None, show_header=False, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_row("learning rate", f"loss after {found['steps']} steps, from {found['loss_before']:.4f}")
    for each in found["rates"]:
        loss = "not finite" if each["loss"] is None else f"{each['loss']:.4f}"
        table.add_row(
            f"{each['learning_rate']:g}", loss + ("  <-" if each["learning_rate"] == found["chosen"] else "")
        )
    words = ["train", *_without_secrets(recipe, "training.learning_rate=")]
    words.append(f"training.learning_rate={found['chosen']:g}")
    _print(table, words)


def _print(table: Table, next_words: Sequence[str]) -> None:
    # In a log file Rich assumes 80 columns, which would cut the paths
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    # Not in the table, which would break the command into lines that cannot be copied
    width = max(len(str(cell)) for cell in table.columns[0].cells)
    console.print(f"{'next':{width}}   {shlex.join([_command(), *next_words])}", soft_wrap=True)


def _without_secrets(recipe: Sequence[str], *left_out: str) -> list[str]:
    """The path of a recipe and its overrides, as they may be printed.

    Args: left_out: what overrides begin with that the command does not need.
    """
    path, *overrides = recipe
    words = [path]
    for override in hide_values(overrides)[0]:
        key, _, value = override.partition("=")
        if not override.startswith(left_out) and not is_secret(key.rpartition(".")[2], value):
            words.append(override)
    return words


def _method(results: dict[str, Any]) -> str:
    """`lora of rank 21 (a sparse run of this recipe trains 454,144 scalars)`"""
    rank = f" of rank {results['rank']}" if "rank" in results else ""
    count = results.get("sparse_parameters")
    return f"{results['method']}{rank}" + (f" (a sparse run would train {count:,} scalars)" if count else "")


def _partitioning(results: dict[str, Any]) -> str:
    if results["deepspeed"]:
        return f"ZeRO stage {results['zero_stage']}"
    return "no DeepSpeed" if results["world_size"] == 1 else "DDP (training.deepspeed is not set)"


def _command() -> str:
    """The command as the user can type it: with its full path if its environment is not on PATH."""
    installed = Path(sys.executable).with_name("sparse-zero")
    return "sparse-zero" if shutil.which("sparse-zero") or not installed.exists() else str(installed)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _per_rank(counts: list[int]) -> str:
    return " + ".join(f"{count / 2**20:.1f}" for count in counts) + " MiB" + (" by rank" if len(counts) > 1 else "")
