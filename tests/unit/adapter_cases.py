"""Base models with tokenizers, adapters trained on them, and errors of adapters that do not load."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import TASKS, VOCABULARY
from torch import nn
from transformers import PreTrainedModel

from sparse_zero.adapters.save_and_load import load_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify
from sparse_zero.selection.config import SparseConfig

FAMILIES = ["bert", "gpt2", "llama"]
LABELS = {0: "bad", 1: "good", 2: "neither"}
TOKENS = torch.arange(3, 3 + 28).view(4, 7) % VOCABULARY
SPARSE = SparseConfig(density=0.04, seed=11)
A_DELTA = "bert.encoder.layer.0.attention.self.value.weight"


def task_of(base: Path) -> str:
    return "sequence-classification" if base.name.startswith("bert") else "causal-lm"


def fresh(base: Path, **settings) -> PreTrainedModel:
    """Load the base model. A classifier's head is random each time."""
    task = task_of(base)
    if task == "sequence-classification":
        settings = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}, "pad_token_id": 5} | settings
    return TASKS[task].from_pretrained(base, **settings)


def train(model: PreTrainedModel, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    labels = TOKENS[:, 0] % 2 if type(model).__name__.endswith("Classification") else TOKENS
    for _ in range(steps):
        model(input_ids=TOKENS, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(base: Path, **settings) -> PreTrainedModel:
    model = sparsify(fresh(base, **settings), SPARSE)
    train(model)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def edit_config(directory: Path, edit: Callable[[dict], object]) -> None:
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def refusal(model: nn.Module, directory: Path) -> str:
    """The error message of load_adapter. The model must be unchanged."""

    def snapshot() -> list:
        kinds = [type(module) for module in model.modules()]
        return [kinds, [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()]]

    before, weights = snapshot(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_adapter(model, directory)
    assert snapshot() == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert str(directory) in str(error.value)
    return str(error.value)
