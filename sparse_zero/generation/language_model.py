"""A language model with its tokenizer, which answers prompts: a base model, a merged one, or a base with an adapter.

model = open_model("runs/demo/adapter")
model.answer(model.prompt_of_turns([{"role": "user", "content": "Why?"}]), max_new_tokens=50)
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import hf_hub_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from sparse_zero.adapters.base_and_adapter import load_base
from sparse_zero.adapters.files import CONFIG_NAME, check_finite, read_adapter
from sparse_zero.adapters.hub import adapter_directory, is_hub_id
from sparse_zero.adapters.save_and_load import load_adapter
from sparse_zero.data.models import load_model, load_tokenizer, max_positions
from sparse_zero.errors import UserError, first_line
from sparse_zero.model.sparsify import disable_adapter
from sparse_zero.recipe.quantization import Quantization

Turns = list[dict[str, Any]]
"""A conversation: {role, content} each."""


@dataclass
class LanguageModel:
    """A causal language model that is ready to answer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    has_adapter: bool = False

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence in tokens, prompt and answer; None for no limit."""
        return max_positions(self.model.config)

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def prompt_of_text(self, text: str) -> list[int]:
        """The tokens of a prompt that the model continues, as in training."""
        ids = self.tokenizer(text, verbose=False).input_ids
        # T5 and others end a text
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def prompt_of_turns(self, turns: Turns, tools: list | None = None) -> list[int]:
        """The tokens of a conversation up to where the assistant answers.

        Raises:
            UserError: the chat template fails on it.
        """
        try:
            return self.tokenizer.apply_chat_template(
                turns, tools=tools, add_generation_prompt=True, return_dict=True, tokenizer_kwargs={"verbose": False}
            )["input_ids"]
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.name}: its chat template fails on this conversation: {first_line(error)}"
            ) from error

    def answer(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        streamer: BaseStreamer | None = None,
        with_adapter: bool = True,
    ) -> list[str]:
        """Answer prompts, as one batch.

        Args:
            prompts: tokens of each.
            max_new_tokens: the most tokens of an answer.
            temperature: 0 for the most probable token each time.
            streamer: gets the tokens of a single prompt's answer.
            with_adapter: False for the answer of the base model.

        Raises:
            UserError: a prompt has no token, or leaves no room for an answer.
        """
        longest = max(map(len, prompts))
        if not all(prompts):
            raise UserError("a prompt has no token")
        rows = self.model.get_input_embeddings().weight.shape[0]
        if max(map(max, prompts)) >= rows:
            raise UserError(
                f"{self.name}: a prompt has tokens beyond the {rows:,} of the model: it is another tokenizer's"
            )
        if self.max_tokens is not None:
            if longest >= self.max_tokens:
                raise UserError(f"a prompt has {longest:,} tokens, but {self.name} takes at most {self.max_tokens:,}")
            max_new_tokens = min(max_new_tokens, self.max_tokens - longest)
        padding = self.tokenizer.pad_token_id
        padding = self.tokenizer.eos_token_id if padding is None else padding
        # On the left, so that all answers start at the same place
        rows = [[padding or 0] * (longest - len(ids)) + ids for ids in prompts]
        masks = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        # A model's own settings of sampling are not for the most probable token
        neutral = {} if temperature > 0 else {"temperature": None, "top_p": None, "top_k": None, "min_p": None}
        device = self.model.device
        base = contextlib.nullcontext() if with_adapter or not self.has_adapter else disable_adapter(self.model)
        with base, torch.inference_mode():
            tokens = self.model.generate(
                torch.tensor(rows, device=device),
                attention_mask=torch.tensor(masks, device=device),
                max_new_tokens=max_new_tokens,
                eos_token_id=self._ends,
                pad_token_id=padding,
                streamer=streamer,
                **sampling,
                **neutral,
            )
        return self.tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)

    @property
    def _ends(self) -> list[int] | None:
        """The tokens that end an answer: those of the generation config, and the one that ends training examples."""
        own = self.model.generation_config.eos_token_id
        known = own if isinstance(own, list) else [own]
        return [*dict.fromkeys(token for token in (*known, self.tokenizer.eos_token_id) if token is not None)] or None


def open_model(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> LanguageModel:
    """Open a model that answers: an adapter on its base model, or any model that transformers loads.

    Args:
        name: an adapter or model directory, a hub id of either, package://PACKAGE/PATH, or a GGUF file.
        revision: of the hub's repository.
        trust_remote_code: run Python code that the model names.
        quantization: quantise the model, see `load_model`. The base model of an adapter is quantised as in training.

    Raises:
        UserError: it cannot be loaded, or is no causal language model.
    """
    if _is_adapter(name, revision):
        opened = _open_adapter(name, revision, trust_remote_code)
    else:
        try:
            opened = LanguageModel(
                name,
                load_model(
                    name,
                    "causal-lm",
                    revision,
                    "auto",
                    trust_remote_code=trust_remote_code,
                    quantization=quantization,
                ),
                load_tokenizer(name, revision, trust_remote_code),
            )
        except UserError as error:
            raise UserError(str(error).removeprefix("model.name: ").removeprefix("model.tokenizer: ")) from None
    # transformers loads a quantised model where it is used, and lets nobody move it
    if torch.accelerator.is_available() and not getattr(opened.model, "is_quantized", False):
        opened.model.to(torch.accelerator.current_accelerator())
    opened.model.eval()
    return opened


def _is_adapter(name: str, revision: str | None) -> bool:
    if is_hub_id(name):
        try:
            hf_hub_download(name, CONFIG_NAME, revision=revision)
        except Exception:  # a model, or what cannot be reached: loading it will say why
            return False
        return True
    if os.path.isfile(os.path.join(name, "adapter", CONFIG_NAME)) and not os.path.exists(
        os.path.join(name, CONFIG_NAME)
    ):
        raise UserError(f"{name}: is the directory of a run; its adapter is {Path(name, 'adapter')}")
    return os.path.lexists(os.path.join(name, CONFIG_NAME))


def _open_adapter(name: str, revision: str | None, trust_remote_code: bool) -> LanguageModel:
    directory = adapter_directory(name, revision)
    adapter = read_adapter(directory)
    check_finite(adapter, name)
    if adapter.config.task != "causal-lm" or adapter.config.base_model_name_or_path is None:
        what = (
            f"is of a model for {adapter.config.task}" if adapter.config.task else "does not say of which model it is"
        )
        raise UserError(f"{name}: {what}; only causal language models answer")
    model, tokenizer = load_base(adapter, directory, trust_remote_code)
    if tokenizer is None:
        raise UserError(f"{name}: its base model {adapter.config.base_model_name_or_path} has no tokenizer")
    load_adapter(model, directory)
    return LanguageModel(name, model, tokenizer, has_adapter=True)


def check_generation(max_new_tokens: int, temperature: float) -> None:
    """Raise UserError if an option of the command line is out of range."""
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature:g}: must be at least 0")
