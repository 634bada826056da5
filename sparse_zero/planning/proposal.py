"""Proposes a recipe for a data set: model, task, columns, lengths, learning rate and batch, for the machine at hand.

proposal = propose("reviews.csv")
Path("reviews.yaml").write_text(proposal.text)
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sparse_zero.data.files import open_builder
from sparse_zero.data.forms import Form, recognise
from sparse_zero.data.models import load_config, load_tokenizer, max_positions
from sparse_zero.data.splits import load_splits
from sparse_zero.errors import UserError
from sparse_zero.planning.plan import RESERVED, device_bytes
from sparse_zero.planning.planned_run import describe_run
from sparse_zero.recipe.learning_rate import default_learning_rate
from sparse_zero.recipe.recipe import DataSection, Recipe

MODELS = {"causal-lm": "HuggingFaceTB/SmolLM2-135M-Instruct", "sequence-classification": "distilbert-base-uncased"}
"""Small models to begin with, by task."""

TRAIN_SPLITS, EVAL_SPLITS = ("train", "train_sft", "training"), ("validation", "valid", "dev", "test", "test_sft")
DENSITY = 0.01
SAMPLE = 500
"""Examples whose lengths are looked at."""

EFFECTIVE_BATCH = 32
"""Examples of a step, as far as the data set has them."""


@dataclass(frozen=True)
class Proposal:
    """A proposed recipe."""

    form: Form
    recipe: Recipe
    text: str
    """The recipe as commented YAML."""
    notes: tuple[str, ...]
    """What the user should know."""


def propose(
    path: str, model: str | None = None, objective: str | None = None, quantization: str | None = None
) -> Proposal:
    """Look at a data set and propose a recipe.

    Args:
        path: as a recipe's `data.path`: a file, a directory or a hub id.
        model: as a recipe's `model.name`; None for a small one.
        objective: for preferences: dpo, the default, or reward.
        quantization: as a recipe's `model.quantization`.

    Raises UserError: the data cannot be read, its form is not known or not that of the objective, or the model cannot
        be loaded.
    """
    notes: list[str] = []
    plain = DataSection(path=path, columns={})
    splits = open_builder(plain).info.splits
    train = next((split for split in TRAIN_SPLITS if split in splits), next(iter(splits)))
    held_out = next((split for split in EVAL_SPLITS if split in splits and split != train), None)
    plain = plain.model_copy(update={"train_split": train, "eval_split": held_out})
    dataset, _ = load_splits(plain)
    form = recognise(dataset, objective)
    notes += form.notes
    name = model or MODELS["causal-lm" if form.objective else form.task]
    if form.objective and find_spec("trl") is None:
        notes.append(f"{form.objective} needs TRL: pip install 'sparse-zero[trl]'")
    config, tokenizer = _model(name, model is not None, notes)
    length = _max_length(dataset, form, tokenizer, config, notes)
    data: dict[str, Any] = {"path": path, "columns": form.columns}
    data |= {} if train == "train" else {"train_split": train}
    data |= {"eval_split": held_out} if held_out else {"eval_size": _held_out(len(dataset))}
    data["max_length"] = length
    sections = {
        "model": {
            "name": name,
            **({} if form.objective else {"task": form.task}),
            **({"quantization": quantization} if quantization else {}),
        },
        "data": data,
        "sparse": {"density": DENSITY, "targets": "all-linear"},
        "training": _training(len(dataset), form),
    }
    micro = _micro_batch(sections, config)
    sections["training"] |= _batch(micro, len(dataset))
    return Proposal(form, Recipe(**sections), _as_text(sections, form, len(dataset), notes), tuple(notes))


def _model(
    name: str, is_given: bool, notes: list[str]
) -> tuple[PreTrainedConfig | None, PreTrainedTokenizerBase | None]:
    try:
        return load_config(name), load_tokenizer(name)
    except UserError as error:
        if is_given:
            raise
        notes.append(f"{name} cannot be loaded here, so its lengths and memory are not looked at ({error})")
        return None, None


def _max_length(
    dataset: Dataset,
    form: Form,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PreTrainedConfig | None,
    notes: list[str],
) -> int:
    """Tokens that hold 98% of a sample of the examples, rounded up to a multiple of 64."""
    limit = max_positions(config) if config else None
    if tokenizer is None:
        return min(limit or 512, 512)
    rows = dataset.select(range(min(SAMPLE, len(dataset))))
    lengths = [
        len(tokenizer(_words({name: row[name] for name in columns}), verbose=False).input_ids)
        for columns in _sequences(form)
        for row in rows
    ]
    wanted = int(np.ceil(np.percentile(lengths, 98) / 64) * 64)
    chosen = max(64, min(wanted, limit or wanted, 4096))
    cut = sum(length > chosen for length in lengths)
    if cut > len(lengths) // 50:
        what = "sequences" if form.objective else "examples"
        notes.append(f"{cut} of {len(lengths)} {what} looked at are longer than {chosen} tokens and are cut")
    return chosen


def _sequences(form: Form) -> list[list[str]]:
    """The columns of each sequence of an example: two for preferences."""
    pairs = [{"rejected"}, {"chosen"}] if form.objective else [set()]
    return [
        [column for role, given in form.columns.items() if role not in left_out for column in _as_list(given)]
        for left_out in pairs
    ]


def _as_list(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _words(value: Any) -> str:
    """All strings within a value, with room for a chat template's own tokens."""
    if isinstance(value, dict):
        return " \n ".join(_words(item) for item in value.values())
    if isinstance(value, list):
        return " \n ".join(_words(item) for item in value)
    return value if isinstance(value, str) else ""


def _held_out(examples: int) -> float | int:
    return 0.1 if examples < 20_000 else 2000


def _training(examples: int, form: Form) -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    return {
        **({"objective": form.objective} if form.objective else {}),
        "num_train_epochs": 3 if examples < 10_000 else 1,
        "learning_rate": default_learning_rate(form.task, DENSITY, form.objective),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        **({"deepspeed": "zero2.json", "bf16": True} if has_gpu else {}),
    }


def _micro_batch(sections: dict[str, Any], config: PreTrainedConfig | None) -> int:
    """The largest power of two, at most EFFECTIVE_BATCH, whose plan fits the GPU; 8 without a GPU."""
    if config is None or not torch.cuda.is_available():
        return 8
    memory = torch.cuda.get_device_properties(0).total_memory * (1 - RESERVED)
    size = EFFECTIVE_BATCH
    while size > 1:
        training = sections["training"] | {"per_device_train_batch_size": size, "deepspeed": None}
        run = describe_run(Recipe(**(sections | {"training": training})))
        if device_bytes(run, run.zero_settings("2"), torch.cuda.device_count()) <= memory:
            break
        size //= 2
    return size


def _batch(micro: int, examples: int) -> dict[str, int]:
    ranks = max(1, torch.cuda.device_count() if torch.cuda.is_available() else 1)
    wanted = max(1, min(EFFECTIVE_BATCH, examples // 20))
    micro = max(1, min(micro, wanted // ranks))
    return {
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": max(1, wanted // (micro * ranks)),
    }


COMMENTS = {
    "name": "any model of the hub or a directory",
    "quantization": "needs pip install 'sparse-zero[quantization]'",
    "max_length": "98% of the examples looked at are not cut",
    "eval_size": "held out from the training examples",
    "density": "1% of the model's scalars; more learns faster, less forgets less",
    "learning_rate": "the default for this task and share (docs/choosing); try a third and three times it",
    "per_device_train_batch_size": "reduce it if memory runs out, and raise gradient_accumulation_steps",
    "objective": "with TRL (docs/trl); the reference is the model without the adapter",
    "deepspeed": "optimizer states are partitioned; zero3.json partitions the model too",
}


def _as_text(sections: dict[str, Any], form: Form, examples: int, notes: list[str]) -> str:
    name = Path(str(sections["data"]["path"])).name
    lines = [f"# {form.name}: {examples:,} examples of {name}", *(f"# Note: {note}" for note in notes)]
    shows = "" if form.objective else "sparse-zero data FILE shows what the model will see; "
    lines += [f"# {shows}sparse-zero check FILE checks the recipe"]
    for section, values in sections.items():
        lines += ["", f"{section}:"]
        for key, value in values.items():
            shown = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).strip()
            shown = shown.removesuffix("\n...").removesuffix("...").strip()
            comment = f"  # {COMMENTS[key]}" if key in COMMENTS else ""
            lines.append(f"  {key}: {shown}{comment}")
    return "\n".join(lines) + "\n"
