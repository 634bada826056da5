"""benchmarks/gsm8k_share.py without SmolLM2: what is run in which order, what is trained, the data, the page."""

import json
import math
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import gsm8k_share as quality
import gsm8k_share_plan as planning
import gsm8k_share_table as page
from noise_quality import append_row
from share_quality_plan import CELLS, Cell

from sparse_zero import UserError

SMALL = planning.Scale(96, 160, 4, 48)
SCATTERED, FULL = Cell("scattered", 0.01), Cell("full", 1)


def finished(run: planning.Run, validation: float, loss: float | None = None) -> dict[str, dict]:
    row = {
        "validation": validation,
        "loss": validation + 0.1 if loss is None else loss,
        "before": 1.5,
        "seconds": 60.0,
    }
    row |= {"trainable": round(1e6 * run.density), "steps": 24, "device": "CPU"}
    return {run.key: {**asdict(run), **row, "versions": {"torch": "2"}, "date": "2026-01-01"}}


def tuned(scale: planning.Scale = SMALL, best: int = 1) -> dict[str, dict]:
    """The runs of the first seed; the best rate is this one of three."""
    done: dict[str, dict] = {}
    for cell in CELLS:
        for index, run in enumerate(planning.rate_runs(cell, scale, {})):
            done |= finished(run, 0.8 if index == best else 0.9)
    return done


def test_every_cell_has_its_middle_rate_first_then_the_others_then_more_seeds() -> None:
    first, count = planning.plan({}, SMALL), planning.FIRST
    assert {cell.share for cell in CELLS[:count]} == {0, 0.01, 1}
    assert not {cell.share for cell in CELLS[count:]} & {0, 0.01, 1}
    for cells, runs in ((CELLS[:count], first[: 3 * count]), (CELLS[count:], first[3 * count :])):
        middle = runs[: len(cells)]
        assert [(run.method, run.density) for run in middle] == [tuple(cell) for cell in cells]
        assert all(run.learning_rate == planning.rates_of(cell)[1] for cell, run in zip(cells, middle, strict=True))
        assert len(runs) == len(set(runs)) == 3 * len(cells)
    assert {run.seed for run in first} == {0}
    seeds = [run.seed for run in planning.plan(tuned(), SMALL)]
    others = len(CELLS) - count
    assert seeds == [0] * 3 * count + [1] * count + [2] * count + [0] * 3 * others + [1] * others + [2] * others
    assert planning.plan(tuned()) == planning.plan({}), "another scale has rates of its own"


def test_a_call_may_have_some_of_the_methods_and_shares() -> None:
    given = Namespace(methods=["scattered", "full"], shares=[0.01, 0.1])
    runs = quality.selected_plan(given, SMALL, tuned())
    assert {(run.method, run.density) for run in runs} == {("scattered", 0.01), ("scattered", 0.1), ("full", 1)}
    assert [run.seed for run in runs] == [0] * 6 + [1, 1, 2, 2] + [0] * 3 + [1, 2]
    everything = Namespace(methods=quality.METHODS, shares=quality.SHARES)
    assert quality.selected_plan(everything, SMALL, tuned()) == planning.plan(tuned(), SMALL)


def test_the_rate_is_chosen_by_the_validation_loss() -> None:
    done: dict[str, dict] = {}
    runs = planning.rate_runs(SCATTERED, SMALL, done)
    for run, validation, loss in zip(runs[:2], (0.80, 0.79), (0.70, 0.75), strict=True):
        done |= finished(run, validation, loss)
        assert planning.chosen_rate(SCATTERED, SMALL, done) is None
    done |= finished(runs[2], 0.85, 0.60)
    assert planning.chosen_rate(SCATTERED, SMALL, done) == runs[1].learning_rate
    assert page.losses(page.tested(SCATTERED, SMALL, done)) == {0: 0.75}


@pytest.mark.parametrize(("best", "beyond"), [(0, 3e-5), (2, 3e-3)])
def test_the_next_rate_is_tried_where_the_best_is_at_the_edge(best: int, beyond: float) -> None:
    done = tuned(best=best)
    runs = {run.learning_rate: run for run in planning.rate_runs(FULL, SMALL, done)}
    assert runs.keys() == {1e-4, 3e-4, 1e-3, beyond}
    assert planning.chosen_rate(FULL, SMALL, done) in (1e-4, 1e-3)
    done |= finished(runs[beyond], 0.7)
    assert planning.chosen_rate(FULL, SMALL, done) == beyond


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, tie_word_embeddings=True, **sizes))


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.share in (0, 0.03, 1)], ids=str)
def test_what_is_trained(cell: Cell, model: LlamaForCausalLM) -> None:
    pytest.importorskip("peft")
    total = sum(parameter.numel() for parameter in model.parameters())
    adapted = quality.adapted(model, planning.rate_runs(cell, SMALL, {})[0])
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    rank_one = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    wanted = {0: 96 * 64, 1: total}.get(cell.share, cell.share * total)
    # whole columns end with a column; LoRA's number is a multiple of that of rank 1
    tolerance = {"lora": rank_one / 2, "whole": 128}.get(cell.method, 1)
    assert sum(trained.values()) == pytest.approx(wanted, abs=tolerance)
    if cell.method == "head":
        assert [*trained] == ["model.embed_tokens.weight"], "the two are tied"


def write_problems(path: Path, count: int) -> None:
    rows = [{"question": f"{'very ' * (n % 4)}hard: {n}?", "answer": f"it is #### {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Tokenizer:
    """A token for each letter."""

    pad_token_id, eos_token_id = None, 95

    def apply_chat_template(self, messages: list, **settings: bool) -> str:
        return messages[0]["content"]

    def __call__(self, text: str, add_special_tokens: bool) -> dict:
        return {"input_ids": [ord(letter) % 90 for letter in text]}


def test_a_run_is_trained_validated_and_tested_on_different_problems(model, tmp_path: Path, monkeypatch) -> None:
    write_problems(tmp_path / "train.jsonl", 40)
    write_problems(tmp_path / "test.jsonl", 30)
    monkeypatch.setattr(quality, "load_tokenizer", lambda name: Tokenizer())
    monkeypatch.setattr(quality, "load_model", lambda name, task, dtype: model)
    scale = planning.Scale(problems=12, longest=34, batch=4, held_out=5)
    problems = quality.Problems(tmp_path, scale, "cpu")
    parts = (problems.train, problems.validation, problems.test)
    assert [len(part) for part in parts] == [12, 5, 5]
    assert max(len(example) for part in parts for example in part) <= 34
    seen = [{tuple(example.prompt) for example in part} for part in parts[:2]]
    assert not seen[0] & seen[1]
    assert len(quality.Problems(tmp_path, scale._replace(problems=0), "cpu").train) > 12
    run = planning.run_of(FULL, scale, 1e-2)
    row = quality.make_run(run, problems, "cpu")
    assert (row["steps"], row["trainable"]) == (3, sum(p.numel() for p in model.parameters()))
    assert row["loss"] < row["before"] - 0.1
    assert row["before"] == pytest.approx(plain_loss(model, problems.test), abs=0.02)
    assert quality.make_run(run, problems, "cpu")["loss"] == row["loss"], "the base model is not trained"
    assert planning.key_of(row) == run.key


def test_too_few_problems_are_refused(model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(quality, "load_tokenizer", lambda name: Tokenizer())
    monkeypatch.setattr(quality, "load_model", lambda name, task, dtype: model)
    scale = planning.Scale(problems=0, longest=99, batch=4, held_out=5)
    with pytest.raises(UserError, match=r"--gsm8k: .*No such file.*train\.jsonl"):
        quality.Problems(tmp_path, scale, "cpu")
    write_problems(tmp_path / "train.jsonl", 6)
    write_problems(tmp_path / "test.jsonl", 5)
    assert len(quality.Problems(tmp_path, scale, "cpu").train) == 1
    with pytest.raises(UserError, match=r"train\.jsonl has 6 problems of at most 99 tokens, not 7: lower --problems"):
        quality.Problems(tmp_path, scale._replace(problems=2), "cpu")
    write_problems(tmp_path / "test.jsonl", 4)
    with pytest.raises(UserError, match=r"test\.jsonl has 4 problems of at most 99 tokens, not 5"):
        quality.Problems(tmp_path, scale, "cpu")


def plain_loss(model: LlamaForCausalLM, examples: list) -> float:
    """The mean negative log-likelihood of the answers' tokens, one example at a time."""
    losses = []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.prompt + example.answer])).logits[0].double()
        first = len(example.prompt) - 1
        for place, token in enumerate(example.answer):
            losses.append(-torch.log_softmax(logits[first + place], 0)[token].item())
    return math.fsum(losses) / len(losses)


def test_the_page(tmp_path: Path) -> None:
    done = tuned()
    for run in planning.plan(done, SMALL):
        if run.seed == 1:
            done |= finished(run, 0.8, 0.94 + (0.02 if run.method == "whole" else 0))
    for row in done.values():
        append_row(tmp_path / "r.jsonl", row)
    assert quality.read_results(tmp_path / "r.jsonl") == done
    text = page.write_page(done, tmp_path / "r.jsonl")
    assert (tmp_path / "r.md").read_text() == text.removesuffix("\nno plot: pip install matplotlib\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    by_name = {row[0]: row[1:] for row in rows[::-1]}
    assert by_name["scattered scalars"] == ["0.920 ± 0.028 (2)"] * 5
    assert by_name["whole - scattered"] == ["+0.010 ± 0.010"] * 5
    assert by_name["within a tenth of the columns"][-1] == "-"
    assert by_name["trained, scattered"] == ["1,000", "3,000", "10,000", "30,000", "100,000"]
    assert "full fine-tuning (1,000,000 scalars): 0.920 ± 0.028 (2)" in text
    assert "0.01 (0.003 to 0.03)" in text
    assert "**0.0003: 0.800 (0.900)**, 0.001: 0.900 (1.000)" in text
    assert "(`--problems 96 --longest 160 --batch 4 --held-out 48`)" in text
    assert "Missing: 21 of the 105 runs" in text


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page.plot(tuned(), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    done, path = quality.read_results(), quality.CACHE.with_suffix(".md")
    assert done
    assert path.read_text() == page.markdown(done)
