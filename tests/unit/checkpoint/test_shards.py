"""Files of tensors: other safetensors readers can read them, and every kind of damage is detected."""

import itertools
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from sparse_zero.checkpoint import shards
from sparse_zero.checkpoint.shards import Entry, FileRecord, TensorFile, check_digest, check_size, write_tensors
from sparse_zero.errors import UserError

BLOCK = 64


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the blocks so small that a small file has many."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", BLOCK)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    values = torch.randn(101)
    return {"value": values, "half": values.to(torch.bfloat16), "bytes": torch.arange(7, dtype=torch.uint8)}


@pytest.fixture
def written(tmp_path: Path, small_blocks: None, tensors: dict[str, torch.Tensor]) -> tuple[Path, FileRecord]:
    entries = [Entry(n, t.dtype, tuple(t.shape), [t[:3], t[3:3], t[3:]]) for n, t in tensors.items()]
    return tmp_path / "shard", write_tensors(tmp_path / "shard", entries, {"run": "a"})


def test_any_reader_sees_the_tensors(written: tuple[Path, FileRecord], tensors: dict[str, torch.Tensor]) -> None:
    path, record = written
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], values) for name, values in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"run": "a"}
    content = path.read_bytes()
    assert (record.bytes, record.xxh3_128) == (len(content), xxhash.xxh3_128_hexdigest(content))
    starts = range(0, len(content), BLOCK)
    assert record.blocks == [xxhash.xxh3_64_hexdigest(content[start : start + BLOCK]) for start in starts]


def test_chunks_are_converted_to_the_entrys_dtype(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_tensors(tmp_path / "f", [Entry("v", torch.bfloat16, (101,), [tensors["value"]])], {})
    assert torch.equal(load_file(tmp_path / "f")["v"], tensors["half"])


@pytest.mark.parametrize(("start", "count"), [(0, 101), (0, 1), (100, 1), (13, 40), (50, 0)])
def test_pieces(written: tuple[Path, FileRecord], tensors: dict[str, torch.Tensor], start: int, count: int) -> None:
    with TensorFile(*written) as file:
        for name in ("value", "half"):
            out = torch.full((count,), -1.0)
            file.copy(name, start, out)
            assert torch.equal(out, tensors[name][start : start + count].float())


def test_only_the_blocks_of_a_piece_are_read(written: tuple[Path, FileRecord]) -> None:
    with TensorFile(*written) as file:
        header = file.bytes_read
        file.copy("value", 60, torch.empty(8))
        assert file.bytes_read - header <= 2 * BLOCK
        assert file.bytes_read < written[1].bytes / 2


def test_every_flipped_byte_is_found_when_it_is_read(written: tuple[Path, FileRecord]) -> None:
    path, record = written
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path}: damaged"):
            read_all(path, record)
    path.write_bytes(content)
    assert read_all(path, record) == record.bytes


def test_every_cut_is_found(written: tuple[Path, FileRecord]) -> None:
    path, record = written
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=f"{path}: truncated"):
            read_all(path, record)
        with pytest.raises(UserError, match=f"{path}: truncated"):
            check_size(path, record)


def read_all(path: Path, record: FileRecord) -> int:
    with TensorFile(path, record) as file:
        for name in file.names():
            file.tensor(name)
        return file.bytes_read


def test_a_missing_file_is_named(tmp_path: Path, written: tuple[Path, FileRecord]) -> None:
    for look in (check_size, check_digest, TensorFile):
        with pytest.raises(UserError, match=f"{tmp_path}/none: "):
            look(tmp_path / "none", written[1])


def test_another_file_of_the_same_length_is_found(tmp_path: Path, written: tuple[Path, FileRecord]) -> None:
    path, record = written
    other = tmp_path / "other"
    other.write_bytes(bytes(itertools.repeat(1, record.bytes)))
    check_size(other, record)
    with pytest.raises(UserError, match="from another run"):
        check_digest(other, record)
    with pytest.raises(UserError, match="from another run"):
        TensorFile(other, record)
    check_digest(path, record)
