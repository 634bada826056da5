"""`sparse-zero chat`: what is printed, what is remembered, and bad input."""

import io
import json
import sys

import pytest
from cli_cases import one_error

from launcher.cli import main
from sparse_zero.generation.chat import Conversation
from sparse_zero.generation.language_model import open_model


@pytest.fixture
def typed(monkeypatch):
    def type_in(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    return type_in


def test_lines_are_answered_as_one_conversation(adapter, typed, capsys):
    typed("a fine film\n\nand why ?\n/new\na fine film\n")
    assert main(["chat", str(adapter), "--max-new-tokens", "6"]) == 0
    out = capsys.readouterr().out
    talk = Conversation(open_model(str(adapter)), 6)
    first, second = talk.say("a fine film"), talk.say("and why ?")
    assert [turn["content"] for turn in talk.turns] == ["a fine film", first, "and why ?", second]
    assert talk.say("a fine film") != first  # it remembers what was said
    for answer in (first, second):
        assert "".join(answer.split()) in "".join(out.split())
    assert "".join(out.split()).count("".join(first.split())) >= 2  # after /new it does not


def test_a_prompt_is_answered_with_the_chat_template(base, capsys):
    assert main(["chat", str(base), "--prompt", "a fine film", "--max-new-tokens", "6", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = open_model(str(base))
    ids = model.tokenizer("<|im_start|>user\na fine film<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    assert facts["answer"] == model.answer([ids.input_ids], 6)[0]
    assert set(facts) == {"model", "prompt", "answer", "seconds"}


def test_the_base_model_answers_beside_the_adapter(adapter, base, typed, capsys):
    words = ["chat", str(adapter), "--compare", "--max-new-tokens", "6"]
    assert main([*words, "--prompt", "a fine film", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["answer"] == Conversation(open_model(str(adapter)), 6).say("a fine film")
    assert facts["base_answer"] == Conversation(open_model(str(base)), 6).say("a fine film") != facts["answer"]
    typed("a fine film\n")
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "base model" in out
    assert "adapter" in out


def test_the_oldest_exchanges_make_room(base):
    talk = Conversation(open_model(str(base)), 8)
    for number in range(6):
        talk.say(f"film number {number} is a film and a film")
    assert 2 <= len(talk.turns) < 12
    assert talk.turns[-2]["content"].startswith("film number 5")
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * (len(talk.turns) // 2)


def test_a_line_that_is_too_long_does_not_end_the_talk(base, typed, capsys):
    typed("film " * 200 + "\na film\n")
    assert main(["chat", str(base), "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert "takes at most 96; /new begins another conversation" in err
    assert out.strip()


def test_control_characters_do_not_reach_the_terminal(base, capsys):
    from sparse_zero.generation.chat import _Printer

    printer = _Printer(open_model(str(base)).tokenizer)
    printer.on_finalized_text("red \x1b[31m\n", stream_end=True)
    assert capsys.readouterr().out == "red \\x1b[31m\n\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--json"], "--json prints one answer: pass what to answer with --prompt"),
        (["--prompt", " "], "--prompt: is empty"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--temperature", "-1"], "--temperature -1: must be at least 0"),
        (["--compare"], "is no adapter, so there is no base model to compare it with"),
    ],
)
def test_bad_input_is_one_sentence(base, words, expected, capsys):
    assert main(["chat", str(base), *words]) == 2
    assert expected in one_error(capsys)


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert main(["chat", str(tmp_path / "none"), "--prompt", "a"]) == 2
    assert "none cannot be loaded" in one_error(capsys)
