"""The rewards of the GRPO benchmark."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import grpo

ANSWERS = {
    "6 + 1 = 7\n#### 7": (1.0, 1.0),
    "#### 1,234": (1.0, 0.0),
    "#### $7.00.": (1.0, 1.0),
    "#### 8": (1.0, 0.0),
    "#### seven": (0.5, 0.0),
    "#### 7 apples": (0.5, 0.0),
    "The answer is 7": (0.0, 0.0),
}


@pytest.mark.parametrize("text", ANSWERS)
def test_rewards(text: str) -> None:
    completion = [[{"role": "assistant", "content": text}]]
    assert (grpo.form(completion)[0], grpo.right(completion, number=["7"])[0]) == ANSWERS[text]


def test_problems(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "3 * 400 = 1,200\n#### 1,200"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = grpo.problems(tmp_path)
    assert problem["number"] == "1,200"
    assert problem["prompt"][0]["content"].endswith("How many?")
    assert grpo.right([[{"role": "assistant", "content": "#### 1200"}]], number=[problem["number"]]) == [1.0]
