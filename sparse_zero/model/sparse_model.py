"""The class of a sparse model as a whole: a subclass of the model's own class.

It keeps calls that read, save or rebuild the model from giving stale or mixed weights.
"""

import functools
import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.model import compiled, layers, peft, subclassed, writes
from sparse_zero.model.refusals import refuse_transforms
from sparse_zero.model.sparsity import sparsity_of, state_of
from sparse_zero.model.state_dict import refusals
from sparse_zero.zero.parameters import require_grad_on_leaf_inputs


class SparseModel:
    """A mixin for the outermost module of a sparse model."""

    model_class: ClassVar[type[nn.Module]]
    """The class before."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        writes.refresh(state_of(self).weights.values())
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        result = super().state_dict(*args, prefix=prefix, **kwargs)
        # The deltas are in it within `disable_adapter`, too: loading it must not give one without the other
        sparsity = state_of(self)
        for name, value in sparsity.trained.items() if not sparsity.is_partitioned else ():
            if prefix + name in result:
                result[prefix + name] = value.to(result[prefix + name].device)
        return result

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        """Called before the same of the modules in it, also if a model that contains this one is loaded."""
        sparsity = state_of(self)
        if refused := refusals(sparsity.weights, state, prefix):
            raise RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {type(self).__name__}:", *refused]))
        deltas = {prefix + weight.tensor_name(name, "delta") for name, weight in sparsity.weights.items()}
        names = [name for name in sparsity.trained_names if prefix + name in state]
        loaded = {name: state[prefix + name].detach().to("cpu", copy=True) for name in names}
        if not deltas & state.keys():  # a plain model's: these are the original values
            sparsity.originals |= loaded
        if sparsity.trained:  # others are in the model now
            sparsity.trained |= loaded
            state.update({prefix + name: sparsity.originals[name].clone() for name in names})
        super()._load_from_state_dict(state, prefix, *others)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapter, as `save_adapter` and as PEFT's `save_pretrained`.

        A merged model is written by `merge_and_unload(model).save_pretrained(...)`.

        Args:
            save_directory: the adapter's directory.
            is_main_process: whether this rank writes.
            state_dict: the complete state dict, from which one rank alone can write under ZeRO stage 3. Otherwise
                all ranks must call it.
            push_to_hub: whether to upload the directory to the hub.
            repo_id: the repository, `user/name`.
            **kwargs: arguments of PreTrainedModel.save_pretrained that only concern a base model's files; ignored.

        Raises:
            UserError: the directory cannot be written, or an argument is not supported.
        """
        if push_to_hub and repo_id is None:
            raise UserError(
                "push_to_hub: name the repository: save_pretrained(..., push_to_hub=True, repo_id='user/name')"
            )
        # The package that knows the files builds on this one, and is loaded when it is needed
        save_adapter = importlib.import_module("sparse_zero").save_adapter
        repository = repo_id if push_to_hub else None
        save_adapter(self, save_directory, is_main_process, state_dict=state_dict, push_to_hub=repository)

    def push_to_hub(self, repo_id: str, *, max_shard_size: Any = None, **kwargs: Any) -> str | None:
        """Upload the adapter to the hub, with its card. Returns: the address of the commit.

        Args:
            repo_id: the repository, `user/name`; created if it does not exist.
            max_shard_size: concerns a base model's files; ignored.
            **kwargs: private, token, revision, tags, create_pr, commit_message, commit_description.

        Raises:
            UserError: the repository cannot be written.
        """
        save_adapter = importlib.import_module("sparse_zero").save_adapter
        with tempfile.TemporaryDirectory() as directory:
            return save_adapter(self, directory, push_to_hub=repo_id, **kwargs)

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        with subclassed.applied(self, function):
            return super()._apply(function, *args, **kwargs)

    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
        # Without a gradient, reads return the parameters themselves
        with torch.no_grad():
            return super().tie_weights(*args, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        rows = self.get_input_embeddings().weight.shape[0]
        if new_num_tokens not in (None, rows) or pad_to_multiple_of is not None:
            raise UserError(
                f"resize_token_embeddings: the deltas belong to positions in embeddings of {rows} rows; call it "
                "before sparsify, or call merge_and_unload(model) or unload(model) first"
            )
        return super().resize_token_embeddings(new_num_tokens)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        if isinstance(self, layers.SparseModule):
            plain, names = self.plain_class, self.selected_names
        else:
            plain, names = self.model_class, frozenset()
        return _new_model, (plain, names, isinstance(self, layers.QuantizedLinear)), self.__getstate__()


def refresh(model: nn.Module) -> None:
    """Write the deltas into the weights, if they have changed since they were written.

    It is done after every step of a torch optimizer and before every forward, `state_dict()` and
    `named_parameters()`. Call it to read a weight through a reference that you kept, after DeepSpeed's
    `engine.step()` or after a change of `delta.data`.

    Args:
        model: a sparse model, which may be wrapped.

    Raises:
        UserError: the model is not sparse.
    """
    writes.refresh(sparsity_of(model).weights.values(), checks_data=True)


def before_forward(model: nn.Module, inputs: Any) -> None:
    """A forward pre-hook of the whole model."""
    sparsity = state_of(model)
    if torch.compiler.is_compiling() and not sparsity.is_partitioned:
        packed = any(weight.is_packed for weight in sparsity.weights.values())
        compiled.refuse(type(model).__name__, sparsity.config.dropout, packed)
        return
    for layer in sparsity.packed_layers:
        layer.check_forward()
    if torch.is_grad_enabled():
        refuse_transforms(type(model).__name__)
    sparsity.counter.before_forward(model, inputs)
    writes.refresh(sparsity.weights.values(), in_forward=True, checks_data=True)
    if sparsity.is_partitioned and not sparsity.has_leaf_hooks:
        # ZeRO's leaf modules are chosen after `sparsify`
        sparsity.hooks += require_grad_on_leaf_inputs(model)
        sparsity.has_leaf_hooks = True


@functools.cache
def _sparse_model_class(before: type[nn.Module]) -> type[SparseModel]:
    names = [name for name in vars(SparseModel) if callable(getattr(SparseModel, name)) and name[:2] != "__"]
    # A model that has no such function, as nn.Sequential has no `save_pretrained`, does not get it
    missing = {name: _MISSING for name in names if not hasattr(before, name)}
    members = {"model_class": before, "__module__": before.__module__, "__qualname__": before.__qualname__} | missing
    return type(before.__name__, (SparseModel, before), members)


class _Missing:
    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError


_MISSING = _Missing()


def attach(model: nn.Module) -> None:
    """Give the outermost module of a sparse model its class."""
    peft.watch()
    model.__class__ = _sparse_model_class(type(model))


def detach(model: nn.Module) -> None:
    """Undo `attach`. Before its layers are detached."""
    model.__class__ = model.model_class


def _new_model(plain: type[nn.Module], names: frozenset[str], packed: bool = False) -> nn.Module:
    peft.watch()
    kind = _sparse_model_class(layers.sparse_class(plain, names, packed) if names else plain)
    return kind.__new__(kind)
