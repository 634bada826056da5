"""Files of all usual names, and words of a CSV that pandas takes for missing values."""

import bz2
import gzip
import json
import lzma
import shutil

import pandas as pd
import pytest
from data_cases import TEXT, prepared, section

from sparse_zero.data.splits import load_splits
from sparse_zero.errors import UserError

ROWS = [{"text": f"sentence {row}"} for row in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path, **settings):
    train, evaluation = load_splits(section(path, TEXT, **settings))
    return sorted([*train["text"], *evaluation["text"]])


def expected(count=20):
    return sorted(row["text"] for row in ROWS[:count])


@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.ndjson", "D.JSONL", "d.v1.jsonl", "a file.jsonl", "d[1].jsonl", "d{x}.jsonl", "d.Json"]
)
def test_a_file_is_read_whatever_its_name(name, tmp_path):
    (tmp_path / name).write_text(LINES)
    assert read(tmp_path / name) == expected()


@pytest.mark.parametrize(
    ("name", "compress"), [("d.jsonl.gz", gzip.compress), ("d.JSONL.BZ2", bz2.compress), ("d.jsonl.xz", lzma.compress)]
)
def test_a_compressed_file_is_read(name, compress, tmp_path):
    (tmp_path / name).write_bytes(compress(LINES.encode()))
    assert read(tmp_path / name) == expected()


def test_a_zip_and_a_parquet_file_are_read(tmp_path, monkeypatch):
    pd.DataFrame(ROWS).to_parquet(tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == expected()
    (tmp_path / "d.jsonl").write_text(LINES)
    monkeypatch.chdir(tmp_path)
    shutil.make_archive("d.jsonl", "zip", tmp_path, "d.jsonl")
    assert read(tmp_path / "d.jsonl.zip") == expected()


def test_patterns_and_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("".join(LINES.splitlines(True)[:10]))
    (tmp_path / "b.jsonl").write_text("".join(LINES.splitlines(True)[10:]))
    assert read("~/a.jsonl") == sorted(row["text"] for row in ROWS[:10])
    assert read(str(tmp_path / "*.jsonl")) == expected()
    assert read("json", data_files=["~/a.jsonl", "~/b.jsonl"]) == expected()
    assert read("json", data_files={"train": "~/*.jsonl"}) == expected()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/none.jsonl", "no such file '.*none.jsonl'"),
        ("{}/non*.jsonl", "no file matches"),
        (
            "{}/d.log",
            r"ends in '\.log', which no reader is known for; set data.path to csv, json, parquet",
        ),
        ("{}/c.jsonl", "no such file '.*c.jsonl'; did you mean '.*b.jsonl'"),
    ],
)
def test_files_that_cannot_be_read_say_why(path, message, tmp_path):
    (tmp_path / "d.log").write_text("x")
    (tmp_path / "b.jsonl").write_text(LINES)
    with pytest.raises(UserError, match=message):
        load_splits(section(path.format(tmp_path), TEXT))


@pytest.mark.parametrize("word", ["NA", "None", "null", "nan", "N/A", "none"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "directory"])
def test_no_class_of_a_csv_vanishes(word, suffix, tmp_path, tokenizer):
    separator = "\t" if suffix == "tsv" else ","
    rows = [("text", "label"), *[("good film", "EU"), ("bad movie", word)] * 10]
    file = tmp_path / f"data.{'csv' if suffix == 'directory' else suffix}"
    file.write_text("".join(separator.join(row) + "\n" for row in rows))
    data = section(tmp_path if suffix == "directory" else file, eval_split="train")
    result = prepared(data, tokenizer, "sequence-classification")
    assert result.labels.id2label == dict(enumerate(sorted(["EU", word])))
    assert len(result.train) == 20


def test_an_empty_field_is_missing_and_numbers_stay_numbers(tmp_path, tokenizer, caplog):
    (tmp_path / "d.csv").write_text("text,label\na,1\nb,\nc,0\nd,1\n")
    result = prepared(section(tmp_path / "d.csv", eval_split="train"), tokenizer, "sequence-classification")
    assert result.labels.id2label == {0: "0", 1: "1"}
    assert "dropped 1 of 4 training examples: they have no value for" in caplog.text


def test_an_empty_text_is_dropped_with_its_reason(tmp_path, tokenizer, caplog):
    rows = [{"text": "" if row == 3 else "good film", "label": row % 2} for row in range(10)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bare = _without_special_tokens(tokenizer)
    result = prepared(section(tmp_path / "d.jsonl", eval_split="train"), bare, "sequence-classification")
    assert len(result.train) == 9
    assert "dropped 1 of 10 training examples: they are empty: they have no token" in caplog.text


def _without_special_tokens(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    assert tokenizer("").input_ids == []
    return tokenizer
