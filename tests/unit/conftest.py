"""Fixtures of several files."""

import json

import pytest


@pytest.fixture
def tokenizer(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows to a file of the kind that its name says; returns its path."""

    def write(rows: list[dict] | str, name: str = "data.jsonl") -> str:
        from datasets import Dataset

        path = tmp_path / name
        if isinstance(rows, str):
            path.write_text(rows)
        elif path.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        elif path.suffix in (".csv", ".tsv"):
            Dataset.from_list(rows).to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
