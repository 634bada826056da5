"""Attaching noise to a model: hooks on its forward and on its input embeddings, and the handle that drives them.

Only what the embedding module returns is disturbed, never a weight: a weight that ZeRO-3 partitions is not touched.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rpn import peers
from rpn.config import RPNConfig
from rpn.noise import move_scalars
from rpn.streams import Stream
from rpn.user_noise import load_noise

Noise = Callable[[Tensor, Tensor, Stream], Tensor]
"""(embeddings (batch, length, hidden), keep bool (batch, length), stream) -> embeddings, not modified in place."""


def attach(
    model: nn.Module,
    config: RPNConfig,
    *,
    noise: Noise | None = None,
    special_token_ids: Iterable[int] | None = None,
) -> "Handle":
    """Disturbs the input embeddings of every forward of `model` in training mode, until `detach()`.

    model: any Hugging Face model (anything with get_input_embeddings()), not yet wrapped by DeepSpeed or DDP. Of an
    encoder-decoder model only the encoder's embeddings are disturbed: the decoder's inputs are the shifted labels.
    noise: a function of your own instead of config.noise, see Noise.
    special_token_ids: what config.exclude_special_tokens leaves out, usually tokenizer.all_special_ids.

    Padding is taken from the attention mask, packed pieces from position_ids that start anew at 0 (where no attention
    mask is passed). In evaluation mode and where gradients are off, as in generation, nothing happens.
    Raises ValueError: no input embeddings, attached before, special tokens are to be excluded but not named, or
    config.noise names a function that does not exist.
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
    return Handle(embedding_owner, config, noise or _noise_of(config), special)


def _noise_of(config: RPNConfig) -> Noise | None:
    match config.noise:
        case "rpn":
            return functools.partial(move_scalars, probability=config.probability)
        case "gaussian":
            return functools.partial(peers.gaussian, std=config.std)
        case "salt-and-pepper":
            return functools.partial(peers.salt_and_pepper, probability=config.probability)
        case "neftune":
            return functools.partial(peers.neftune, alpha=config.alpha)
        case "freelb":
            return peers.FreeLB(config.ascent_step, config.ascent_radius)
        case "none":
            return None
        case function:
            return load_noise(function)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What the model's forward was called with, as far as noise needs to know."""

    attention_mask: Tensor | None
    position_ids: Tensor | None
    input_ids: Tensor | None


class Handle:
    """Drives the noise that `attach` has put on a model.

    Left alone, every forward in training mode is a noisy pass of its own, numbered from 0 on. A training loop says
    where it stands with `place`, and which pass it runs with `clean` and `noisy`: then the noise is a function of that
    place alone, and a resumed run meets the same.
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
        """Whether there is any noise: neither noise: none nor passes: 0."""
        return self._noise is not None

    def place(self, *, step: int, micro_step: int = 0, rank: int | None = None, world_size: int | None = None) -> None:
        """Says which micro-batch comes next: the coordinates of its stream (see rpn.streams).

        rank, world_size: data-parallel; by default those of torch.distributed, or 0 and 1 without it.
        """
        self._step, self._micro_step, self._rank, self._world_size = step, micro_step, rank, world_size

    @contextlib.contextmanager
    def clean(self) -> Iterator[None]:
        """Within it, embeddings are left alone."""
        with self._mode(is_clean=True, pass_index=None):
            yield

    @contextlib.contextmanager
    def noisy(self, pass_index: int) -> Iterator[None]:
        """Within it, every forward meets the noise of this pass; a repeated forward meets the same."""
        with self._mode(is_clean=False, pass_index=pass_index):
            yield

    def detach(self) -> None:
        """Removes every hook: the model is as it was before. A second call does nothing."""
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
        # only the first look-up of a forward is its input: a model may embed labels or candidates later on
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
                    "exclude_special_tokens: without input_ids (inputs_embeds was passed) special tokens cannot be "
                    "told from others; set it to false"
                )
            special = self._special_token_ids.to(embeddings.device)
            keep = keep & ~torch.isin(inputs.input_ids.reshape(keep.shape), special)
        return self._noise(embeddings, keep, self._stream(pieces))

    def _stream(self, pieces: Tensor | None) -> Stream:
        pass_index = self._pass_index
        if pass_index is None:
            if isinstance(self._noise, peers.FreeLB):
                raise RuntimeError("noise: freelb takes gradient steps between its passes: train with rpn.run_passes")
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
            f"{type(module).__name__}.forward does not name its positional arguments, so the attention mask cannot be "
            "found among them: pass them by keyword"
        )
    return named


def _layout(inputs: _Inputs, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which tokens are real, and the packed pieces.

    Returns: keep, bool (batch, length); pieces, int64 (batch, length) numbered from 0 in each row, or None.
    """
    batch, length, _ = embeddings.shape
    everything = torch.ones(batch, length, dtype=torch.bool, device=embeddings.device)
    mask, position_ids = inputs.attention_mask, inputs.position_ids
    if mask is None:
        if position_ids is None or position_ids.dim() != 2:
            return everything, None
        starts = position_ids.to(embeddings.device).expand(batch, length) == 0
        return everything, (starts.cumsum(1) - 1).clamp(min=0)
    # (batch, choices, length) is what multiple-choice models take and flatten
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3):
        warnings.warn(
            "rpn: this attention mask does not say which tokens are padding (2-D masks do): padding, if there is any, "
            "is disturbed like the rest",
            stacklevel=2,
        )
        return everything, None
    mask = mask.reshape(-1, mask.shape[-1]).to(embeddings.device)
    if mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(
            f"the attention mask, {tuple(inputs.attention_mask.shape)}, does not fit embeddings of "
            f"{batch} x {length} tokens"
        )
    # a longer mask begins with what precedes these tokens: virtual tokens of a prefix, cached keys
    return mask[:, -length:] > 0, None
