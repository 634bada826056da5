"""The model card of an adapter: README.md with the front matter that the hub reads."""

from typing import Any

import yaml

from sparse_zero.adapters.files import AdapterConfig

_METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "perplexity": "perplexity",
    "loss": "loss",
}


def model_card(config: AdapterConfig) -> str:
    """What was trained, on what, how well, and how to open it."""
    base = config.base_model_name_or_path
    local = base is None or "://" in base or base.startswith(("/", "."))
    front: dict[str, Any] = {"library_name": "sparse-zero", "tags": ["sparse-zero", "sparta", "adapter"]}
    if not local:
        front["base_model"] = base
    if config.task:
        front["pipeline_tag"] = "text-classification" if "classification" in config.task else "text-generation"
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# Sparse adapter of {base or 'a model of its own'}",
        _trained(config),
        _figures(config.results),
        _opening(config),
        "## Versions\n\n" + ", ".join(f"{name} {number}" for name, number in config.library_versions.items()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _trained(config: AdapterConfig) -> str:
    trainable, total = config.trainable_parameters, config.total_parameters
    rules = sorted({entry.rule for entry in config.tensors.values()})
    lines = [
        f"{trainable:,} of {total:,} scalars ({100 * trainable / total:.3g}%) were trained; the rest is the base's.",
        "",
        f"- selected from {len(config.tensors)} weights, {config.sparse.budget}, positions {', '.join(rules)}",
        f"- trained whole: {', '.join(config.modules_to_save) or 'nothing'}",
    ]
    if config.new_tokens:
        lines.append(f"- new tokens: {', '.join(f'`{token}`' for token in config.new_tokens)}")
    return "\n".join(lines)


def _figures(results: dict[str, Any]) -> str:
    rows = [
        f"| {shown} | {_figure(results.get(f'{name}_before'))} | {_figure(results[name])} |"
        for name, shown in _METRICS.items()
        if name in results
    ]
    if not rows:
        return ""
    counted = f" on {results['eval_examples']:,} held-out examples" if "eval_examples" in results else ""
    return f"## Results{counted}\n\n| | before | after |\n|---|---|---|\n" + "\n".join(rows)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _opening(config: AdapterConfig) -> str:
    if config.task is None:
        return ""
    kind, labels = "AutoModelForCausalLM", ""
    if config.task == "sequence-classification":
        kind = "AutoModelForSequenceClassification"
        labels = f", num_labels={len(config.model_settings.get('id2label', ()))}"
    base, names = f'"{config.base_model_name_or_path}"', "load_adapter"
    if "://" in base:
        base, names = f"package_path({base})", "load_adapter, package_path"
    return (
        "## Use\n\n```python\n"
        f"from sparse_zero import {names}\nfrom transformers import {kind}\n\n"
        f"model = {kind}.from_pretrained({base}{labels})\n"
        'load_adapter(model, "path/to/this/directory")\n```'
    )
