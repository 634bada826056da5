"""Writes docs/families.md from the results of `every_family`."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

HEAD = """# Families

What `sparsify` does with each family of transformers {transformers} (torch {torch}), on tiny random models on a CPU.
Written by `make families`.

A family is **ok** if, with these targets, the gradients of the deltas and the outputs are those of a dense copy of
the model, if `save_adapter` and `load_adapter` on a fresh base model and `merge_and_unload` give the same outputs, and
if `unload` restores the weights bit for bit. It is *refused* if an error says in one sentence why the model cannot be
trained this way; the messages are below the table.

{counts}

The default targets, with `sparse.targets` left out, are the value and output projections of each attention block. Of a
composite model they are those of the language model alone. Families with a † have parts that stay frozen, most of
them vision and audio towers and projectors, and a warning names these. To train others, see
[Choosing](choosing.md#targets).

| family | model | default targets | default | all-linear | all |
|---|---|---|---|---|---|
"""


def write_table(file: Path, records: list[dict[str, Any]]) -> None:
    """Write the page. `records` are the results of all families, in the order of the table."""
    built = [record for record in records if "outcomes" in record]
    rows = [_row(record) for record in built]
    head = HEAD.format(
        transformers=transformers.__version__, torch=torch.__version__.partition("+")[0], counts=_counts(records)
    )
    notes = [
        f"- {record['family']}, {targets}: {outcome['kind']}: {_cell(outcome['detail'])}"
        for record in built
        for targets, outcome in record["outcomes"].items()
        if outcome["kind"] != "ok"
    ]
    absent = [f"- {record['family']}: {_cell(record['not_built'])}" for record in records if "outcomes" not in record]
    text = head + "\n".join(rows) + "\n"
    if notes:
        text += "\n## Refused or wrong\n\n" + "\n".join(notes) + "\n"
    if absent:
        text += "\n## Not checked\n\nNo tiny model of these families could be built or run as a dense model.\n\n"
        text += "\n".join(absent) + "\n"
    file.write_text(text)


def _counts(records: list[dict[str, Any]]) -> str:
    built = [record for record in records if "outcomes" in record]
    lines = ["| targets | ok | refused | wrong | raw error |", "|---|--:|--:|--:|--:|"]
    for targets in built[0]["outcomes"] if built else []:
        kinds = Counter(record["outcomes"][targets]["kind"] for record in built)
        cells = " | ".join(str(kinds[kind]) for kind in ("ok", "refused", "wrong", "raw error"))
        lines.append(f"| {targets} | {cells} |")
    return f"{len(records)} families, {len(built)} of them checked:\n\n" + "\n".join(lines)


def _row(record: dict[str, Any]) -> str:
    message = " ".join(record["messages"])
    default = ", ".join(f"`{ending}`" for ending in record["default"])
    if "not known" in message or not default:
        default = "every linear layer" if default else "none"
    mark = " †" if "frozen" in message else ""
    outcomes = " | ".join(outcome["kind"] for outcome in record["outcomes"].values())
    return f"| {record['family']}{mark} | {record['model']} | {default} | {outcomes} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
