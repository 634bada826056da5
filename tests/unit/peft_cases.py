"""Models with adapters of `sparse_zero.peft`, and the same with `sparsify` as the reference."""

from pathlib import Path

import peft
import pytest
import torch
from families import TASKS, tiny
from torch import nn

from sparse_zero.model.sparsify import sparsify
from sparse_zero.peft import SparseZeroConfig

TOKENS = torch.tensor([[3, 4, 5, 9, 8], [7, 3, 95, 94, 11]])
CAUSAL = {"density": 0.06, "targets": "all-linear", "seed": 3}
TASK_OF = dict.fromkeys(["llama", "gpt2", "qwen2", "qwen2_moe"], "causal-lm") | {"bert": "sequence-classification"}
PEFT_TASK = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}


def fresh(base: Path, **settings) -> nn.Module:
    """Load a base model; a classifier's head is in its files."""
    return TASKS[TASK_OF[base.name]].from_pretrained(base, **settings).eval()


def labels_of(model: nn.Module) -> torch.Tensor:
    return TOKENS[:, 0] % 2 if "Classification" in type(unwrapped(model)).__name__ else TOKENS


def unwrapped(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


def train(model: nn.Module, steps: int = 3, learning_rate: float = 0.05) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=labels_of(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def in_peft(base: Path, adapter_name: str = "default", **settings) -> peft.PeftModel:
    """A base model with a new adapter."""
    settings = CAUSAL | {"task_type": PEFT_TASK[TASK_OF[base.name]]} | settings
    return peft.get_peft_model(fresh(base), SparseZeroConfig(**settings), adapter_name=adapter_name)


def trained(base: Path, **settings) -> peft.PeftModel:
    model = in_peft(base, **settings)
    train(model)
    return model


def reference(base: Path, **settings) -> nn.Module:
    """The same without PEFT."""
    model = sparsify(fresh(base), SparseZeroConfig(**CAUSAL | settings).sparse)
    train(model)
    return model


def save_bases(directory: Path) -> dict[str, Path]:
    for family, task in TASK_OF.items():
        tiny(family, task).save_pretrained(directory / family)
    return {family: directory / family for family in TASK_OF}


def assert_same(model: nn.Module, expected: torch.Tensor) -> None:
    assert torch.equal(logits(model), expected)


def assert_differs(model: nn.Module, other: torch.Tensor) -> None:
    assert (logits(model) - other).abs().max() > 1e-3


families = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe", "bert"])
