"""The model cards of adapters and merged models: README.md with the metadata that the Hugging Face hub reads."""

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from sparse_zero.adapters.companions import hub_id, licence_of
from sparse_zero.adapters.edited_cards import marked
from sparse_zero.adapters.schema import AdapterConfig
from sparse_zero.data.quantization import transformers_config
from sparse_zero.quantized.methods import TORCHAO
from sparse_zero.quantized.names import package_of
from sparse_zero.recipe.quantization import Quantization

_METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "perplexity": "perplexity",
    "loss": "loss",
}


def model_card(config: AdapterConfig) -> str:
    """The text of README.md: what was trained, the results, how to load it, and versions. Without local paths."""
    text = _joined(
        f"# Sparse adapter of {_shown(config)}",
        _training(config),
        _results(config.results),
        _usage(config),
        "## Versions\n\n" + ", ".join(f"{name} {number}" for name, number in config.library_versions.items()),
    )
    return _card(
        _metadata(config, "adapter", "sparse-zero", ["sparse-zero", "sparta", "adapter"]),
        marked(text),
    )


def merged_card(config: AdapterConfig, scale: float, quantized: str | None = None) -> str:
    """The text of README.md of a base model with an adapter merged into it.

    Args: config: the adapter's; scale: the factor of its deltas; quantized: what its weights are quantised to.
    """
    auto_class, _ = _loader(config)
    if quantized:
        weights = f" The linear layers are quantised to {quantized} ({package_of(quantized)})."
    else:
        weights = " The base model was quantised in training; it is dequantised here." if config.quantized else ""
    return _card(
        _metadata(config, "finetune", "transformers", ["sparse-zero", "sparta"]),
        f"# {_shown(config)}, fine-tuned",
        f"A sparse adapter was merged into the weights{'' if scale == 1 else f', with its deltas times {scale:g}'}."
        f"{weights}",
        _training(config),
        _results(config.results) if scale == 1 else "",
        "## Use\n\n```python\n"
        f"from transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("path/to/this/directory")\n```',
    )


def _card(metadata: ModelCardData, *sections: str) -> str:
    return f"---\n{metadata.to_yaml()}\n---\n\n{_joined(*sections)}\n"


def _joined(*sections: str) -> str:
    return "\n\n".join(section for section in sections if section)


def _metadata(config: AdapterConfig, relation: str, library: str, tags: list[str]) -> ModelCardData:
    """Args: relation: of the model to its base, in the hub's words."""
    base, dataset = hub_id(config.base_model_name_or_path), config.results.get("dataset")
    metrics = [name for name in _METRICS if name in config.results and name != "loss"]
    tag = config.task and ("text-classification" if "classification" in config.task else "text-generation")
    return ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name=library,
        pipeline_tag=tag or None,
        datasets=[dataset] if isinstance(dataset, str) else None,
        metrics=metrics or None,
        tags=tags,
        **licence_of(config.base_model_name_or_path, config.revision),
    )


def _shown(config: AdapterConfig) -> str:
    """The base model, without the directories of a local one."""
    base = config.base_model_name_or_path
    if base is None:
        return "a custom model"
    return base if hub_id(base) or "://" in base else base.rstrip("/").rpartition("/")[2]


def _training(config: AdapterConfig) -> str:
    trainable, total = config.trainable_parameters, config.total_parameters
    rules = sorted({entry.rule for entry in config.tensors.values()})
    lines = [
        f"{trainable:,} of {total:,} scalars ({100 * trainable / total:.3g}%) were trained; the others are unchanged.",
        "",
        f"- selected from {len(config.tensors)} weights, {config.sparse.drawn}, positions {', '.join(rules)}",
        f"- fully trained: {', '.join(config.modules_to_save) or 'nothing'}",
    ]
    if config.quantized:
        lines.append(f"- base model quantised in training: {', '.join(config.quantized)}")
    if config.new_tokens:
        lines.append(f"- new tokens: {', '.join(f'`{token}`' for token in config.new_tokens)}")
    return "\n".join(lines)


def _results(results: Mapping[str, Any]) -> str:
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


def _loader(config: AdapterConfig) -> tuple[str, str]:
    """The auto class of a task, and its further arguments for the base model."""
    if config.task == "sequence-classification":
        return "AutoModelForSequenceClassification", f", num_labels={len(config.model_settings.get('id2label', ()))}"
    return "AutoModelForCausalLM" if config.task == "causal-lm" else "AutoModel", ""


def _quantization(quantization: Quantization) -> tuple[str, list[str]]:
    """The code of transformers' configuration, and what it imports: a class of transformers, and lines of others."""
    if quantization.package == TORCHAO:
        settings = transformers_config(quantization)
        granularity = repr(settings.quant_type.granularity)  # PerRow(dim=-1)
        kind, skipped = f"Int8WeightOnlyConfig(granularity={granularity})", settings.modules_to_not_convert
        lines = [f"from torchao.quantization import Int8WeightOnlyConfig, {granularity.partition('(')[0]}"]
        return f"TorchAoConfig({kind}, modules_to_not_convert={skipped!r})", ["TorchAoConfig", *lines]
    settings = transformers_config(quantization).to_diff_dict()
    given = ", ".join(f"{key}={value!r}" for key, value in settings.items() if not key.startswith("_"))
    return f"BitsAndBytesConfig({given})", ["BitsAndBytesConfig"]


def _usage(config: AdapterConfig) -> str:
    if config.task is None:
        return ""
    auto_class, more = _loader(config)
    name, imports = config.base_model_name_or_path or "", ["from sparse_zero import load_adapter"]
    # A string of Python, whatever the name contains
    base = json.dumps(name if hub_id(name) or "://" in name else "path/to/the/base/model")
    if name.endswith(".gguf"):
        base, imports = f"model_path({base})", [*imports, "from sparse_zero.data.gguf import model_path"]
    elif "://" in name:
        base, imports = f"package_path({base})", ["from sparse_zero import load_adapter, package_path"]
    if config.quantization is not None:
        given, imported = _quantization(config.quantization)
        more += f", quantization_config={given}"
        auto_class, imports = f"{auto_class}, {imported[0]}", [*imports, *imported[1:]]
    imports.append(f"from transformers import {auto_class}")
    auto_class = auto_class.partition(",")[0]
    return (
        "## Use\n\n```python\n" + "\n".join(imports) + "\n\n"
        f"model = {auto_class}.from_pretrained({base}{more})\n"
        'load_adapter(model, "path/to/this/directory")\n```'
    )
