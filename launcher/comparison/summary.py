"""From the results of runs to the rows of the table: the chosen rates, means and deviations. Arithmetic only."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launcher.comparison.runs import Ended
from launcher.comparison.variants import Comparison, Variant

LOWER_IS_BETTER = ("loss", "perplexity", "mse")


def metric_of(comparison: Comparison, results: Mapping[str, Any]) -> str:
    """The metric of the task: training.metric_for_best_model if the test has it, else the first one of the test."""
    wanted = str(comparison.recipe.training.get("metric_for_best_model") or "").removeprefix("eval_")
    return wanted if wanted in results["test"] else next(iter(results["test"]))


def choose_rate(metric: str, of_rates: Mapping[float, Mapping[str, Any]]) -> float | None:
    """The rate whose run is the best on the evaluation examples; of equal ones that with the lower loss.

    Args: of_rates: the results of a run with each rate. A run whose metric is not finite is not chosen.

    Returns: None if no run can be chosen.
    """
    sign = 1 if metric in LOWER_IS_BETTER else -1

    def order(rate: float) -> tuple[float, float, float]:
        results = of_rates[rate]
        return sign * results[metric], results["loss"] if _is_number(results.get("loss")) else math.inf, rate

    usable = [rate for rate, results in of_rates.items() if _is_number(results.get(metric))]
    return min(usable, key=order, default=None)


def spread(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean, standard deviation (n - 1; None for one value) and the values; None without a finite value."""
    known = [value for value in values if _is_number(value)]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "deviation": deviation, "values": known}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def row(variant: Variant, metric: str, rate: float | None, ended: Sequence[Ended]) -> dict[str, Any]:
    """What the comparison says of a variant.

    Args:
        metric: of the task.
        rate: the chosen one.
        ended: all runs of the variant.
    """
    by_rate = {end.run.rate: end.results for end in ended if end.results and end.run.seed == ended[0].run.seed}
    done = [end.results for end in ended if end.results and end.run.rate == rate]
    facts: dict[str, Any] = {
        "name": variant.name,
        "overrides": list(variant.overrides),
        "learning_rate": rate,
        "rates": {f"{tried:g}": results.get(metric) for tried, results in by_rate.items()},
        "is_rate_at_edge": len(variant.rates) > 2 and rate in (min(variant.rates), max(variant.rates)),
        "seeds": [end.run.seed for end in ended if end.results and end.run.rate == rate],
        "failed": {end.run.title: problem for end in ended if (problem := _problem(end, metric))},
    }
    if not done:
        return facts
    first = done[0]
    return facts | {
        "method": first["method"],
        **{key: first[key] for key in ("rank", "least_rank", "sparse_parameters", "head_is_tied") if key in first},
        "trainable_parameters": first["trainable_parameters"],
        "quality": spread(results["test"].get(metric) for results in done),
        "loss": spread(results["test"].get("loss") for results in done),
        "seconds": spread(results["train_seconds"] for results in done),
        "tokens_per_second": spread(results["tokens_per_second"] for results in done),
        "peak_memory_bytes_per_rank": _most([results["peak_memory_bytes_per_rank"] for results in done]),
        "optimizer_bytes_per_rank": _most([results["optimizer_bytes_per_rank"] for results in done]),
        "checkpoint_bytes": first["checkpoint_bytes"],
        "result_bytes": first.get("adapter_bytes", first.get("model_bytes")),
        "forgetting": spread(results["forgetting"]["change"] for results in done if "forgetting" in results),
    }


def _problem(end: Ended, metric: str) -> str | None:
    """Why a run has no figure for the table."""
    if end.results is not None and not _is_number(end.results.get(metric)):
        return f"its {metric} on the validation examples is not finite"
    return end.problem


def _most(per_rank: Sequence[Sequence[int]]) -> list[int]:
    """For each rank the largest value of several runs."""
    return [max(values) for values in zip(*per_rank, strict=False)]


def summarise(comparison: Comparison, metric: str, rows: list[dict[str, Any]], ended: list[Ended]) -> dict[str, Any]:
    """The content of compare.json."""
    first = next(end.results for end in ended if end.results)
    parts = "data.test_split" if comparison.recipe.data.test_split else "part of the evaluation examples"
    return {
        "recipe": comparison.path,
        "overrides": list(comparison.shared),
        "metric": metric,
        "seeds": list(comparison.seeds),
        "validation_examples": first["eval_examples"],
        "test_examples": first["test_examples"],
        "test_part": parts,
        "train_examples": first["train_examples"],
        "world_size": first["world_size"],
        "zero_stage": first["zero_stage"],
        "device": first["device"],
        "forgetting_text": first.get("forgetting", {}).get("text"),
        "methods": rows,
        "differing": differing([end.results for end in ended if end.results]),
        "says": plain_sentence(comparison, metric, rows, first["test_examples"], first["world_size"]),
        "runs": [
            {
                "name": end.run.variant,
                "learning_rate": end.run.rate,
                "seed": end.run.seed,
                "directory": str(end.run.directory),
                "overrides": list(end.run.overrides),
                "results": end.results,
                "problem": end.problem,
            }
            for end in ended
        ],
    }


SAME_IN_ALL = ("train_examples", "eval_examples", "test_examples", "world_size", "zero_stage", "device")


def differing(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What runs must have in common to be compared, where they do not: its values, in their order."""
    values = {key: list(dict.fromkeys(found.get(key) for found in results)) for key in SAME_IN_ALL}
    return {key: found for key, found in values.items() if len(found) > 1}


def plain_sentence(
    comparison: Comparison, metric: str, rows: Sequence[Mapping[str, Any]], test_examples: int, ranks: int
) -> str:
    """What the figures tell, and what they do not."""
    ranked = [each for each in rows if each.get("quality")]
    if not ranked:
        return "No run has finished, so the figures tell nothing."
    sign = 1 if metric in LOWER_IS_BETTER else -1
    ranked.sort(key=lambda each: sign * each["quality"]["mean"])
    best, name = ranked[0], metric.replace("_", " ")
    errors = {each["name"]: _error(metric, each["quality"], test_examples) for each in ranked}
    equal = [
        each["name"]
        for each in ranked[1:]
        if abs(best["quality"]["mean"] - each["quality"]["mean"])
        <= 2 * math.hypot(errors[best["name"]], errors[each["name"]])
    ]
    told = f"The best mean {name} on {test_examples:,} test examples is that of {best['name']}"
    if equal:
        told += f", but the difference to {', '.join(equal)} is within what seeds and test examples vary"
    if len(ranked) > 1 and any(len(each["quality"]["values"]) == 1 for each in ranked):
        told += f", {'and' if equal else 'but'} one seed does not tell how much of a difference is chance"
    return (
        f"{told}; the figures are of this recipe's data and model, {_tuned(comparison)}, and time and memory are "
        f"those of {ranks} rank{'s' if ranks > 1 else ''} on this machine: they do not tell what another task, a "
        "larger model, more training or other rates would give."
    )


def _tuned(comparison: Comparison) -> str:
    """How the rates were chosen."""
    untuned = [variant.name for variant in comparison.variants if len(variant.rates) == 1]
    if len(untuned) == len(comparison.variants):
        return "each at one rate, which was not tuned"
    several = "each at the best of the rates that were tried"
    return f"{several}{', but ' if untuned else ''}{', '.join(untuned)}{' at one rate' if untuned else ''}"


def _error(metric: str, quality: Mapping[str, Any], examples: int) -> float:
    """The standard error of a mean: over the seeds, and of a share over the test examples. 0 if neither is known."""
    count, errors = len(quality["values"]), []
    if quality["deviation"] is not None:
        errors.append(quality["deviation"] / math.sqrt(count))
    if metric == "accuracy":
        # With one right and one wrong answer more (Laplace): all right does not mean that there is no error
        share = (quality["mean"] * examples + 1) / (examples + 2)
        errors.append(math.sqrt(share * (1 - share) / examples))
    return math.hypot(*errors)
