"""Answers to the evaluation prompts of a recipe."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from sparse_zero.data.columns import check_columns
from sparse_zero.data.conversations import as_messages, as_tools, role_in_template
from sparse_zero.data.models import load_config, meta_model
from sparse_zero.data.quantization import completed
from sparse_zero.data.splits import load_splits
from sparse_zero.errors import UserError
from sparse_zero.generation.chat import check_comparison
from sparse_zero.generation.language_model import LanguageModel, Turns, open_model
from sparse_zero.recipe.recipe import Recipe


class Prompt(NamedTuple):
    """What the model is to answer."""

    shown: str | Turns
    """The text, or the turns before the assistant's last one."""
    reference: str
    """The answer in the data."""
    tokens: list[int]


def open_for(recipe: Recipe, adapter: str | None, revision: str | None = None) -> LanguageModel:
    """The model of a recipe, or an adapter on its own base model.

    Raises:
        UserError: the recipe has no prompts; see `open_model`.
    """
    if recipe.model.task != "causal-lm":
        raise UserError(f"model.task: {recipe.model.task} has no answers; use `sparse-zero evaluate`")
    if recipe.data.example == "text":
        raise UserError("data.columns: plain text has no prompts; set `prompt` and `completion`, or `messages`")
    section = recipe.model
    if adapter is not None:
        return open_model(adapter, revision, section.trust_remote_code)
    quantization = None
    if section.quantization is not None:
        config = load_config(section.source, section.revision, section.trust_remote_code)
        plain = meta_model(config, section.task, torch.float32, section.trust_remote_code)
        quantization = completed(section.quantization, plain, recipe.sparse, config.dtype or torch.float32)
    return open_model(section.source, section.revision, section.trust_remote_code, quantization)


def prompts_of(recipe: Recipe, model: LanguageModel, examples: int | None = None) -> list[Prompt]:
    """The prompts of a recipe's evaluation examples, in their order. Examples without a prompt or answer are left out.

    Args: examples: the most prompts; None: all.
    """
    _, evaluation = load_splits(recipe.data)
    check_columns(evaluation, recipe.data.columns, "evaluation")
    found = []
    for prompt in _prompts(recipe, model, evaluation):
        if len(found) == examples:
            break
        found.append(prompt)
    if not found:
        raise UserError(f"data.path: none of the {len(evaluation)} evaluation examples has a prompt and an answer")
    return found


def _prompts(recipe: Recipe, model: LanguageModel, rows: Dataset) -> Iterator[Prompt]:
    columns = recipe.data.columns
    if recipe.data.example == "messages" and not model.has_chat_template:
        raise UserError(f"{model.name}: its tokenizer has no chat template, which data.columns.messages needs")
    for row in rows:
        if recipe.data.example == "prompt-completion":
            names = [columns.prompt] if isinstance(columns.prompt, str) else columns.prompt
            text, reference = "\n\n".join(filter(None, (row[name] for name in names))), row[columns.completion]
            if text and reference:
                yield Prompt(text, reference, model.prompt_of_text(text))
        elif row[columns.messages]:
            yield from _last_answer(row, recipe, model)


def _last_answer(row: dict[str, Any], recipe: Recipe, model: LanguageModel) -> Iterator[Prompt]:
    columns = recipe.data.columns
    tools = as_tools(row[columns.tools]) if columns.tools else None
    template = model.tokenizer.get_chat_template(tools=tools)
    turns = as_messages(row[columns.messages])
    turns = [turn | {"role": role_in_template(turn["role"], template)} for turn in turns]
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if last:
        before = turns[:last]
        yield Prompt(before, turns[last]["content"], model.prompt_of_turns(before, tools))


def write_answers(
    model: LanguageModel,
    prompts: list[Prompt],
    out: Path,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 8,
    compare: bool = False,
) -> Iterator[dict[str, Any]]:
    """Answer prompts, and write a line of JSON for each: `prompt`, `reference`, `answer`, and with `compare` the base
    model's `base_answer`. Lines are written as they come.

    Yields: each line.

    Raises:
        UserError: the file exists or cannot be written, or a prompt is too long.
    """
    check_comparison(model, compare)
    try:
        file = out.open("x", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from None
    with file:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            tokens = [prompt.tokens for prompt in batch]
            answers = {"answer": model.answer(tokens, max_new_tokens, temperature)}
            if compare:
                answers["base_answer"] = model.answer(tokens, max_new_tokens, temperature, with_adapter=False)
            for at, prompt in enumerate(batch):
                row = {"prompt": prompt.shown, "reference": prompt.reference}
                row |= {key: texts[at] for key, texts in answers.items()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                yield row
