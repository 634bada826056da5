"""Safetensors files that are written once, in one pass, and read in pieces.

Each file has a digest of the whole file and one of each block, so that a rank can verify what it reads without reading
the rest.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from pydantic import BaseModel, ConfigDict

from sparse_zero.errors import UserError

BLOCK_BYTES = 2**20
_STAGING_SCALARS = 2**22
"""Scalars that are copied from an accelerator at a time."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class FileRecord(BaseModel):
    """The size and the digests of a file when it was written."""

    model_config = ConfigDict(extra="forbid")

    bytes: int
    xxh3_128: str
    """The 128-bit XXH3 of the whole file, as `xxhsum -H2` prints it."""
    blocks: list[str]
    """The 64-bit XXH3 of each block of `block_bytes`."""
    block_bytes: int = BLOCK_BYTES


class Entry(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: torch.dtype
    """The dtype in the file, to which the chunks are converted."""
    shape: tuple[int, ...]
    chunks: Iterable[torch.Tensor]
    """1-D tensors whose scalars, in order, fill `shape`."""


class _Digest:
    def __init__(self) -> None:
        self.bytes = 0
        self._whole, self._block, self._blocks = xxhash.xxh3_128(), xxhash.xxh3_64(), []

    def update(self, data: memoryview) -> None:
        self._whole.update(data)
        while data.nbytes:
            part = data[: BLOCK_BYTES - self.bytes % BLOCK_BYTES]
            self._block.update(part)
            self.bytes += part.nbytes
            data = data[part.nbytes :]
            if self.bytes % BLOCK_BYTES == 0:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block.reset()

    def record(self) -> FileRecord:
        if self.bytes % BLOCK_BYTES:
            self._end_block()
        digest = self._whole.hexdigest()
        return FileRecord(bytes=self.bytes, xxh3_128=digest, blocks=self._blocks, block_bytes=BLOCK_BYTES)


def write_bytes(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file and flush it to the disk. Raises OSError."""
    digest = _Digest()
    with path.open("wb") as file:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            file.write(view)
            digest.update(view)
        file.flush()
        os.fsync(file.fileno())
    return digest.record()


def write_tensors(path: Path, entries: list[Entry], metadata: Mapping[str, str]) -> FileRecord:
    """Write a safetensors file chunk by chunk, and flush it to the disk. Raises OSError."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        begin, end = end, end + _numel(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    record = write_bytes(path, _pieces(entries, text))
    assert record.bytes == 8 + len(text) + end, f"{path}: the chunks do not fill the tensors' shapes"
    return record


def _pieces(entries: list[Entry], header: bytes) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for entry in entries:
        for chunk in entry.chunks:
            for part in chunk.detach().split(_STAGING_SCALARS):
                values = part.to("cpu", entry.dtype).contiguous()
                if values.numel():
                    yield memoryview(values.view(torch.uint8).numpy())


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


class TensorFile:
    """Reads a file of `write_tensors` in pieces, and verifies the digest of every block that it reads.

    The constructor and all methods raise UserError: the file is missing, truncated, or its content has changed.
    """

    def __init__(self, path: Path, record: FileRecord) -> None:
        self.path, self._record = path, record
        self.bytes_read = 0
        """Bytes that have been read from the disk."""
        self._block: tuple[int, memoryview] | None = None
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            length = int.from_bytes(self._bytes(0, 8), "little")
            header = json.loads(self._bytes(8, 8 + length))
        except BaseException:
            self._file.close()
            raise
        self.metadata: dict[str, str] = header.pop("__metadata__")
        self._data = 8 + length
        self._tensors = header

    def close(self) -> None:
        self._file.close()
        self._block = None

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._tensors[name]["dtype"]]

    def numel(self, name: str) -> int:
        return _numel(self.shape(name))

    def tensor(self, name: str) -> torch.Tensor:
        """Returns: the whole tensor, flattened to 1-D."""
        values = torch.empty(self.numel(name), dtype=self.dtype(name))
        self.copy(name, 0, values)
        return values

    def copy(self, name: str, start: int, out: torch.Tensor) -> None:
        """Copy scalars of a tensor.

        Args:
            name: of the tensor.
            start: the index of the first scalar in the flattened tensor.
            out: (n,) on any device and of any dtype; filled with n scalars.
        """
        entry = self._tensors[name]
        dtype = self.dtype(name)
        begin = self._data + entry["data_offsets"][0] + start * dtype.itemsize
        at = 0
        for piece in self._views(begin, begin + out.numel() * dtype.itemsize):
            values = torch.frombuffer(piece, dtype=dtype)
            out[at : at + values.numel()].copy_(values)
            at += values.numel()

    def _bytes(self, begin: int, end: int) -> bytes:
        return b"".join(self._views(begin, end))

    def _views(self, begin: int, end: int) -> Iterator[memoryview]:
        size = self._record.block_bytes
        while begin < end:
            number, at = divmod(begin, size)
            piece = self._checked_block(number)[at : at + end - begin]
            if not piece.nbytes:
                raise UserError(f"{self.path}: damaged: its header describes more data than the file contains")
            yield piece
            begin += piece.nbytes

    def _checked_block(self, number: int) -> memoryview:
        if self._block is None or self._block[0] != number:
            begin = number * self._record.block_bytes
            size = max(0, min(self._record.block_bytes, self._record.bytes - begin))
            buffer = memoryview(bytearray(size))
            self._block = None
            try:
                self._file.seek(begin)
                count = 0
                while count < size and (more := self._file.readinto(buffer[count:])):
                    count += more
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
            if count < size:
                raise UserError(f"{self.path}: truncated: {begin + count} of {self._record.bytes} bytes")
            if size and xxhash.xxh3_64_hexdigest(buffer) != self._record.blocks[number]:
                raise UserError(
                    f"{self.path}: damaged, or from another run: the digest of bytes {begin} to {begin + size} does "
                    "not match; resume from another checkpoint"
                )
            self.bytes_read += size
            self._block = number, buffer
        return self._block[1]


def check_size(path: Path, record: FileRecord) -> None:
    """Check that a file exists and has its size, without reading it. Raises UserError."""
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"{path}: missing") from None
    if size != record.bytes:
        raise UserError(f"{path}: truncated or overwritten: it has {size} bytes, but {record.bytes} were written")


def check_digest(path: Path, record: FileRecord) -> None:
    """Check the size and the digest of a file, which is read whole. Raises UserError."""
    check_size(path, record)
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(BLOCK_BYTES):
            digest.update(piece)
    if digest.hexdigest() != record.xxh3_128:
        raise UserError(f"{path}: damaged, or from another run: its checksum does not match")


def flush_directory(path: Path) -> None:
    """Flush the entries of a directory to the disk, if the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems cannot flush a directory, and make its entries durable in another way.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
