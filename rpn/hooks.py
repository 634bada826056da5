"""Attaches noise to a model, with hooks on its forward and on its input embeddings, and a handle to control them.

The noise changes the output of the embedding module, not its weight, which ZeRO stage 3 may have partitioned.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rpn import baselines
from rpn.config import RPNConfig
from rpn.noise import move_scalars
from rpn.streams import Stream
from rpn.user_noise import load_noise

Noise = Callable[[Tensor, Tensor, Stream], Tensor]
"""A function of (embeddings (batch, length, hidden), keep bool (batch, length), stream) that returns new embeddings of
the same shape and does not modify its arguments. `keep` is False where no noise is allowed."""


def attach(
    model: nn.Module,
    config: RPNConfig,
    *,
    noise: Noise | None = None,
    special_token_ids: Iterable[int] | None = None,
) -> "Handle":
    """Add noise to the input embeddings in every forward of `model` in training mode, until `handle.detach()`.

    Padding gets no noise; it is found from the attention mask. Without an attention mask, position_ids that restart at
    0 mark the sequences of a packed row. There is no noise in evaluation mode, nor while gradients are disabled, as in
    generation.

    Args:
        model: a Hugging Face model, or any model with get_input_embeddings(), before DeepSpeed or DDP wraps it. In an
            encoder-decoder model only the encoder's embeddings get noise: the decoder's inputs are the shifted labels.
        config: the settings of the noise.
        noise: a custom noise function, instead of config.noise.
        special_token_ids: the tokens that config.exclude_special_tokens excludes, usually tokenizer.all_special_ids.

    Returns:
        A handle to set the position in the training, to switch passes, and to detach the noise.

    Raises:
        ValueError: the model has no input embeddings, noise is already attached to it, special_token_ids is missing,
            or config.noise names a function that does not exist.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(
            f"{type(model).__name__} has no get_input_embeddings(): "
            "attach to the Hugging Face model itself, before DeepSpeed or DDP wraps it"
        )
    if config.exclude_special_tokens and special_token_ids is None:
        raise ValueError("exclude_special_tokens: pass special_token_ids=tokenizer.all_special_ids to rpn.attach")
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    embedding_owner = model.get_encoder() if is_encoder_decoder else model
    if any(isinstance(getattr(h, "__self__", None), Handle) for h in embedding_owner._forward_pre_hooks.values()):
        raise ValueError(f"noise is already attached to this {type(model).__name__}: detach() its handle first")
    special = torch.tensor(sorted(special_token_ids)) if config.exclude_special_tokens else None
    return Handle(embedding_owner, config, noise or _configured_noise(config), special)


def _configured_noise(config: RPNConfig) -> Noise | None:
    match config.noise:
        case "rpn":
            return functools.partial(move_scalars, probability=config.probability)
        case "gaussian":
            return functools.partial(baselines.gaussian, std=config.std)
        case "salt-and-pepper":
            return functools.partial(baselines.salt_and_pepper, probability=config.probability)
        case "neftune":
            return functools.partial(baselines.neftune, alpha=config.alpha)
        case "symnoise":
            return functools.partial(baselines.symnoise, alpha=config.alpha)
        case "freelb":
            return baselines.FreeLB(config.ascent_step, config.ascent_radius)
        case "none":
            return None
        case function:
            return load_noise(function)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """The arguments of the model's forward that the noise depends on."""

    attention_mask: Tensor | None
    position_ids: Tensor | None
    input_ids: Tensor | None


class Handle:
    """Controls the noise that `attach` has added to a model.

    By default every forward in training mode is a noisy pass, numbered from 0. A training loop can set its position
    with `place`, and select the pass with `clean` and `noisy`. Then the noise depends only on the position and the
    pass, and a resumed run repeats it.
    """

    def __init__(self, module: nn.Module, config: RPNConfig, noise: Noise | None, special_token_ids: Tensor | None):
        self.config = config
        self._noise = noise if config.passes else None
        self._special_token_ids = special_token_ids
        self._step = self._micro_step = 0
        self._rank: int | None = None
        self._world_size: int | None = None
        self._is_clean = False
        self._pass_index: int | None = None
        self._automatic_pass = 0
        self._inputs: _Inputs | None = None
        embeddings = module.get_input_embeddings()
        self._hooks = [
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            module.register_forward_hook(self._after_forward, always_call=True),
            embeddings.register_forward_hook(self._after_embeddings),
        ]

    @property
    def disturbs(self) -> bool:
        """Whether there is any noise. False with noise: none or passes: 0."""
        return self._noise is not None

    def place(self, *, step: int, micro_step: int = 0, rank: int | None = None, world_size: int | None = None) -> None:
        """Set the position of the next micro-batch in the training, which selects its random stream (rpn.streams).

        Args:
            step: the optimizer step.
            micro_step: the micro-batch within the step, under gradient accumulation.
            rank, world_size: data-parallel rank and world size. Default: those of torch.distributed, or 0 and 1
                without it.
        """
        self._step, self._micro_step, self._rank, self._world_size = step, micro_step, rank, world_size

    @contextlib.contextmanager
    def clean(self) -> Iterator[None]:
        """Within this block there is no noise."""
        with self._mode(is_clean=True, pass_index=None):
            yield

    @contextlib.contextmanager
    def noisy(self, pass_index: int) -> Iterator[None]:
        """Within this block every forward has the noise of this pass. A repeated forward has the same noise."""
        with self._mode(is_clean=False, pass_index=pass_index):
            yield

    def detach(self) -> None:
        """Remove all hooks and leave the model as it was before `attach`. A second call has no effect."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextlib.contextmanager
    def _mode(self, is_clean: bool, pass_index: int | None) -> Iterator[None]:
        before = self._is_clean, self._pass_index
        self._is_clean, self._pass_index = is_clean, pass_index
        try:
            yield
        finally:
            self._is_clean, self._pass_index = before

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict):
        self._inputs = None
        if not self.disturbs or self._is_clean or not module.training or not torch.is_grad_enabled():
            return None
        names = _positional_names(module, args)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        inputs = _Inputs(*(arguments.get(name) for name in ("attention_mask", "position_ids", "input_ids")))
        embeddings = arguments.get("inputs_embeds")
        if embeddings is None:
            self._inputs = inputs
            return None
        disturbed = self._disturb(embeddings, inputs)
        if "inputs_embeds" in kwargs:
            return args, kwargs | {"inputs_embeds": disturbed}
        at = names.index("inputs_embeds")
        return (*args[:at], disturbed, *args[at + 1 :]), kwargs

    def _after_embeddings(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self._inputs is None:
            return None
        # Only the first lookup of a forward embeds its input. A model may embed labels or candidates later.
        inputs, self._inputs = self._inputs, None
        return self._disturb(output, inputs)

    def _after_forward(self, module: nn.Module, args: tuple, output) -> None:
        self._inputs = None

    def _disturb(self, embeddings: Tensor, inputs: _Inputs) -> Tensor:
        if embeddings.dim() != 3:
            raise ValueError(f"expected embeddings of shape (batch, length, hidden), got {tuple(embeddings.shape)}")
        keep, pieces = _layout(inputs, embeddings)
        if self._special_token_ids is not None:
            if inputs.input_ids is None:
                raise ValueError(
                    "exclude_special_tokens: special tokens cannot be found without input_ids (inputs_embeds was "
                    "passed); pass input_ids, or set exclude_special_tokens to false"
                )
            special = self._special_token_ids.to(embeddings.device)
            keep = keep & ~torch.isin(inputs.input_ids.reshape(keep.shape), special)
        return self._noise(embeddings, keep, self._stream(pieces))

    def _stream(self, pieces: Tensor | None) -> Stream:
        pass_index = self._pass_index
        if pass_index is None:
            if isinstance(self._noise, baselines.FreeLB):
                raise RuntimeError("noise: freelb needs a gradient step between its passes: train with rpn.run_passes")
            pass_index = self._automatic_pass
            self._automatic_pass += 1
        rank, world_size = self._rank, self._world_size
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank is None:
            rank = torch.distributed.get_rank() if distributed else 0
        if world_size is None:
            world_size = torch.distributed.get_world_size() if distributed else 1
        return Stream(
            seed=self.config.seed,
            step=self._step,
            micro_step=self._micro_step,
            pass_index=pass_index,
            rank=rank,
            world_size=world_size,
            scope=self.config.scope,
            pieces=pieces,
        )


def _positional_names(module: nn.Module, args: tuple) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(args) > len(named):
        raise ValueError(
            f"{type(module).__name__}.forward has no names for its positional arguments, so that the attention mask "
            "cannot be found: pass them by keyword"
        )
    return named


def _layout(inputs: _Inputs, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
    """Find padding and packed sequences.

    Returns:
        keep: bool (batch, length), False for padding.
        pieces: int64 (batch, length), the number of each token's packed sequence in its row, from 0; None without
            packing.
    """
    batch, length, _ = embeddings.shape
    everything = torch.ones(batch, length, dtype=torch.bool, device=embeddings.device)
    mask, position_ids = inputs.attention_mask, inputs.position_ids
    if mask is None:
        if position_ids is None or position_ids.dim() != 2:
            return everything, None
        starts = position_ids.to(embeddings.device).expand(batch, length) == 0
        return everything, (starts.cumsum(1) - 1).clamp(min=0)
    # Multiple-choice models use (batch, choices, length) and flatten it
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3):
        warnings.warn(
            "rpn: this attention mask has neither 2 nor 3 dimensions, so padding cannot be found: if there is any, it "
            "gets noise as well",
            stacklevel=2,
        )
        return everything, None
    mask = mask.reshape(-1, mask.shape[-1]).to(embeddings.device)
    if mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(
            f"the attention mask of shape {tuple(inputs.attention_mask.shape)} does not fit embeddings of "
            f"{batch} x {length} tokens"
        )
    # A longer mask starts with the tokens before these: virtual tokens of a prefix, or cached keys
    return mask[:, -length:] > 0, None
