"""Conversations: their forms and roles, and which tokens of a rendered one are the assistant's.

Other programs write {from, value} for {role, content}, and human, gpt or model for user and assistant. Such
conversations are brought to the form of chat templates before they are rendered.
"""

import json
import re
import reprlib
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sparse_zero.errors import UserError

OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""The roles of ShareGPT's, Gemma's and other programs' conversations, in lower case, and those of chat templates."""

_ROLES = ("system", "developer", "user", "assistant", "tool")


def role_in_template(role: str, template: str) -> str:
    """The name of a role in chat templates: "assistant" for "gpt" or "Assistant". A role that the template itself
    compares with, and one that nobody knows, stay as they are.
    """
    quoted = rf"['\"]{re.escape(role)}['\"]"
    if role in _ROLES or re.search(rf"(==|!=|\bin)\s*\(?\[?\s*{quoted}|{quoted}\s*(==|!=)", template):
        return role
    lower = role.strip().lower()
    return OTHER_ROLES.get(lower, lower if lower in _ROLES else role)


def as_messages(conversation: Any) -> list[dict[str, Any]]:
    """Bring a conversation to the form {role, content}.

    Args:
        conversation: a list of {role, content} or {from, value}. Keys without a value are left out: `datasets` adds
            those of other messages.

    Raises:
        UserError: it is not such a list.
    """
    turns = [_as_message(turn) for turn in conversation] if isinstance(conversation, list) else []
    if not turns or not all(turns):
        raise UserError(
            f"data.columns.messages: not a list of messages with role and content: {reprlib.repr(conversation)}"
        )
    return turns


def _as_message(turn: Any) -> dict[str, Any] | None:
    if not isinstance(turn, dict):
        return None
    turn = without_none(turn)
    if "role" not in turn and "from" in turn:
        renamed = {"from": "role", "value": "content"}
        turn = {renamed.get(key, key): value for key, value in turn.items()}
    if not isinstance(turn.get("role"), str) or not turn["role"].strip():
        return None
    return {"content": "", **turn}


def without_none(value: Any) -> Any:
    """A copy without the keys of dicts whose value is None, at every depth."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def as_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools of a conversation: a list of JSON schemas, or such a list as a JSON string; None if there are none.

    Raises:
        UserError: it is neither.
    """
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise UserError(f"data.columns.tools: not JSON ({error}): {reprlib.repr(tools)}") from None
    if isinstance(tools, dict):
        tools = [tools]
    if not tools:
        return None
    tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"data.columns.tools: not a list of JSON schemas: {reprlib.repr(tools)}")
    return [without_none(tool) for tool in tools]


def _parsed(tool: Any) -> Any:
    if not isinstance(tool, str):
        return tool
    try:
        return json.loads(tool)
    except (ValueError, RecursionError):
        return tool


Rendered = tuple[list[int], list[int]]
"""The token ids of a conversation, and for each token 1 if it is the assistant's, else 0."""


def render(
    turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase
) -> Rendered:
    """Render a conversation with the chat template, and find the assistant's tokens.

    With {% generation %} markers in the template, these are the tokens of the text between them. transformers' own
    mask is not used: it is wrong for tokenizers that drop or merge whitespace. Without markers, or where tokens do not
    cover the text, they are the tokens that a turn adds to the conversation before it with the generation prompt.

    Raises:
        UserError: the template changes earlier turns as the conversation grows, and has no markers.
    """
    template = tokenizer.get_chat_template(tools=tools)
    if tokenizer.is_fast and re.search(r"{%-?\s*generation\s*-?%}", template):
        found = _by_markers(turns, tools, tokenizer, template)
        if found is not None:
            return found
    return _by_prefixes(turns, tools, tokenizer)


def _by_markers(
    turns: list[dict[str, Any]], tools: list | None, tokenizer: PreTrainedTokenizerBase, template: str
) -> Rendered | None:
    """None if the tokens do not cover the text of the assistant."""
    (text,), (spans,) = render_jinja_template(
        conversations=[turns],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    owned = bytearray(len(text))
    for start, stop in spans:
        owned[start:stop] = b"\1" * (stop - start)
    mask, covered = [], bytearray(len(text))
    for start, stop in encoded["offset_mapping"]:
        inside = [position for position in range(start, stop) if not text[position].isspace()] or range(start, stop)
        is_owned = bool(inside) and all(owned[position] for position in inside)
        mask.append(int(is_owned))
        if is_owned:
            covered[start:stop] = b"\1" * (stop - start)
    missed = any(owned[position] > covered[position] and not text[position].isspace() for position in range(len(text)))
    return None if missed else (encoded["input_ids"], mask)


def _by_prefixes(turns: list[dict[str, Any]], tools: list | None, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    def ids_of(some: list[dict[str, Any]], **options: Any) -> list[int]:
        return tokenizer.apply_chat_template(
            some, tools=tools, return_dict=True, tokenizer_kwargs={"verbose": False}, **options
        )["input_ids"]

    ids = ids_of(turns)
    mask = [0] * len(ids)
    for position, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = ids_of(turns[:position], add_generation_prompt=True) if position else []
        through = ids_of(turns[: position + 1])
        if through[: len(before)] != before or ids[: len(through)] != through:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} changes earlier turns, so the assistant's tokens "
                "cannot be found; put {% generation %} and {% endgeneration %} around them in the template"
            )
        mask[len(before) : len(through)] = [1] * (len(through) - len(before))
    return ids, mask
