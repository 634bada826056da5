"""Whether a sparse model of a family computes, saves, loads, merges and unloads as a dense one does."""

import copy
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tiny_family import NotBuiltError, Run, one_line, run_of, tiny_family
from torch import nn

from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import merge_and_unload, sparsify, unload
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.targets import find_modules_to_save, find_targets

OK, REFUSED, WRONG, RAW = "ok", "refused", "wrong", "raw error"
TARGETS: dict[str, Any] = {"default": None, "all-linear": "all-linear", "all": "all"}
FRACTION = 0.1
"""Of the scalars of the targets, those that are selected."""
TOLERANCE = 1e-4
"""Of the largest value of a tensor: float32 sums in another order."""


class WrongError(Exception):
    """A sparse model differs from the dense one."""


@dataclass(frozen=True)
class Outcome:
    kind: str
    """OK, REFUSED by a UserError, WRONG, or RAW: another error."""
    detail: str = ""
    """The message, or what differs and where."""


class Dense:
    """A dense model of a family with its outputs and gradients.

    Raises:
        NotBuiltError: no tiny model can be built, run, differentiated or repeated.
    """

    def __init__(self, family: str) -> None:
        self.model = tiny_family(family)
        # Some families freeze positional embeddings
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            self.run: Run = run_of(family, self.model)
            outputs = self.run(self.model)
            with torch.no_grad():
                repeated = self.run(self.model)
            loss_of(outputs).backward()
        except Exception as error:
            raise NotBuiltError(f"the dense model: {one_line(error)}") from error
        self.outputs = [output.detach() for output in outputs]
        if not all(output.isfinite().any() for output in outputs):
            raise NotBuiltError("the dense model: outputs are not finite")
        try:
            _compare("two runs", repeated, self.outputs)
        except WrongError as error:
            raise NotBuiltError(f"the dense model: {error}") from error
        self.gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.model.zero_grad()


def check(dense: Dense, targets: str | list[str] | None) -> Outcome:
    """Compare a sparse model with a dense one. The dense model does not change."""
    try:
        _check(dense, targets)
    except UserError as error:
        return Outcome(REFUSED, str(error))
    except WrongError as error:
        return Outcome(WRONG, str(error))
    except Exception as error:
        return Outcome(RAW, one_line(error))
    return Outcome(OK)


def loss_of(outputs: list[torch.Tensor]) -> torch.Tensor:
    """A random sum of all finite outputs that have a gradient."""
    generator, total = torch.Generator().manual_seed(9), torch.zeros(())
    for output in outputs:
        factors = torch.randn(output.shape, generator=generator)
        if output.requires_grad:
            total = total + (factors * output.masked_fill(~output.isfinite(), 0.0)).sum()
    return total


def default_endings(dense: Dense) -> tuple[list[str], list[str]]:
    """The last two parts of the names of a model's default targets, and what is logged about them."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sparse_zero.selection")
    logger.addHandler(handler)
    try:
        config = SparseConfig()
        found = find_targets(dense.model, config, find_modules_to_save(dense.model, config))
    except UserError:
        return [], messages
    finally:
        logger.removeHandler(handler)
    return sorted({".".join(name.removesuffix(".weight").split(".")[-2:]) for name in found}), messages


def _check(dense: Dense, targets: str | list[str] | None) -> None:
    model = sparsify(copy.deepcopy(dense.model), _config(dense.model, targets))
    outputs = dense.run(model)
    _compare("the outputs of sparsify", outputs, dense.outputs)
    loss = loss_of(outputs)
    if loss.requires_grad:
        loss.backward()
    _compare_gradients(model, dense.gradients)

    twin = copy.deepcopy(dense.model)
    changes = _train(model, twin)
    with torch.no_grad():
        trained = dense.run(model)
        _compare("the outputs with deltas", trained, dense.run(twin))
        with tempfile.TemporaryDirectory() as directory:
            save_adapter(model, directory)
            loaded = load_adapter(copy.deepcopy(dense.model), directory)
        _compare("the outputs of load_adapter", dense.run(loaded), trained)
        _compare("the outputs of merge_and_unload", dense.run(merge_and_unload(loaded)), trained)
    assert changes, "the deltas are empty"

    restored, original = unload(model).state_dict(), dense.model.state_dict()
    if restored.keys() != original.keys():
        raise WrongError(f"unload: the state dict differs: {sorted(restored.keys() ^ original.keys())[:3]}")
    for name, value in original.items():
        if not _same_bits(restored[name], value):
            raise WrongError(f"unload: {name} is not restored")


def _config(model: nn.Module, targets: str | list[str] | None) -> SparseConfig:
    """A density that selects FRACTION of the targets, and trains the default head."""
    config = SparseConfig(targets=targets)
    whole = find_modules_to_save(model, config)
    found = find_targets(model, config, whole)
    scalars = sum(target.shape.numel() for target in found.values()) * FRACTION
    scalars += sum(p.numel() for name in whole for p in model.get_submodule(name).parameters())
    return SparseConfig(targets=targets, density=scalars / sum(p.numel() for p in model.parameters()))


def _train(model: nn.Module, twin: nn.Module) -> int:
    """Give the deltas random values, and add the same to the weights of a dense model. Returns their number."""
    generator, parameters, count = torch.Generator().manual_seed(4), dict(twin.named_parameters()), 0
    with torch.no_grad():
        for name, weight in model.sparsity.weights.items():
            values = torch.randn(weight.delta.shape, generator=generator) * 0.05
            weight.delta.copy_(values)
            parameters[name].view(-1)[weight.flat_positions()] += values
            count += values.numel()
    return count


def _compare_gradients(model: nn.Module, dense: Mapping[str, torch.Tensor | None]) -> None:
    found = {name: weight.delta.grad for name, weight in model.sparsity.weights.items()}
    expected = {
        name: None if dense[name] is None else dense[name].flatten()[weight.flat_positions()]
        for name, weight in model.sparsity.weights.items()
    }
    for name, parameter in model.named_parameters():
        if name in model.sparsity.whole:
            found[name], expected[name] = parameter.grad, dense[name]
    # The true gradient of a key projection's bias is zero: what is computed are rounding errors of larger ones
    smallest = 0.01 * max(map(_largest, dense.values()))
    for name, gradient in found.items():
        known = expected[name]
        # A parameter that is not reached has no gradient, or zeros
        gradient = torch.zeros(()) if gradient is None else gradient
        known = torch.zeros(()) if known is None else known
        scale = _largest(dense[name])
        if not torch.allclose(gradient, known, rtol=1e-3, atol=TOLERANCE * max(scale, smallest), equal_nan=True):
            difference = (gradient - known).abs().max()
            raise WrongError(f"the gradient of {name} differs by {difference:.2g} of {scale:.2g}")


def _largest(tensor: torch.Tensor | None) -> float:
    return 0.0 if tensor is None or not tensor.numel() else float(tensor.abs().max())


def _compare(what: str, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    if len(found) != len(expected):
        raise WrongError(f"{what}: {len(found)} tensors instead of {len(expected)}")
    for left, right in zip(found, expected, strict=True):
        finite = right[right.isfinite()]
        scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
        if left.shape != right.shape:
            raise WrongError(f"{what}: shape {tuple(left.shape)} instead of {tuple(right.shape)}")
        if not torch.allclose(left, right, rtol=0.0, atol=TOLERANCE * scale, equal_nan=True):
            raise WrongError(f"{what} differ by {(left - right).abs().max():.2g} of {scale:.2g}")


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
