"""Each training step equals that of the reference implementation with the same positions."""

import copy

import pytest
import torch
from families import tiny
from format_cases import CAUSAL, CLASSIFIER, SPARTA_FROZEN, tokens
from peft_sparta import SpaRTA
from torch import nn

from sparse_zero import SparseConfig, sparsify

STEPS = 20
HEAD = "score.weight"


def positions_of(reference: SpaRTA) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in reference.model.named_parameters():
        at = reference.indices[name].long()
        if len(at):
            weights = torch.tensor([parameter[0].numel(), 1] if parameter.dim() == 2 else [1])
            found[name] = (at * weights).sum(1)
    return found


def losses(model: nn.Module, parameters: list[nn.Parameter], task: str, decay: float) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=decay)
    batch, seen = tokens(16), []
    labels = batch[:, 0] % 2 if task == CLASSIFIER else batch
    model.train()
    for step in range(STEPS):
        part = slice(4 * (step % 4), 4 * (step % 4) + 4)
        optimizer.zero_grad()
        loss = model(input_ids=batch[part], labels=labels[part]).loss
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize(("task", "whole_head"), [(CAUSAL, False), (CLASSIFIER, False), (CLASSIFIER, True)])
def test_losses_of_20_steps(task, whole_head):
    base = tiny("llama", task)
    torch.manual_seed(2)
    reference = SpaRTA(copy.deepcopy(base), 0.9, frozen_modules=SPARTA_FROZEN)
    positions = positions_of(reference)
    assert (HEAD in positions) == (task == CLASSIFIER)
    if whole_head:
        del positions[HEAD]
    model = sparsify(base, SparseConfig(modules_to_save=["score"] if whole_head else []), positions=positions)
    mine = [parameter for parameter in model.parameters() if parameter.requires_grad]
    theirs = [parameter for parameter in reference.parameters() if parameter.numel()]
    assert sum(p.numel() for p in mine) == sum(p.numel() for p in theirs)
    # Weight decay pulls a fully trained head to zero here, and to its initial values in the reference
    decay = 0.0 if whole_head else 0.1
    expected = losses(reference, theirs, task, decay)
    assert expected[-1] < expected[0] - 0.05
    torch.testing.assert_close(losses(model, mine, task, decay), expected, rtol=0, atol=1e-5)
