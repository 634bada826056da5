"""Conversations of other programs, tools, and which tokens are the assistant's."""

import json

import pytest
from data_cases import MESSAGES, counted, language
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparse_zero.data.conversations import as_tools, render, role_in_template
from sparse_zero.errors import UserError

CHATML = (
    "{% for m in messages %}<u> {{ m['role'] }} : {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %} <e> {% endfor %}"
)


def word_level(pre_tokenizer=None, template=CHATML):
    """A tokenizer that drops whitespace."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.WhitespaceSplit()
    words = "question one two answer first second third user assistant system tool TOOLS weather :"
    special = ["[UNK]", "<eos>", "<u>", "<e>"]
    backend.train_from_iterator([words], trainers.WordLevelTrainer(special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="[UNK]"
    )
    tokenizer.chat_template = template
    return tokenizer


def talk(first, second="answer second"):
    return [
        {"role": "user", "content": "question one"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "question two"},
        {"role": "assistant", "content": second},
    ]


@pytest.mark.parametrize(
    "first",
    [
        "answer first",
        "answer first\n",
        "answer first ",
        " answer first",
        "\n\nanswer first",
        "\tanswer\n\nfirst\n",
        "",
    ],
)
@pytest.mark.parametrize("pre_tokenizer", [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Whitespace()])
def test_whitespace_around_an_answer_does_not_move_its_tokens(first, pre_tokenizer):
    tokenizer = word_level(pre_tokenizer)
    ids, mask = render(talk(first), None, tokenizer)
    trained = [id for id, is_trained in zip(ids, mask, strict=True) if is_trained]
    assert tokenizer.convert_ids_to_tokens(trained) == [*first.split(), "answer", "second"]
    rendered = tokenizer.apply_chat_template(talk(first), return_dict=True)
    assert ids == rendered["input_ids"]


@pytest.mark.parametrize("first", ["Yes.", "\nYes.\n", "  Yes.", ""])
def test_a_byte_level_tokenizer_keeps_an_answers_own_whitespace(first, tokenizer):
    row = language(tokenizer, MESSAGES, {"messages": [talk(first, "It is.")]}).train[0]
    assert row["input_ids"] == tokenizer.apply_chat_template(talk(first, "It is."), return_dict=True)["input_ids"]
    assert counted(row, tokenizer) == f"{first}<|im_end|>It is.<|im_end|>"


def test_a_token_that_joins_a_question_and_an_answer_is_not_trained():
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "ab": 1, "c": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[UNK]")
    tokenizer.chat_template = template
    # The answer's "b" has no token of its own: by prefixes it cannot be found either
    with pytest.raises(UserError, match="changes earlier turns"):
        render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}], None, tokenizer)


ROLES = [
    *[("human", "user"), ("gpt", "assistant"), ("model", "assistant"), ("Assistant", "assistant"), ("USER", "user")],
    *[("observation", "tool"), ("critic", "critic"), ("assistant", "assistant")],
]


@pytest.mark.parametrize(("role", "name"), ROLES)
def test_roles_have_the_names_of_chat_templates(role, name):
    assert role_in_template(role, CHATML) == name


def test_a_role_that_the_template_compares_with_is_kept():
    for comparison in ("message['role'] == 'gpt'", "message.role in ['gpt', 'x']", "'gpt' == message.role"):
        assert role_in_template("gpt", "{% if " + comparison + " %}x{% endif %}") == "gpt", comparison
    # Gemma's template only writes "model"
    assert role_in_template("model", "{% set role = 'model' %}{{ role }}") == "assistant"


@pytest.mark.parametrize(("role", "shown"), [("gpt", "gpt -> assistant"), ("Assistant", "Assistant -> assistant")])
def test_other_forms_are_the_same_conversation_and_that_is_said(role, shown, caplog):
    tokenizer = word_level()
    plain = language(tokenizer, MESSAGES, {"messages": [talk("answer first")]}).train[0]
    caplog.clear()
    names = {"user": "human", "assistant": role}
    other = [{"from": names[turn["role"]], "value": turn["content"]} for turn in talk("answer first")]
    assert language(tokenizer, MESSAGES, {"messages": [other]}).train[0] == plain
    assert caplog.text.count(f"roles are taken for those of chat templates: {shown}, human -> user") == 2


def test_conversations_without_an_answer_are_dropped_and_their_roles_named(caplog):
    other = [{"role": "user", "content": "question one"}, {"role": "critic", "content": "answer"}]
    rows = {"messages": [talk("answer first"), other]}
    assert len(language(word_level(), MESSAGES, rows).train) == 1
    assert "dropped 1 of 2 training examples: they have no turn of the assistant, only of user, critic" in caplog.text
    with pytest.raises(UserError, match="all 1 have no turn of the assistant, only of user, critic"):
        language(word_level(), MESSAGES, {"messages": [other]})


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
WITH_TOOLS = "{% if tools %}TOOLS {{ tools[0]['function']['name'] }} {% endif %}" + CHATML


@pytest.mark.parametrize("form", [lambda tools: tools, json.dumps, lambda tools: [json.dumps(tool) for tool in tools]])
def test_tools_reach_the_template(form, caplog):
    tokenizer = word_level(template=WITH_TOOLS)
    rows = {"messages": [talk("answer first")], "tools": [form(TOOLS)]}
    row = language(tokenizer, {**MESSAGES, "tools": "tools"}, rows).train[0]
    assert tokenizer.decode(row["input_ids"]).startswith("TOOLS weather <u> user")
    assert not caplog.records
    without = language(tokenizer, MESSAGES, rows).train[0]
    assert not tokenizer.decode(without["input_ids"]).startswith("TOOLS")
    assert "the column 'tools' is not used; set data.columns.tools: tools" in caplog.text


def test_a_template_that_does_not_show_tools_is_named(caplog):
    rows = {"messages": [talk("answer first")], "tools": [json.dumps(TOOLS)]}
    language(word_level(), {**MESSAGES, "tools": "tools"}, rows)
    assert "data.columns.tools: the chat template" in caplog.text


@pytest.mark.parametrize("tools", ["[{", "3", '["a"]', [1]])
def test_tools_that_are_no_schemas_are_refused(tools):
    with pytest.raises(UserError, match=r"data\.columns\.tools: not"):
        as_tools(tools)


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_a_conversation_may_have_no_tools(tools):
    assert as_tools(tools) is None


def test_keys_that_datasets_adds_do_not_reach_the_template():
    template = "{% for m in messages %}{% if m['tool_calls'] is defined %}TOOLS {% endif %}{% endfor %}" + CHATML
    tokenizer = word_level(template=template)
    called = [*talk("answer first"), {"role": "tool", "content": "first", "tool_calls": None}]
    row = language(tokenizer, MESSAGES, {"messages": [called]}).train[0]
    assert not tokenizer.decode(row["input_ids"]).startswith("TOOLS")
