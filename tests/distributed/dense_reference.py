"""Sparse training written out a second time: dense gradients, cut to the selected positions, and torch's own AdamW."""

from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
import torch.nn.functional as F
from transformers import get_linear_schedule_with_warmup

from sparse_zero.selection import draws


@dataclass
class Curve:
    losses: list[float]
    norms: list[float]
    """Of the gradient, before it is clipped."""
    values: dict[str, torch.Tensor]
    """What was trained: deltas by the name of their weight, and the parameters of the head."""


def batches_of(examples: list[dict], size: int) -> list[dict[str, torch.Tensor]]:
    return [
        {key: torch.tensor([example[key] for example in examples[start : start + size]]) for key in examples[0]}
        for start in range(0, len(examples), size)
    ]


def loss_of(model: torch.nn.Module, task: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the tokens that count, or over the examples, of the whole batch."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    if task == "sequence-classification":
        return F.cross_entropy(logits, labels)
    counted = labels[:, 1:] != -100
    return F.cross_entropy(logits[:, :-1][counted], labels[:, 1:][counted])


def train(
    base: Path,
    task: str,
    examples: list[dict],
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    max_grad_norm: float = float("inf"),
    warmup_steps: int | None = None,
    seed: int = 0,
) -> Curve:
    """One process, one batch per step. `warmup_steps`: a linear schedule that ends at 0; None: a constant rate."""
    model = tiny.AUTO_CLASS[task].from_pretrained(base, dtype=torch.float32).train()
    parameters = dict(model.named_parameters())
    original = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    selected = {
        name: draws.stratified_positions(seed, name, original[name].numel(), count)
        for name, count in tiny.selected_counts(task).items()
    }
    trained = {name: torch.zeros(len(positions)) for name, positions in selected.items()}
    trained |= {name: original[name].clone() for name in tiny.head_of(task)}
    undecayed = {"classifier.bias"}
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for name, value in trained.items() if name not in undecayed]},
            {"params": [value for name, value in trained.items() if name in undecayed], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        weight_decay=weight_decay,
    )
    batches = batches_of(examples, batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup_steps or 0, len(batches))
    curve = Curve([], [], trained)
    for batch in batches:
        with torch.no_grad():
            for name, value in trained.items():
                parameters[name].copy_(original[name])
                if name in selected:
                    parameters[name].view(-1)[selected[name]] += value
                else:
                    parameters[name].copy_(value)
        model.zero_grad()
        loss = loss_of(model, task, batch)
        loss.backward()
        for name, value in trained.items():
            gradient = parameters[name].grad
            value.grad = gradient.view(-1)[selected[name]] if name in selected else gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm)
        optimizer.step()
        if warmup_steps is not None:
            schedule.step()
        curve.losses.append(loss.item())
        curve.norms.append(norm.item())
    return curve
