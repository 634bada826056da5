"""The benchmark of quantised bases trains the same scalars on each kind, and counts the bytes of the base."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from quantized_cases import save_base
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import quantized_quality

pytest.importorskip("bitsandbytes")


def test_each_kind_is_trained_alike(tmp_path, tokenizer):
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 320}
    save_base(tmp_path / "base", vocab_size=len(tokenizer), **sizes)
    AutoTokenizer.from_pretrained(tokenizer.name_or_path).save_pretrained(tmp_path / "base")
    for part, count in (("train", 8), ("test", 3)):
        rows = [{"question": f"what is {n} and 1", "answer": f"it is {n + 1}"} for n in range(count)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = argparse.Namespace(
        model=str(tmp_path / "base"), gsm8k=tmp_path, rate=1e-2, seed=0, batch=4, limit=None, test=None
    )
    rows = [quantized_quality.measured(kind, arguments, "cpu") for kind in ("bfloat16", "nf4-double")]
    assert rows[0]["trained"] == rows[1]["trained"] > 0
    assert rows[0]["steps"] == rows[1]["steps"] == 2
    linear = 64 * 64 * 5 + 64 * 32 * 2
    saved = 2 * linear - linear // 2 - linear // 64 - 7 * (64 + 1024 + 4 + 4)  # 7 weights with at most 64 blocks
    assert rows[0]["base_bytes"] - rows[1]["base_bytes"] == saved
    assert all(row["loss"] < row["before"] for row in rows)
    shown = quantized_quality.table(rows)
    assert f"{rows[1]['loss'] - rows[0]['loss']:+.4f}" in shown
