"""Answers of tiny models: the same as transformers' own, alone and in a batch, with and without the adapter."""

import shutil

import pytest
import torch
from families import tiny
from transformers import AutoModelForCausalLM

from sparse_zero.adapters.merging import write_merged
from sparse_zero.adapters.save_and_load import save_adapter
from sparse_zero.errors import UserError
from sparse_zero.generation.language_model import check_generation, open_model
from sparse_zero.model.sparsify import sparsify
from sparse_zero.selection.config import SparseConfig

TEXTS = ["a fine film", "what a mess , but it is short and it knows that it is", "why"]


def greedy(model, ids: list[int], count: int) -> list[int]:
    """The most probable next token, `count` times, without generate()."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


@pytest.mark.parametrize("with_adapter", [True, False])
def test_answers_are_those_of_a_loop_over_logits(base, adapter, tmp_path, with_adapter):
    opened = open_model(str(adapter))
    write_merged(adapter, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" if with_adapter else base)
    prompts = [opened.prompt_of_text(text) for text in TEXTS]
    assert prompts[0][0] == opened.tokenizer.bos_token_id
    expected = [greedy(plain, ids, 12)[len(ids) :] for ids in prompts]
    ends = opened.tokenizer.eos_token_id
    expected = [ids[: ids.index(ends)] if ends in ids else ids for ids in expected]
    texts = opened.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert opened.answer(prompts, 12, with_adapter=with_adapter) == texts
    assert [opened.answer([ids], 12, with_adapter=with_adapter)[0] for ids in prompts] == texts


def test_the_adapter_answers_otherwise_than_its_base_and_is_back_afterwards(adapter):
    opened = open_model(str(adapter))
    prompts = [opened.prompt_of_text(text) for text in TEXTS]
    before, base = opened.answer(prompts, 8), opened.answer(prompts, 8, with_adapter=False)
    assert before != base
    assert opened.answer(prompts, 8) == before


def test_a_merged_model_answers_as_its_adapter(adapter, tmp_path):
    write_merged(adapter, tmp_path / "merged")
    merged, opened = open_model(str(tmp_path / "merged")), open_model(str(adapter))
    assert (merged.has_adapter, opened.has_adapter) == (False, True)
    prompts = [opened.prompt_of_text(text) for text in TEXTS]
    assert merged.answer(prompts, 10) == opened.answer(prompts, 10)


def test_a_temperature_samples(base):
    opened = open_model(str(base))
    prompts = [opened.prompt_of_text(TEXTS[0])] * 8
    torch.manual_seed(0)
    assert len({*opened.answer(prompts, 6, temperature=5.0)}) > 4
    assert len({*opened.answer(prompts, 6)}) == 1


def test_an_answer_ends_with_the_models_end(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    opened = open_model(str(tmp_path))
    ids = opened.prompt_of_text(TEXTS[0])
    third = greedy(opened.model, ids, 3)[-1]
    opened.model.generation_config.eos_token_id = third
    assert opened.answer([ids], 50) == [opened.tokenizer.decode(greedy(opened.model, ids, 3)[len(ids) :])]


def test_there_must_be_room_for_an_answer(base):
    opened = open_model(str(base))
    assert opened.max_tokens == 96
    ids = opened.prompt_of_text("word " * 90)[:94]
    assert len(opened.tokenizer(opened.answer([ids], 50)[0]).input_ids) <= 4
    with pytest.raises(UserError, match=r"a prompt has 96 tokens, but .* takes at most 96"):
        opened.answer([[*ids, 5, 6]], 5)
    with pytest.raises(UserError, match="a prompt has tokens beyond the 2,000 of the model"):
        opened.answer([[1, 2000]], 5)
    with pytest.raises(UserError, match="a prompt has no token"):
        opened.answer([[]], 5)


def test_what_cannot_answer(adapter, tmp_path):
    classifier = sparsify(tiny("bert", "sequence-classification"), SparseConfig(density=0.04))
    save_adapter(classifier, tmp_path / "classifier")
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    for name, expected in (
        (tmp_path / "classifier", "is of a model for sequence-classification; only causal language models answer"),
        (tmp_path / "none", "none cannot be loaded"),
        (run, "is the directory of a run; its adapter is .*adapter"),
    ):
        with pytest.raises(UserError, match=expected):
            open_model(str(name))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 0.0), "--max-new-tokens 0: must be at least 1"),
        ((1, -0.5), "--temperature -0.5: must be at least 0"),
        ((1, float("nan")), "--temperature nan: must be at least 0"),
    ],
)
def test_options_out_of_range(values, expected):
    with pytest.raises(UserError, match=expected):
        check_generation(*values)
