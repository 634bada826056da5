"""The table of a comparison, for compare.md and for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.report import readable

_PERCENT = ("accuracy", "f1", "f1_micro", "f1_macro", "matthews_correlation")


def table_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row of text for each method. Columns without any figure are left out."""
    metric, rows = summary["metric"], []
    for each in summary["methods"]:
        rank = "" if "rank" not in each else f" (rank {each['rank']})"
        failed = len(each["failed"])
        rows.append(
            {
                "method": f"{each['name']}{rank}",
                "trained scalars": _figure(each.get("trainable_parameters"), "{:,}"),
                "rate": _figure(each["learning_rate"], "{:g}"),
                metric.replace("_", " "): _spread(each.get("quality"), 2 if metric in _PERCENT else 4, metric),
                "test loss": _spread(each.get("loss"), 4),
                "seconds": _spread(each.get("seconds"), 1),
                "tokens/s": _mean(each.get("tokens_per_second"), "{:,.0f}"),
                "peak memory by rank": _bytes(each.get("peak_memory_bytes_per_rank")),
                "optimizer by rank": _bytes(each.get("optimizer_bytes_per_rank")),
                "checkpoint": _bytes(each.get("checkpoint_bytes")),
                "adapter or model": _bytes(each.get("result_bytes")),
                "loss on the text": _spread(each.get("forgetting"), 4, is_change=True),
                "runs": str(len(each["seeds"])) + (f", {failed} failed" if failed else ""),
            }
        )
    used = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    if metric == "loss":
        used.remove("test loss")  # the same figures
    return [{name: row[name] for name in used if name in row} for row in rows]


def _figure(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _mean(values: Mapping[str, Any] | None, form: str) -> str:
    return "-" if values is None else form.format(values["mean"])


def _spread(values: Mapping[str, Any] | None, digits: int, metric: str | None = None, is_change: bool = False) -> str:
    """`81.23 ± 0.45`; shares in percent."""
    if values is None:
        return "-"
    factor, sign = 100 if metric in _PERCENT else 1, "+" if is_change else ""
    deviation = "" if values["deviation"] is None else f" ± {factor * values['deviation']:.{digits}f}"
    return f"{factor * values['mean']:{sign}.{digits}f}{deviation}"


def _bytes(count: int | Sequence[int] | None) -> str:
    if count is None:
        return "-"
    counts = [count] if isinstance(count, int) else count
    return " + ".join(readable("bytes", each) for each in counts)


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    metric, found = summary["metric"], []
    unit = " in percent" if metric in _PERCENT else ""
    seeds = ", ".join(map(str, summary["seeds"]))
    over = f"mean ± standard deviation over the seeds {seeds}" if len(summary["seeds"]) > 1 else f"seed {seeds}"
    measured = f"{metric.replace('_', ' ')}{unit}{'' if metric == 'loss' else ' and loss'}"
    found.append(f"{measured}: on {summary['test_examples']:,} test examples ({summary['test_part']}), {over}.")
    if any(len(each["rates"]) > 1 for each in summary["methods"]):
        found.append(f"Rates were chosen with the first seed on {summary['validation_examples']:,} other examples.")
    for key, values in summary["differing"].items():
        shown = ", ".join(map(str, values))
        found.append(f"The runs differ in {key.replace('_', ' ')} ({shown}): they do not compare in all columns.")
    if summary["forgetting_text"] is None:
        found.append("Forgetting is not defined for an encoder with a classification head.")
    else:
        found.append(
            f"Loss on the text: its change by the training, in nats per token ({summary['forgetting_text']})."
        )
    stage = f"ZeRO stage {summary['zero_stage']}" if summary["zero_stage"] else "ZeRO stage 0 or no DeepSpeed"
    ranks = summary["world_size"]
    found.append(f"{ranks} rank{'s' if ranks > 1 else ''}, {stage}, {summary['device']}.")
    for each in summary["methods"]:
        if each.get("sparse_parameters"):
            count, wanted = each["trainable_parameters"], each["sparse_parameters"]
            found.append(f"{each['name']} trains {count:,} scalars; the budget is {wanted:,}.")
        if each.get("least_rank"):
            found.append(f"{each['name']} has ranks of {each['least_rank']} to {each['rank']}, the drawn columns.")
        if each.get("head_is_tied"):
            found.append(f"{each['name']}: the head is tied to the input embedding, which is trained with it.")
        if each["is_rate_at_edge"]:
            found.append(f"{each['name']}: the best rate is at the edge of those that were tried; try others.")
        found += [f"{title} failed: {problem}" for title, problem in each["failed"].items()]
    return found


def markdown(summary: Mapping[str, Any], has_figure: bool) -> str:
    """The content of compare.md."""
    rows = table_rows(summary)
    lines = [f"# {summary['recipe']}: methods compared", ""]
    lines.append("| " + " | ".join(rows[0]) + " |")
    lines.append("|---" + "|--:" * (len(rows[0]) - 1) + "|")
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    lines += ["", summary["says"], ""]
    lines += [f"- {note}" for note in notes(summary)]
    tried = {each["name"]: each["rates"] for each in summary["methods"] if len(each["rates"]) > 1}
    if tried:
        lines += ["", f"{summary['metric'].replace('_', ' ')} on the validation examples, first seed:", ""]
        for name, rates in tried.items():
            shown = ", ".join(f"{rate}: {'-' if value is None else f'{value:.4f}'}" for rate, value in rates.items())
            lines.append(f"- {name}: {shown}")
    if has_figure:
        lines += ["", "![quality against memory, time and forgetting](compare.png)"]
    return "\n".join(lines) + "\n"
