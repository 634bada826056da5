"""A conversation with a model in a terminal."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer

from sparse_zero.errors import UserError, printable
from sparse_zero.generation.language_model import LanguageModel, Turns

NEW = "/new"
"""The line that begins another conversation."""


class _Printer(TextStreamer):
    """Prints an answer as it grows. Control characters of the model do not reach the terminal."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(printable(text), flush=True, end="\n" if stream_end else "")


class Conversation:
    """What was said so far, and the model that answers.

    Args:
        with_adapter: False: the base model of an adapter answers.
    """

    def __init__(
        self, model: LanguageModel, max_new_tokens: int, temperature: float = 0.0, with_adapter: bool = True
    ) -> None:
        self.model, self.turns = model, Turns()
        self.max_new_tokens, self.temperature, self.with_adapter = max_new_tokens, temperature, with_adapter

    def say(self, text: str, is_streamed: bool = False) -> str:
        """Say something, and return the answer. The oldest exchanges are forgotten if there is no room for them.

        Without a chat template the model continues `text`, and nothing is kept.

        Args: is_streamed: also print the answer as it grows.
        """
        prompt = self._prompt_with(text) if self.model.has_chat_template else self.model.prompt_of_text(text)
        streamer = _Printer(self.model.tokenizer) if is_streamed else None
        [answer] = self.model.answer([prompt], self.max_new_tokens, self.temperature, streamer, self.with_adapter)
        if self.model.has_chat_template:
            self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answer

    def _prompt_with(self, text: str) -> list[int]:
        said = {"role": "user", "content": text}
        prompt = self.model.prompt_of_turns([*self.turns, said])
        limit = self.model.max_tokens
        while self.turns and limit is not None and len(prompt) + self.max_new_tokens > limit:
            del self.turns[:2]
            prompt = self.model.prompt_of_turns([*self.turns, said])
        return prompt


def answer_once(
    model: LanguageModel, prompt: str, max_new_tokens: int, temperature: float, compare: bool
) -> dict[str, Any]:
    """Answer one prompt. Returns: `prompt`, `answer`, with `compare` the base model's as `base_answer`, `seconds`."""
    check_comparison(model, compare)
    started = time.perf_counter()
    facts = {"model": model.name, "prompt": prompt}
    for key, with_adapter in (("base_answer", False), ("answer", True)):
        if with_adapter or compare:
            facts[key] = Conversation(model, max_new_tokens, temperature, with_adapter).say(prompt)
    return facts | {"seconds": round(time.perf_counter() - started, 3)}


def check_comparison(model: LanguageModel, compare: bool) -> None:
    """Raise UserError if there is no base model to compare with."""
    if compare and not model.has_adapter:
        raise UserError(f"--compare: {model.name} is no adapter, so there is no base model to compare it with")


def talk(
    model: LanguageModel,
    lines: Iterable[str],
    max_new_tokens: int,
    temperature: float,
    show_pair: Callable[[str, str], None] | None = None,
) -> None:
    """Answer lines until there are no more.

    Args:
        lines: what the user says; an empty line says nothing, and NEW begins another conversation.
        max_new_tokens, temperature: of each answer.
        show_pair: prints the answers of the base model and of the adapter beside each other; None: answers of the
            adapter only are printed as they grow.
    """
    check_comparison(model, show_pair is not None)

    def begin() -> list[Conversation]:
        sides = (True,) if show_pair is None else (False, True)
        return [Conversation(model, max_new_tokens, temperature, side) for side in sides]

    conversations = begin()
    for line in lines:
        text = line.strip()
        if text == NEW:
            conversations = begin()
        elif text:
            try:
                answers = [each.say(text, is_streamed=show_pair is None) for each in conversations]
            except UserError as error:  # the next line may be shorter
                print(f"{error}; {NEW} begins another conversation", file=sys.stderr)
                continue
            if show_pair is not None:
                show_pair(*answers)


def typed_lines() -> Iterator[str]:
    """The lines of stdin, with a prompt if it is a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
