"""Safetensors files that are written once, in one pass, and read in pieces.

Each file has a digest of the whole file and one of each block, so that a rank can verify what it reads without reading
the rest.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparse_zero.adapters.reading import check_regular
from sparse_zero.adapters.schema import Count, Hash64, reason_of
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
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class FileRecord(BaseModel):
    """The size and the digests of a file when it was written."""

    model_config = ConfigDict(extra="forbid")

    bytes: Count
    xxh3_128: str = Field(pattern="^[0-9a-f]{32}$")
    """The 128-bit XXH3 of the whole file, as `xxhsum -H2` prints it."""
    blocks: list[Hash64]
    """The 64-bit XXH3 of each block of `block_bytes`."""
    block_bytes: int = Field(BLOCK_BYTES, ge=1, le=64 * 2**20)

    @model_validator(mode="after")
    def _has_all_blocks(self) -> "FileRecord":
        if len(self.blocks) != -(-self.bytes // self.block_bytes):
            raise ValueError(f"{len(self.blocks)} blocks of {self.block_bytes} bytes in {self.bytes} bytes")
        return self


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
    return math.prod(shape)


class _TensorRecord(BaseModel):
    """The entry of a tensor in the header of a safetensors file."""

    model_config = ConfigDict(extra="forbid")

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: list[Count] = Field(max_length=8)
    data_offsets: tuple[Count, Count]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @model_validator(mode="after")
    def _fits(self) -> "_TensorRecord":
        begin, end = self.data_offsets
        if end - begin != self.numel * _DTYPES[self.dtype].itemsize:
            raise ValueError(f"{end - begin} bytes for the shape {self.shape} of {self.dtype}")
        return self


class _Header(BaseModel):
    """The header of a safetensors file. All other keys are names of tensors."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _TensorRecord]

    metadata: dict[str, str] = Field({}, alias="__metadata__")


class TensorFile:
    """Reads a file of `write_tensors` in pieces, and verifies the digest of every block that it reads.

    The constructor and all methods raise UserError: the file is missing, truncated, or its content has changed; there
    is no such tensor, or it has no such scalars.
    """

    def __init__(self, path: Path, record: FileRecord) -> None:
        self.path, self._record = path, record
        self.bytes_read = 0
        """Bytes that have been read from the disk."""
        self._block: tuple[int, memoryview] | None = None
        check_regular(path)
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            self._tensors = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> dict[str, _TensorRecord]:
        length = int.from_bytes(self._bytes(0, min(8, self._record.bytes)), "little")
        self._data = 8 + length
        if self._data > self._record.bytes:
            raise UserError(f"{self.path}: damaged: its header is longer than the file")
        try:
            tensors = _Header.model_validate_json(self._bytes(8, self._data), strict=True).__pydantic_extra__
        except ValidationError as error:
            raise UserError(f"{self.path}: damaged header ({reason_of(error)})") from None
        for name, entry in tensors.items():
            if self._data + entry.data_offsets[1] > self._record.bytes:
                raise UserError(f"{self.path}: damaged: '{name}' is longer than the file")
        return tensors

    def close(self) -> None:
        self._file.close()
        self._block = None

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self) -> list[str]:
        return list(self._tensors)

    def _entry(self, name: str) -> _TensorRecord:
        if name not in self._tensors:
            raise UserError(f"{self.path}: damaged: it has no tensor '{name}'")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._entry(name).dtype]

    def numel(self, name: str) -> int:
        return self._entry(name).numel

    def check(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        """Check that a tensor exists, with this shape and one of these dtypes."""
        if self.shape(name) != shape or self.dtype(name) not in dtypes:
            known = " or ".join(map(str, dtypes))
            raise UserError(
                f"{self.path}: damaged: '{name}' is {self.dtype(name)} {list(self.shape(name))}, not {known} "
                f"{list(shape)}"
            )

    def verify(self, name: str, start: int, count: int) -> None:
        """Verify the digests of the blocks with scalars [start, start + count) of the flattened tensor."""
        for _ in self._views(*self._range(name, start, count)):
            pass

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
        begin, end = self._range(name, start, out.numel())
        dtype, at, rest = self.dtype(name), 0, b""
        for piece in self._views(begin, end):
            # A block may end within a scalar
            whole = bytearray(rest + piece) if rest or piece.nbytes % dtype.itemsize else piece
            length = len(whole) // dtype.itemsize * dtype.itemsize
            rest = bytes(whole[length:])
            if length:
                values = torch.frombuffer(whole[:length], dtype=dtype)
                out[at : at + values.numel()].copy_(values)
                at += values.numel()

    def _range(self, name: str, start: int, count: int) -> tuple[int, int]:
        """The bytes of the file with scalars [start, start + count) of a tensor."""
        entry, size = self._entry(name), self.dtype(name).itemsize
        if not 0 <= start <= start + count <= entry.numel:
            raise UserError(
                f"{self.path}: damaged: '{name}' has {entry.numel} scalars, but {start} to {start + count} are needed"
            )
        begin = self._data + entry.data_offsets[0] + start * size
        return begin, begin + count * size

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
    if not path.exists():
        raise UserError(f"{path}: missing")
    size = check_regular(path)
    if size != record.bytes:
        raise UserError(f"{path}: truncated or overwritten: it has {size} bytes, but {record.bytes} were written")


def check_digest(path: Path, record: FileRecord) -> None:
    """Check the size and the digest of a file, which is read whole. Raises UserError."""
    check_size(path, record)
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while piece := file.read(BLOCK_BYTES):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
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
