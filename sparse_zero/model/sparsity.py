"""The state of a sparse model: which scalars are trained, what they were, and whether the adapter is enabled."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.model import writes
from sparse_zero.model.compiled import sparse_weights
from sparse_zero.model.delta import TrainedDelta
from sparse_zero.model.step_counter import StepCounter
from sparse_zero.model.wrappers import STATE, tensors_by_name, unwrap
from sparse_zero.quantized.layer import QuantizedLayer
from sparse_zero.selection.config import SparseConfig
from sparse_zero.zero.parameters import gathered

logger = logging.getLogger(__name__)

_APART = 2**20
"""What is added to a version while other values are in a tensor, so that it is no version of the trained values."""


@dataclass
class Sparsity:
    """The state of a sparse model, `model.sparsity`."""

    config: SparseConfig
    weights: dict[str, TrainedDelta]
    """The selected weights by parameter name, as in the base model's state dict."""
    whole: list[str]
    """Names of the fully trained parameters."""
    buffers: list[str]
    """Names of the buffers of fully trained modules, such as BatchNorm's statistics. They are saved with them."""
    originals: dict[str, torch.Tensor] = field(repr=False)
    """The original values of the fully trained parameters and their buffers, on the CPU."""
    total_parameters: int
    """Number of scalars of the base model; tied parameters count once."""
    selected_parameters: int
    """Number of selected scalars."""
    whole_parameters: int
    """Number of scalars of the fully trained parameters."""
    counter: StepCounter = field(repr=False)
    fingerprint: dict[str, str] = field(repr=False)
    """The fingerprint of the base model; saved in adapters."""
    dtype: torch.dtype
    """The dtype of the base model, to which the fingerprint belongs."""
    quantized: dict[str, str] = field(repr=False)
    """What the weights of the base model were quantised to, by their names; saved in adapters."""
    required_grad: dict[str, bool] = field(repr=False)
    """Whether each parameter of the base model required a gradient before `sparsify`."""
    name: str = "default"
    """The name of the active adapter."""
    base_model: str | None = None
    """The source of the base model: a hub id, a directory or package://...; saved in adapters."""
    revision: str | None = None
    tokenizer: str | None = None
    """The source of the tokenizer if it is not the base model."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens that were added to the tokenizer."""
    results: dict[str, Any] = field(default_factory=dict)
    """Metrics of the training run, for the model card."""
    hooks: list[Any] = field(default_factory=list, repr=False)
    """Handles of the hooks of the model and its parameters, removed by `unload`."""
    has_leaf_hooks: bool = False
    packed_layers: list[QuantizedLayer] = field(default_factory=list, repr=False)
    """The quantised layers of the model, also those without selected scalars."""
    disabled: int = 0
    """The number of `disable_adapter` blocks that the model is in."""
    trained: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    """The trained values of fully trained parameters and their buffers while others are in the model: while it is
    disabled, and while another adapter is active. On the CPU."""
    versions: dict[str, int] = field(default_factory=dict, repr=False)
    """Autograd's version counters of these tensors when they had the trained values."""
    frozen: list[str] = field(default_factory=list, repr=False)
    """The fully trained parameters that are frozen while their trained values are not in the model."""
    reference: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    """The values of the fully trained parameters and their buffers in the reference, on the CPU; None if the reference
    is the base model. See `model.reference`."""

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable scalars."""
        return self.selected_parameters + self.whole_parameters

    @property
    def is_partitioned(self) -> bool:
        """Whether ZeRO stage 3 partitions the weights."""
        return any(weight.is_partitioned for weight in self.weights.values())

    @property
    def contents(self) -> dict[str, TrainedDelta]:
        """By parameter name, the weight whose values are in the parameter now; shared by all adapters of a model."""
        return next(iter(self.weights.values())).contents if self.weights else {}

    @property
    def trained_names(self) -> list[str]:
        """Names of the fully trained parameters and their buffers."""
        return [*self.whole, *self.buffers]

    # Which values are in the model. The model is an argument because a copy of a model copies its state.

    def disable(self, model: nn.Module) -> None:
        """Put the original values into the model. Under ZeRO stage 3, all ranks must call it."""
        self.disabled += 1
        if self.disabled == 1:
            self.take_out(model)

    def enable(self, model: nn.Module) -> None:
        """Undo one `disable`. Under ZeRO stage 3, all ranks must call it."""
        self.disabled = max(self.disabled - 1, 0)
        if not self.disabled:
            self.put_in(model)

    def take_out(self, model: nn.Module) -> None:
        """Replace the trained values in the model by the original ones, and keep the trained ones."""
        self.trained = read_values(model, self.trained_names)
        tensors = tensors_by_name(model) if self.trained else {}
        self.versions = {name: tensors[name]._version for name in self.trained}
        set_values(model, self.originals)
        # Autograd refuses a backward of graphs from before, until the trained values are back
        _set_versions(tensors, {name: version + _APART for name, version in self.versions.items()})
        self.freeze(model)
        self._set_enabled(False)

    def put_in(self, model: nn.Module) -> None:
        """Undo `take_out`."""
        trained, self.trained = self.trained, {}
        tensors = tensors_by_name(model) if trained else {}
        if lost := [name for name, version in self.versions.items() if tensors[name]._version != version + _APART]:
            logger.warning("%s changed within disable_adapter, which has the original values: it is lost", lost[0])
        set_values(model, trained)
        _set_versions(tensors, self.versions)
        self.versions = {}
        for name, parameter in self._whole_parameters(model):
            parameter.requires_grad_(name in self.frozen or parameter.requires_grad)
        self.frozen = []
        self._set_enabled(True)

    def freeze(self, model: nn.Module) -> None:
        """Freeze the fully trained parameters while they have the original values: a loss of the base model has no
        gradient for the adapter."""
        self.frozen = [name for name, parameter in self._whole_parameters(model) if parameter.requires_grad]
        for _, parameter in self._whole_parameters(model):
            parameter.requires_grad_(False)

    def _whole_parameters(self, model: nn.Module) -> list[tuple[str, torch.Tensor]]:
        tensors = tensors_by_name(model) if self.whole else {}
        return [(name, tensors[name]) for name in self.whole]

    def _set_enabled(self, enabled: bool) -> None:
        for weight in self.weights.values():
            weight.enabled = enabled
        writes.refresh(self.weights.values())

    def trained_values(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """The values of the fully trained parameters and their buffers, whether or not they are in the model now.

        Under ZeRO stage 3, all ranks must iterate over all of them.
        """
        tensors = tensors_by_name(model) if not self.trained else {}
        for name in self.trained_names:
            if name in self.trained:
                yield name, self.trained[name]
            else:
                with gathered([tensors[name]]):
                    yield name, tensors[name].detach()

    def set_trained_values(self, model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
        """Set fully trained parameters and their buffers; while they are not in the model, the values that return."""
        if self.disabled:
            self.trained |= {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
        else:
            set_values(model, values)

    @property
    def base_has_changed(self) -> bool:
        """Whether other weights of the base model were loaded since its fingerprint was computed."""
        return any(weight.base_has_changed for weight in self.weights.values())


def _set_versions(tensors: Mapping[str, torch.Tensor], versions: Mapping[str, int]) -> None:
    """Set autograd's version counters, by which a backward knows that a saved tensor has its values again."""
    for name, version in versions.items():
        torch._C._autograd._unsafe_set_version_counter((tensors[name],), (version,))


def set_state(model: nn.Module, state: Sparsity | None) -> None:
    """Make a model sparse, or plain again: `model.sparsity`, unless the model has an attribute of this name itself."""
    members = vars(model)
    previous = members.pop(STATE, None)
    if members.get("sparsity") is previous and previous is not None:
        del members["sparsity"]
    if state is not None:
        members[STATE] = state
        if not hasattr(model, "sparsity"):
            members["sparsity"] = state


def state_of(model: nn.Module) -> Sparsity | None:
    """The state of a sparse model without wrappers; None if it is not sparse."""
    return vars(model).get(STATE)


def check_not_sparse(model: nn.Module) -> None:
    """Raise UserError if the model is sparse, or a module in it belongs to a sparse model: a submodule that is sparse
    itself, or one that two models share."""
    if state_of(model) is not None:
        raise UserError("this model is sparse already: call merge_and_unload(model) or unload(model) first")
    theirs = {id(weight.weight) for weight in sparse_weights() if weight.is_attached}
    of_others = [name for name, module in model.named_modules() if "sparse_weights" in vars(module)]
    of_others += [name for name, parameter in model.named_parameters() if id(parameter) in theirs]
    if of_others:
        raise UserError(
            f"{of_others[0] or 'the model'} belongs to a sparse model already: make the model sparse that contains "
            "all users of it, or call merge_and_unload or unload for the other one first"
        )


def sparsity_of(model: nn.Module) -> Sparsity:
    """The `Sparsity` of a model, which may be wrapped by DDP, Accelerate or DeepSpeed.

    Raises:
        UserError: the model is not sparse.
    """
    inner = unwrap(model)
    state = state_of(inner)
    if state is not None:
        return state
    if "merged_adapter" in vars(inner):
        raise UserError(f"'{inner.merged_adapter.name}' is merged into this model: call unmerge_adapter(model) first")
    raise UserError(f"{type(inner).__name__} is not sparse: call sparsify(model, SparseConfig(...)) first")


def read_values(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """Copies of parameters and buffers on the CPU. Under ZeRO stage 3, all ranks must call it."""
    tensors, copies = tensors_by_name(model) if names else {}, {}
    for name in names:
        with gathered([tensors[name]]):
            copies[name] = tensors[name].detach().to("cpu", copy=True)
    return copies


@torch.no_grad()
def set_values(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Set parameters and buffers. Under ZeRO stage 3, all ranks must call it."""
    tensors = tensors_by_name(model) if values else {}
    for name, value in values.items():
        with gathered([tensors[name]], write=True):
            tensors[name].copy_(value)
