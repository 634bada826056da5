"""Writes a base model with an adapter merged into it as a plain model directory; of a quantised base, dequantised or
quantised again.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_zero.adapters.base_and_adapter import load_base
from sparse_zero.adapters.companions import copy_companions
from sparse_zero.adapters.files import CARD_NAME, Adapter, check_finite, read_adapter
from sparse_zero.adapters.hub import adapter_directory
from sparse_zero.adapters.model_card import merged_card
from sparse_zero.adapters.save_and_load import load_adapter
from sparse_zero.data.models import load_model
from sparse_zero.data.package import package_path
from sparse_zero.data.quantization import completed, quantization_of
from sparse_zero.errors import UserError
from sparse_zero.model.requantize import merge_and_quantize
from sparse_zero.model.sparsify import merge_and_unload, set_scale
from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.quantized.names import KINDS, WHAT_WORKS
from sparse_zero.recipe.quantization import Quantization

PROMPTS = (
    "The capital of France is",
    "Question: Tom has 3 boxes with 12 apples each. He gives 7 apples away. How many are left?\nAnswer:",
    "def is_prime(n):",
)
"""On which a merged model is compared with the adapted one, unless the user gives others."""

RANDOM_TOKENS = 4, 32
"""Sequences and tokens of each for a model without tokenizer."""


def write_merged(
    directory: str | Path,
    out: str | Path,
    scale: float = 1.0,
    force: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantize: str | None = None,
    prompts: Sequence[str] = (),
) -> dict[str, Any]:
    """Merge an adapter into its base model and write the result as a Hugging Face model directory, with tokenizer,
    chat template, generation config, processor, the base model's licence and a model card.

    If the base model was quantised in training, the result is dequantised, in bfloat16. The facts then say how much
    the logits differ from those of the base model with the adapter.

    Args:
        directory: an adapter directory, or a hub id.
        out: the directory to write.
        scale: the factor of the deltas; see `set_scale`.
        force: merge values that are NaN or infinite, too.
        trust_remote_code: run Python code that the base model's repository contains, as in from_pretrained.
        revision: a branch, tag or commit of the adapter's repository on the hub.
        quantize: one of `KINDS`: write a quantised model. With the kind of the base model, its settings are used,
            and weights without deltas stay bit for bit as they are.
        prompts: on which the logits are compared. Empty: `PROMPTS`, or random tokens.

    Returns: facts for the user.

    Raises:
        UserError: see `load_adapter`, `load_model` and `merge_and_unload`; also `out` is a file or the base model's
            directory, or the adapter does not name a base model and task.
    """
    started, directory, out = time.perf_counter(), adapter_directory(directory, revision), Path(out)
    if quantize is not None and quantize not in KINDS:
        raise UserError(f"--quantize {quantize}: must be {WHAT_WORKS}")
    adapter = read_adapter(directory)
    config = adapter.config
    _check(adapter, directory, out)
    if not force:
        check_finite(adapter, directory, "; merge them as they are with force=True (sparse-zero merge --force)")
    model, tokenizer = load_base(adapter, directory, trust_remote_code)
    load_adapter(model, directory, force=force)
    set_scale(model, scale)
    is_compared = quantize is not None or bool(config.quantized)
    tokens = _tokens(model, tokenizer, prompts) if is_compared else []
    before = _logits(model, tokens)
    model = _merged(model, adapter, quantize, out, force)
    model.save_pretrained(out)
    for _, layer in quantized_layers(model):
        layer.forbid_repacking()
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    copy_companions(config.base_model_name_or_path, config.revision, out)
    kind = quantize or ("bfloat16, dequantised" if config.quantized else None)
    (out / CARD_NAME).write_text(merged_card(config, scale, quantize), encoding="utf-8")
    return {
        "out": str(out),
        **({} if tokenizer else {"tokenizer": "none, because the base model has none"}),
        "base_model": config.base_model_name_or_path,
        "task": config.task,
        "class": type(model).__name__,
        "merged_parameters": config.trainable_parameters,
        **({"weights": kind} if kind else {}),
        **(_difference(before, _logits(model, tokens)) if is_compared else {}),
        "seconds": time.perf_counter() - started,
    }


def _check(adapter: Adapter, directory: Path, out: Path) -> None:
    config = adapter.config
    if config.task is None or config.base_model_name_or_path is None:
        raise UserError(
            f"{directory}: does not say which base model to load, or for which task; load the adapter in your program "
            "and call merge_and_unload(model)"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; the merged model is a directory")
    if out.resolve() == Path(package_path(config.base_model_name_or_path)).resolve():
        raise UserError(f"{out}: is the base model, which would be overwritten; choose another directory")


def _merged(model: PreTrainedModel, adapter: Adapter, quantize: str | None, out: Path, force: bool) -> PreTrainedModel:
    """The plain or quantised model of an adapted one, in place if possible."""
    own = quantization_of(model)
    if own is not None and own.kind == quantize:
        return merge_and_quantize(model, force)
    merge_and_unload(model, force)
    if quantize is None:
        return model.to(torch.bfloat16) if adapter.config.quantized else model
    quantization = completed(Quantization(kind=quantize), model, adapter.config.sparse, model.dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    # from_pretrained quantises files, one weight at a time
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as plain:
        model.save_pretrained(plain)
        return load_model(plain, adapter.config.task, dtype=model.dtype, quantization=quantization)


def _tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, prompts: Sequence[str]
) -> list[torch.Tensor]:
    """Sequences of tokens to compare models on, int64 (1, tokens) each."""
    if tokenizer is None:
        rows = model.get_input_embeddings().weight.shape[0]
        drawn = torch.randint(rows, RANDOM_TOKENS, generator=torch.Generator().manual_seed(0))
        return [*drawn.split(1)]
    found = [tokenizer(text, return_tensors="pt", verbose=False).input_ids for text in prompts or PROMPTS]
    if empty := [text for text, tokens in zip(prompts or PROMPTS, found, strict=True) if not tokens.numel()]:
        raise UserError(f"--prompt {empty[0]!r}: has no token")
    return found


@torch.inference_mode()
def _logits(model: PreTrainedModel, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """The logits of each sequence, float32 on the CPU."""
    training = model.training
    model.eval()
    try:
        return [model(input_ids=ids.to(model.device)).logits.float().cpu() for ids in tokens]
    finally:
        model.train(training)


def _difference(adapted: list[torch.Tensor], merged: list[torch.Tensor]) -> dict[str, float]:
    """How much the logits of a merged model differ from those of the adapted one."""
    flat = [torch.cat([part.flatten() for part in parts]) for parts in (adapted, merged)]
    same = [one.argmax(-1) == other.argmax(-1) for one, other in zip(adapted, merged, strict=True)]
    return {
        "largest_logit": flat[0].abs().max().item(),
        "largest_difference_of_logits": (flat[0] - flat[1]).abs().max().item(),
        "mean_difference_of_logits": (flat[0] - flat[1]).abs().mean().item(),
        "same_prediction": torch.cat([each.flatten() for each in same]).double().mean().item(),
    }
