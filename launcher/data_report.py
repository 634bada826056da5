"""Output of `sparse-zero data`: examples with the counted tokens in colour, lengths, and what is dropped."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from launcher.report import print_facts

COUNTED = "bold green"
BAR = 40
"""Characters of the longest bar of a histogram."""


def print_data(title: str, facts: Mapping[str, Any]) -> None:
    """Print a description of data. Args: facts: the result of sparse_zero.data.preview.describe_data."""
    console = Console(highlight=False, soft_wrap=True)
    for number, example in enumerate(facts["examples"], start=1):
        label = f", label: {example['label']}" if "label" in example else ""
        console.print(Text(f"example {number}{label}", style="bold"))
        text = Text()
        for part, is_counted in example["parts"]:
            # Without colours the counted text stands between brackets
            marked = f"[{part}]" if is_counted and not console.is_terminal else part
            text.append(marked, style=COUNTED if is_counted else "")
        console.print(text)
        console.print()
    if any(is_counted for example in facts["examples"] for _, is_counted in example["parts"]):
        how = Text("green", style=COUNTED) if console.is_terminal else Text("in brackets")
        console.print(Text.assemble("the loss counts what is ", how))
        console.print()
    print_facts(title, _summary(facts))
    for split in ("train", "evaluation"):
        print(f"\nlengths of the {split} examples, in tokens")
        largest = max(count for *_, count in facts[split]["histogram"])
        for first, last, count in facts[split]["histogram"]:
            span = str(first) if first == last else f"{first}-{last}"
            print(f"{span:>13} {count:>8,} {'#' * round(BAR * count / largest)}")


def _summary(facts: Mapping[str, Any]) -> dict[str, str]:
    summary = {"task": facts["task"], "max length": str(facts["max_length"] or "no limit")}
    if facts["labels"]:
        shown = ", ".join(facts["labels"][:10]) + (", ..." if len(facts["labels"]) > 10 else "")
        summary["labels"] = f"{facts['problem_type']}: {shown}"
    for split in ("train", "evaluation"):
        each = facts[split]
        tokens = each["tokens"]
        summary[f"{split} examples"] = f"{each['used']:,} of {each['given']:,} are used"
        if each["dropped"]:
            reasons = (f"{count:,} {reason}" for reason, count in each["dropped"].items())
            summary[f"{split}, dropped"] = "; ".join(reasons)
        if each["sequences"] > each["used"]:
            summary[f"{split}, with copies"] = f"{each['sequences']:,}"
        if each["sequences"] < each["used"]:
            summary[f"{split}, packed"] = f"into {each['sequences']:,} sequences"
        summary[f"{split} tokens"] = (
            f"{tokens['minimum']:,} to {tokens['maximum']:,} an example, median {tokens['median']:,}, 95% at most "
            f"{tokens['95%']:,}; {tokens['sum']:,} in all"
        )
        if "counted_tokens" in each:
            summary[f"{split}, in the loss"] = f"{each['counted_tokens']:,} tokens"
        if each["cut"]:
            summary[f"{split}, cut"] = f"{each['cut']:,} examples, which lose {each['lost_tokens']:,} tokens"
    return summary
