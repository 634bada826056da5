"""The causal loss of a language model without its logits: torch.nn.functional.linear_cross_entropy.

The logits of a batch of N tokens, (N, vocabulary), are often the largest tensors of a training step. The head computes
the loss instead, a few rows of the logits at a time, and the model's loss function passes it on.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import MoeModelOutputWithPast

from sparse_zero.errors import UserError, first_line

IGNORED = -100
_KEY = "training.chunked_loss"


class ChunkedLoss:
    """Computes the loss of a causal language model in chunks, within `computing`."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises UserError: torch is too old, or the model does more between its head and its loss than the plain
        causal loss.
        """
        require_operator()
        self._model, self._head = model, _linear_head(model)
        self._passes = _what_reaches_the_loss(model, self._head)
        # If backward ran twice without it, torch.compile could not see that. One more gradient of the hidden states.
        self._options = {
            is_compiled: nn.LinearCrossEntropyOptions(allow_retain_graph=is_compiled) for is_compiled in (False, True)
        }
        self._targets: torch.Tensor | None = None
        self._items: torch.Tensor | None = None

    @contextlib.contextmanager
    def computing(self, inputs: Mapping[str, Any], items: torch.Tensor | int | None) -> Iterator[None]:
        """In the block, a forward of the model with these inputs returns the loss, and a scalar instead of logits.

        Args:
            inputs: the model's, with `labels` (B, T), or `shift_labels` (B, T), which are not shifted again.
            items: the number that the summed loss is divided by; None for the number of labels that are not ignored.
        """
        shifted = inputs.get("shift_labels") if self._passes.shift_labels else None
        if shifted is None:
            shifted = functional.pad(inputs["labels"], (0, 1), value=IGNORED)[..., 1:]
        self._targets = shifted.reshape(-1)
        self._items = None
        if items is not None and self._passes.items:
            # Not a number, for each of which torch.compile would compile again
            self._items = torch.as_tensor(items, device=shifted.device)
        try:
            with _replaced(self._head, forward=self._head_forward), _replaced(self._model, _loss_function=_pass_on):
                yield
        finally:
            self._targets = self._items = None

    def _head_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Args: hidden (B, T, H). Returns: the loss, a scalar."""
        head, device = self._head, hidden.device
        weight, bias, targets = head.weight, head.bias, self._targets.to(device)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            hidden, weight, bias = (None if each is None else each.to(dtype) for each in (hidden, weight, bias))
        if hidden.dtype == torch.float16:
            refuse_float16()
        loss = functional.linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            targets,
            linear_bias=bias,
            reduction="mean" if self._items is None else "sum",
            ignore_index=IGNORED,
            options=self._options[torch.compiler.is_compiling()],
        ).float()
        return loss if self._items is None else loss / self._items.to(device)


@contextlib.contextmanager
def _replaced(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """In the block the module itself has these attributes, whatever its class has."""
    own = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
    module.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del module.__dict__[name]
        module.__dict__.update(own)


def require_operator() -> None:
    """Raises UserError: torch is too old."""
    if not hasattr(functional, "linear_cross_entropy"):
        raise UserError(
            f"{_KEY}: needs torch 2.13 or later, not {torch.__version__}; set training.use_liger_kernel instead, "
            "or update torch"
        )


def refuse_float16() -> None:
    """Raises UserError: the operator returns the sum of the losses, not yet scaled, in the dtype of the product."""
    raise UserError(
        f"{_KEY}: the sum of the losses of a batch does not fit into float16; set training.bf16 instead of "
        f"training.fp16, or set {_KEY} to false"
    )


def _pass_on(logits: torch.Tensor, labels: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The loss function of a model whose head has computed the loss."""
    return logits


@dataclass(frozen=True)
class _Passed:
    """Which arguments of a model's forward reach its loss function."""

    items: bool
    shift_labels: bool


def _linear_head(model: PreTrainedModel) -> nn.Linear:
    head, name = model.get_output_embeddings(), type(model).__name__
    if not isinstance(head, nn.Linear):
        found = "none" if head is None else f"a {type(head).__name__}"
        raise _refused(name, f"its head is not a linear layer of the vocabulary (it is {found})")
    return head


def _what_reaches_the_loss(model: PreTrainedModel, head: nn.Linear) -> _Passed:
    """Run the model's own forward with stand-ins for its body, its head and its loss.

    Raises UserError: the loss is not the plain causal one, or does not get what the head has returned.
    """
    name, calls = type(model).__name__, []
    body = getattr(model, model.base_model_prefix, None)
    if body is None or body is model:
        raise _refused(name, "its head is not separate from its body")
    if model.loss_function is not ForCausalLMLoss:
        raise _refused(name, "its loss function is not the causal one of transformers")
    hidden = torch.zeros(1, 2, head.in_features, device="meta")
    labels, shifted, items = (torch.zeros(1, 2, dtype=torch.int64, device="meta") for _ in range(3))
    logits = Logits()

    def loss(logits: Any, labels: Any, vocab_size: Any, num_items_in_batch: Any = None, **others: Any) -> torch.Tensor:
        calls.append(
            {"logits": logits, "labels": labels, "vocab_size": vocab_size, "items": num_items_in_batch, **others}
        )
        return torch.zeros((), device="meta")

    stand_ins = contextlib.ExitStack()
    stand_ins.enter_context(_replaced(body, forward=lambda *_, **__: _Body(last_hidden_state=hidden)))
    stand_ins.enter_context(_replaced(head, forward=lambda _: logits))
    stand_ins.enter_context(_replaced(model, _loss_function=loss))
    given = {"labels": labels, "num_items_in_batch": items, "shift_labels": shifted}
    try:
        with stand_ins:
            model.forward(input_ids=labels, **given, use_cache=False, return_dict=True)
    except Exception as error:  # the model's own code may fail in any way
        reason = f"it does more with its logits than to pass them to its loss ({first_line(error)})"
        raise _refused(name, reason) from None
    if len(calls) != 1 or calls[0]["logits"] is not logits:
        raise _refused(name, "its loss function does not get its logits as they are")
    (call,) = calls
    if call["labels"] is not labels or call.get("ignore_index", IGNORED) != IGNORED:
        raise _refused(name, "it changes its labels before its loss")
    if call["vocab_size"] != head.out_features:
        raise _refused(name, f"its loss has {call['vocab_size']} classes and its head {head.out_features}")
    return _Passed(call["items"] is items, call.get("shift_labels") is shifted)


def _refused(name: str, reason: str) -> UserError:
    return UserError(f"{_KEY}: not for {name}: {reason}; set it to false")


class _Body(MoeModelOutputWithPast):
    """The output of a body, in which anything but the hidden states is None."""

    def __getattr__(self, name: str) -> None:
        return None


class Logits:
    """Stands for logits. It can be converted, and nothing else."""

    device = torch.device("meta")

    def float(self) -> "Logits":
        return self

    contiguous = float
