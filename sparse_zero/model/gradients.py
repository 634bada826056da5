"""Selects scalars by the gradients of a few batches, before anything is trained.

    sparsify(model, SparseConfig(selection="gradient"), batches=batches)

gradient   the largest |g|, where g is the sum of the batches' gradients of the pretrained weights
snip       the largest |g * w|, the connection sensitivity of SNIP (arXiv 1810.02340)

Every weight gets the number of scalars that the budget gives it. The gradients are dense for the time of the pass:
each rank keeps 4 / ranks bytes for each scalar of the targets, and the whole gradient of one parameter at a time.
Every rank computes all batches, so that the choice does not depend on the number of ranks. A model that ZeRO stage 3
partitions is gathered for the pass.
"""

import contextlib
import logging
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.selection.draws import by_magnitude
from sparse_zero.selection.selector import Choose
from sparse_zero.selection.targets import Target
from sparse_zero.zero.parameters import full_numel, gathered, wait_for_prefetch

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Any], torch.Tensor]
"""Returns the loss of a batch, a scalar: (model, batch) -> tensor."""


def by_gradient(
    model: nn.Module, batches: Iterable[Any], times_weight: bool = False, loss: Loss | None = None
) -> Choose:
    """Returns: the function that selects scalars of given targets by the gradients of `batches`.

    Args:
        model: the base model. It computes in evaluation mode; its gradients and modes are the same afterwards.
        batches: the same on every rank. Without `loss`, mappings of the model's arguments, with labels.
        times_weight: select by |gradient * weight| instead of |gradient|.
        loss: computes the loss; None: the `loss` of the model's output.

    The function is collective, and raises UserError: no batches, a batch without a loss, or a gradient that is not
    finite.
    """

    def choose(
        targets: Mapping[str, Target], counts: Mapping[str, int], rows: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        if quantized := [name for name in counts if targets[name].quantized is not None]:
            raise UserError(
                f"sparse.selection: {reprlib.repr(quantized)}: gradients of quantised weights are not computed; "
                "select at random or by magnitude"
            )
        slices = _sum_gradients(model, {name: targets[name].parameter for name in counts}, batches, loss)
        chosen, unreached = {}, []
        for name, count in counts.items():
            gradient = slices.pop(name)
            importance = gradient.values.abs()
            if not _everywhere(bool(importance.isfinite().all())):
                raise UserError(
                    f"sparse.selection: the gradient of {name} is not finite in the batches; check the loss of the "
                    "base model on them, or select without gradients"
                )
            if times_weight:
                with gathered([targets[name].parameter]):
                    weight = targets[name].parameter.detach().flatten()[gradient.start : gradient.stop]
                    importance *= weight.abs()
            if _everywhere(not importance.any()):
                unreached.append(name)
            for start, stop in _spans_of(targets[name], rows.get(name, ())):
                importance[max(start - gradient.start, 0) : max(stop - gradient.start, 0)] = torch.inf
            chosen[name] = _largest(importance, gradient.start, count)
        if unreached:
            logger.warning(
                "sparse.selection: the batches give no gradient to %s: their first scalars are selected",
                reprlib.repr(unreached),
            )
        return chosen

    return choose


def _spans_of(target: Target, rows: Iterable[int]) -> list[tuple[int, int]]:
    """The bounds of the rows of a matrix in the flattened parameter."""
    return [(row * target.shape[1], (row + 1) * target.shape[1]) for row in rows]


class _Slice:
    """This rank's part of the summed gradient of a parameter, flattened: float32, [start, stop)."""

    def __init__(self, parameter: nn.Parameter) -> None:
        rank, ranks = _place()
        size = -(-full_numel(parameter) // ranks)
        self.start = min(rank * size, full_numel(parameter))
        self.stop = min(self.start + size, full_numel(parameter))
        self.values = torch.zeros(self.stop - self.start, device=parameter.device)

    def add(self, parameter: nn.Parameter) -> None:
        """Take the gradient away from the parameter."""
        gradient, parameter.grad = parameter.grad, None
        gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
        self.values += gradient.flatten()[self.start : self.stop]


def _sum_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Iterable[Any], loss: Loss | None
) -> dict[str, _Slice]:
    wait_for_prefetch(model)
    with _only_trained(model, parameters.values()), gathered(model.parameters()):
        slices = {name: _Slice(parameter) for name, parameter in parameters.items()}
        hooks = [p.register_post_accumulate_grad_hook(slices[name].add) for name, p in parameters.items()]
        try:
            count = 0
            for batch in batches:
                (own_loss if loss is None else loss)(model, batch).backward()
                count += 1
        finally:
            for hook in hooks:
                hook.remove()
    if count == 0:
        raise UserError("sparse.selection: there is no batch to compute gradients of")
    return slices


@contextlib.contextmanager
def _only_trained(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, and gradients of these parameters only; modes and gradients are put back."""
    modes = {module: module.training for module in model.modules()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        for parameter, _, _ in before:
            parameter.grad = None
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The loss of the model's own output. Args: batch: the arguments, with labels, on any device."""
    device = next(model.parameters()).device
    moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    loss = getattr(model(**moved), "loss", None)
    if loss is None:
        raise UserError(
            f"sparse.selection: {type(model).__name__} returns no loss for the batch ({', '.join(batch)}): add "
            "labels, or pass loss="
        )
    return loss


def _largest(importance: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """The positions of the `count` largest values of all ranks' slices; of equal ones the first. int64, sorted."""
    local = by_magnitude(importance, min(count, importance.numel())) if importance.numel() else importance.long()
    _, ranks = _place()
    if ranks == 1:
        return local
    # Every rank sends as many, so that one collective is enough: those of a shorter slice are below all values
    values, positions = importance.new_full((count,), -1), local.new_zeros(count)
    values[: local.numel()] = importance[local]
    positions[: local.numel()] = local + start
    all_values, all_positions = values.new_empty(ranks * count), positions.new_empty(ranks * count)
    torch.distributed.all_gather_into_tensor(all_values, values)
    torch.distributed.all_gather_into_tensor(all_positions, positions)
    real = all_values >= 0
    all_values, all_positions = all_values[real], all_positions[real]
    return all_positions[by_magnitude(all_values, count)]


def _everywhere(condition: bool) -> bool:
    """Whether it holds on every rank."""
    if _place()[1] == 1:
        return condition
    answers: list[bool] = [False] * _place()[1]
    torch.distributed.all_gather_object(answers, condition)
    return all(answers)


def _place() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
