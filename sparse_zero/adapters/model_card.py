"""The model card of an adapter: README.md with the metadata that the Hugging Face hub reads."""

import json
from typing import Any

import yaml

from sparse_zero.adapters.schema import AdapterConfig

_METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "perplexity": "perplexity",
    "loss": "loss",
}


def model_card(config: AdapterConfig) -> str:
    """The text of README.md: what was trained, the results, how to load it, and versions."""
    base = config.base_model_name_or_path
    local = base is None or "://" in base or base.startswith(("/", "."))
    front: dict[str, Any] = {"library_name": "sparse-zero", "tags": ["sparse-zero", "sparta", "adapter"]}
    if not local:
        front["base_model"] = base
    if config.task:
        front["pipeline_tag"] = "text-classification" if "classification" in config.task else "text-generation"
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# Sparse adapter of {base or 'a custom model'}",
        _training(config),
        _results(config.results),
        _usage(config),
        "## Versions\n\n" + ", ".join(f"{name} {number}" for name, number in config.library_versions.items()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _training(config: AdapterConfig) -> str:
    trainable, total = config.trainable_parameters, config.total_parameters
    rules = sorted({entry.rule for entry in config.tensors.values()})
    lines = [
        f"{trainable:,} of {total:,} scalars ({100 * trainable / total:.3g}%) were trained; the others are unchanged.",
        "",
        f"- selected from {len(config.tensors)} weights, {config.sparse.drawn}, positions {', '.join(rules)}",
        f"- fully trained: {', '.join(config.modules_to_save) or 'nothing'}",
    ]
    if config.new_tokens:
        lines.append(f"- new tokens: {', '.join(f'`{token}`' for token in config.new_tokens)}")
    return "\n".join(lines)


def _results(results: dict[str, Any]) -> str:
    rows = [
        f"| {shown} | {_number(results.get(f'{name}_before'))} | {_number(results[name])} |"
        for name, shown in _METRICS.items()
        if name in results
    ]
    if not rows:
        return ""
    examples = results.get("eval_examples")
    count = f" on {examples:,} held-out examples" if isinstance(examples, int) else ""
    return f"## Results{count}\n\n| | before | after |\n|---|---|---|\n" + "\n".join(rows)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _usage(config: AdapterConfig) -> str:
    if config.task is None:
        return ""
    auto_class, labels = "AutoModelForCausalLM", ""
    if config.task == "sequence-classification":
        auto_class = "AutoModelForSequenceClassification"
        labels = f", num_labels={len(config.model_settings.get('id2label', ()))}"
    # A string of Python, whatever the name contains
    base, names = json.dumps(config.base_model_name_or_path), "load_adapter"
    if "://" in base:
        base, names = f"package_path({base})", "load_adapter, package_path"
    return (
        "## Use\n\n```python\n"
        f"from sparse_zero import {names}\nfrom transformers import {auto_class}\n\n"
        f"model = {auto_class}.from_pretrained({base}{labels})\n"
        'load_adapter(model, "path/to/this/directory")\n```'
    )
