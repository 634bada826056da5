"""Counts the activations that a forward pass saves for backward, by running it on the meta device, without values.

A frozen weight does not need its input for backward, so a sparse model saves less than a fully trained model. The
forward pass of some models needs values (for example to route tokens to experts). For them the formula of Korthikanti
et al. (2022, arXiv 2205.05198, equation 2) is used, which counts the activations of a fully trained model.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from sparse_zero.model.kept import Key, kept_columns
from sparse_zero.model.selected_scalars import padded
from sparse_zero.model.weight_tensor import PRODUCTS
from sparse_zero.selection.rules import Selection
from sparse_zero.selection.targets import Target

logger = logging.getLogger(__name__)

UNKNOWN = "unknown, because the model's forward pass does not run on the meta device"


@dataclass(frozen=True)
class Activations:
    """The activations of one micro-batch, in bytes."""

    layers: tuple[int, ...]
    """Saved by each block that gradient checkpointing can recompute."""
    inputs: int
    """The inputs of these blocks, which checkpointing saves instead."""
    outside: int
    """Saved by the rest of the model, without the loss."""
    loss: int
    """In float32, the log-softmax of a language model's logits, its gradient and the gradient of the logits. In
    chunks: see `_loss`.
    """
    formula: str
    """How the numbers were obtained."""
    loss_formula: str
    """How `loss` was obtained."""

    def peak(self, checkpointed: bool) -> int:
        """The peak in bytes, with or without gradient checkpointing. The loss is freed before the first block is
        recomputed.
        """
        if checkpointed:
            return self.outside + self.inputs + max(self.loss, max(self.layers, default=0))
        return self.outside + sum(self.layers) + self.loss


TILE = (4096, 32_768)
"""Tokens and vocabulary of the tile of logits that TRL's trainers of language models compute at once."""

Loss = Literal["logits", "chunked", "tiles"]
"""How the loss of a language model is computed: from its logits, in chunks of them, or by TRL in tiles."""

LOSS_BYTES = 3 * 4
"""Bytes per logit: three float32 tensors, see `Activations.loss`."""


def activations(
    model: PreTrainedModel,
    targets: Mapping[Selection, Target],
    whole: Iterable[str],
    rows: int,
    tokens: int,
    loss: Loss = "logits",
) -> Activations:
    """Count the activations of a training step.

    Args:
        model: on the meta device, with its attention implementation and dtype. The requires_grad of its parameters is
            changed.
        targets: the weights that will be sparse, by their selections.
        whole: names of the parameters that are trained in full.
        rows: sequences of a micro-batch.
        tokens: tokens of each sequence.
        loss: how it is computed.
    """
    whole = set(whole)
    loss_bytes, loss_formula = _loss(model, targets.values(), whole, rows, tokens, loss)
    hooks = _train_only(model, targets, whole)
    # The parameters of other modules require gradients themselves, and their inputs would be counted whole
    experts = {_key(target.parameter): s for s, target in targets.items() if s.columns and len(target.shape) == 3}
    counter = _Counter(model, experts)
    try:
        counter.run(torch.zeros(rows, tokens, dtype=torch.int64, device="meta"))
    except Exception:  # a model's own code may fail in any way without values
        logger.debug("activations are estimated by a formula", exc_info=True)
        return _by_formula(model, rows, tokens, loss_bytes, loss_formula)
    finally:
        for hook in hooks:
            hook.remove()
    layers = tuple(counter.kept.get(name, 0) for name in counter.layers)
    kept = counter.kept.get("", 0)
    return Activations(layers, sum(counter.inputs), kept, loss_bytes, "counted on the meta device", loss_formula)


def _loss(
    model: PreTrainedModel, targets: Iterable[Target], whole: set[str], rows: int, length: int, loss: Loss
) -> tuple[int, str]:
    """The bytes of the loss, and how they were obtained.

    In chunks there are the gradient of the hidden states, computed in the forward pass, its copy, and logits of about
    as many scalars in float32. If the head is trained, its dense gradient and a copy as well.

    In tiles there are one tile of logits, always as wide, the hidden states without the last token, and their gradient
    in float32 with a copy. If the head is trained, its dense gradient in float32 and a copy as well.
    """
    head, tokens = model.get_output_embeddings(), rows * length
    if head is None or loss == "logits":
        classes = 0 if head is None else head.weight.shape[0]
        return LOSS_BYTES * tokens * classes, "12 * b * s * vocabulary, float32"
    width, names = model.dtype.itemsize, whole | {target.name for target in targets}
    is_trained = any(parameter is head.weight and name in names for name, parameter in model.named_parameters())
    if loss == "tiles":
        tokens = rows * (length - 1)
        tile = min(tokens, TILE[0]) * TILE[1] * width
        size = tile + tokens * head.weight.shape[1] * (2 * width + 4) + is_trained * head.weight.numel() * (width + 4)
        more = f" + {width + 4} * h * vocabulary" if is_trained else ""
        return size, f"{width} * min(b * s, {TILE[0]}) * {TILE[1]} + {2 * width + 4} * b * s * h{more}, in TRL's tiles"
    size = tokens * head.weight.shape[1] * (2 * width + 4) + is_trained * 2 * head.weight.numel() * width
    more = f" + {2 * width} * h * vocabulary" if is_trained else ""
    return size, f"{2 * width + 4} * b * s * h{more}, in chunks"


def _by_formula(model: PreTrainedModel, rows: int, tokens: int, loss: int, loss_formula: str) -> Activations:
    """s b h (34 + 5 a s / h) bytes per layer in half precision, for s tokens, b rows, h hidden size and a heads. Fused
    attention does not save the second term.
    """
    config, width = model.config.get_text_config(), model.dtype.itemsize
    sizes = [getattr(config, name, None) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")]
    if None in sizes:
        return Activations((), 0, 0, loss, UNKNOWN, loss_formula)
    hidden, heads, count = sizes
    scores = 5 * heads * tokens / hidden if config._attn_implementation == "eager" else 0
    layer = round(tokens * rows * hidden * (34 + scores) * width / 2)
    formula = "s * b * h * (34 + 5 * a * s / h) for each layer (Korthikanti et al. 2022); fused attention: 34"
    return Activations((layer,) * count, count * tokens * rows * hidden * width, 0, loss, formula, loss_formula)


def _train_only(model: PreTrainedModel, targets: Mapping[Selection, Target], whole: set[str]) -> list[Any]:
    """Require gradients for the same parameters as in a sparse model. Returns: hooks to remove afterwards."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in whole)
    hooks = []
    for selection, target in targets.items():
        for module, name in target.owners:
            if name == "weight" and isinstance(module, nn.Linear | Conv1D | nn.Embedding):
                hooks.append(module.register_forward_hook(partial(_lead_to_delta, selection), with_kwargs=True))
            else:
                target.parameter.requires_grad_(True)
    return hooks


def _lead_to_delta(
    selection: Selection, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor
) -> torch.Tensor:
    (inputs,) = (*args, *kwargs.values())
    return _kept(selection, inputs, output, in_columns=not isinstance(module, nn.Embedding))


def _kept(selection: Selection, inputs: torch.Tensor, output: torch.Tensor, in_columns: bool = True) -> torch.Tensor:
    """The output, for whose backward the input is kept: all of it or the drawn columns."""
    if selection.columns and in_columns:
        columns = padded(selection, torch.empty(selection.columns.count, dtype=torch.int64, device="meta"))
        inputs = kept_columns(inputs, output, columns, Key(selection.columns_key, -1))
    return _KeepsInputs.apply(output, inputs, torch.zeros(1, device="meta", requires_grad=True))


class _KeepsInputs(torch.autograd.Function):
    """Saves for backward what layers._SampledGradient saves."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, inputs: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        return output.data

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return gradient, None, None


class _FusedAttention(torch.autograd.Function):
    """Saves for backward what flash attention saves: its inputs, its output, and one float32 scalar per query and
    head.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return ctx.saved_tensors[:3]


class _Counter(TorchFunctionMode):
    """Counts each storage that autograd saves once, for the block that saves it first. Parameters and buffers are not
    counted.
    """

    def __init__(self, model: PreTrainedModel, experts: Mapping[int, Selection]) -> None:
        """Args: experts: the selections of weights of experts that have drawn columns, by the storages' keys."""
        super().__init__()
        self.model, self.experts = model, experts
        self.layers = [n for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
        self.kept: dict[str, int] = {}
        self.inputs: list[int] = []
        self._now = ""
        self._seen: dict[int, Any] = {_key(t): t for t in (*model.parameters(), *model.buffers())}

    def run(self, ids: torch.Tensor) -> None:
        hooks = []
        for name in self.layers:
            layer = self.model.get_submodule(name)
            hooks += [
                layer.register_forward_pre_hook(lambda _, inputs, name=name: self._enter(name, inputs)),
                layer.register_forward_hook(lambda *_: self._leave()),
            ]
        self.model.train()
        try:
            with self, torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                self.model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # On the meta device torch chooses the kernel that saves all attention scores
        if func is functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        # transformers tests whether a batch is unpacked, and unpadded
        if func is torch.Tensor.__bool__:
            return True
        # and whether padding tokens are in it
        if func is torch.Tensor.__contains__:
            return False
        if self.experts and func in PRODUCTS and len(args) > 1 and (selection := self.experts.get(_key(args[1]))):
            output = func(args[0], args[1].detach(), *args[2:], **(kwargs or {}))
            return _kept(selection, args[0], output)
        return func(*args, **(kwargs or {}))

    def _enter(self, name: str, inputs: tuple) -> None:
        self._now = name
        tensors = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor)]
        self.inputs.append(tensors[0].nbytes if tensors else 0)

    def _leave(self) -> None:
        self._now = ""

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        key = _key(tensor)
        if key not in self._seen:
            self._seen[key] = tensor
            self.kept[self._now] = self.kept.get(self._now, 0) + tensor.untyped_storage().nbytes()
        return tensor


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
