"""Damage to files, as Hypothesis strategies: JSON, safetensors, and what else can stand in a file's place.

mutated_json(value)            the bytes of a JSON document with one to three mistakes
mutated_safetensors(content)   the bytes of a safetensors file with a mistake in its header, its tensors or its bytes
mutated_bytes(content)         the same bytes, cut, extended or with other bits
file_kinds                     a FIFO, a directory, a device, ... : `place(path, kind)` puts it there
"""

import copy
import json
import math
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

DEEP = 100_000
"""Levels of nesting, far beyond Python's limit of recursion."""

NUMBERS = ["0", "-1", "1", "2", "3", "255", "10000000", "2147483648", "9223372036854775807", "9223372036854775808"]
NUMBERS += ["-9223372036854775809", "1" + "0" * 400, "9" * 5000, "0.5", "1.0", "-0.0", "1e308", "1e999", "-1e-999"]
NUMBERS += ["NaN", "Infinity", "-Infinity"]
STRINGS = [
    "",
    " ",
    "0",
    "float32",
    "float33",
    "nn",
    "load",
    "stored",
    "bernoulli-v1",
    "../../../etc/passwd",
    "/dev/zero",
]
STRINGS += [
    "/dev/zero",
    "a\0b",
    "\ud800",
    "\x1b[31mred\x1b[0m\x07",
    "line\nbreak",
    "\u202egnp.exe",
    "'; rm -rf /",
    "x" * 100_000,
]
VALUES = ["null", "true", "false", "[]", "{}", "[[]]", '[{"a": 1}]', "[1, [2]]", '{"": null}', '{"0": "a", "00": "b"}']
LARGE = ["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" + ",".join("1" * 100_000) + "]", "[" * 3000]
JSON_TEXTS = [*NUMBERS, *map(json.dumps, STRINGS), *VALUES, *LARGE]
"""Texts in place of a value. Not all of them are JSON."""

json_texts = st.sampled_from(JSON_TEXTS)
names = st.sampled_from([*STRINGS, "name", "__metadata__", "trust_remote_code", "model.layers.10000000.weight"])


class _Document:
    """A JSON value in which any text can stand in place of a value or key."""

    def __init__(self, value: Any) -> None:
        self.root, self.texts = {"": copy.deepcopy(value)}, {}

    def text(self, written: str) -> str:
        """A string that `dumps` writes as this text."""
        placeholder = f"\u2603{len(self.texts)}\u2603"
        self.texts[json.dumps(placeholder)] = written
        return placeholder

    def dumps(self) -> str:
        written = json.dumps(self.root[""])
        for placeholder, text in self.texts.items():
            written = written.replace(placeholder, text)
        return written


@st.composite
def _place_in(draw: Any, root: dict) -> tuple[Any, Any]:
    """A container and a key or index of it. Small containers are as likely as large ones."""
    container, key = root, ""
    while isinstance(container[key], dict | list) and container[key] and draw(st.integers(0, 19)) > 0:
        container = container[key]
        key = draw(st.sampled_from([*container] if isinstance(container, dict) else range(len(container))))
    return container, key


def _values_near(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [value + "x", value[:-1], value.upper(), [value], value + "\0", value * 2]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [[value], {"a": value}, str(value)]
    return [value + 1, value - 1, -value, value * 10**7, float(value), str(value), [value], bool(value), value + 0.5]


KINDS = ["replace", "replace", "near", "near", "delete", "twice", "rename", "add", "move", "repeat"]


@st.composite
def mutated_json(draw: Any, value: Any, most: int = 3) -> bytes:
    """The bytes of a JSON document that is `value` with one to `most` mistakes."""
    document = _Document(value)
    for _ in range(draw(st.integers(1, most))):
        container, key = draw(_place_in(document.root))
        kind = draw(st.sampled_from(KINDS))
        if kind == "near":
            container[key] = draw(st.sampled_from(_values_near(container[key])))
        elif kind == "delete" and container is not document.root:
            del container[key]
        elif kind == "twice" and isinstance(container, dict) and container is not document.root:
            container[document.text(json.dumps(key))] = document.text(draw(json_texts))
        elif kind == "rename" and isinstance(container, dict) and container is not document.root:
            container[draw(names)] = container.pop(key)
        elif kind == "add" and isinstance(container[key], dict):
            container[key][draw(names)] = document.text(draw(json_texts))
        elif kind == "move":
            other, place = draw(_place_in(document.root))
            container[key] = copy.deepcopy(other[place])
        elif kind == "repeat" and isinstance(container[key], list) and len(container[key]) < 1000:
            container[key] = container[key] * draw(st.sampled_from([2, 1000]))
        else:
            container[key] = document.text(draw(json_texts))
    written = document.dumps().encode("utf-8", "surrogatepass")
    return draw(mutated_bytes(written)) if draw(st.integers(0, 19)) == 0 else written


@st.composite
def mutated_bytes(draw: Any, content: bytes) -> bytes:
    """The same bytes, cut, extended or with other bits."""
    kind = draw(st.sampled_from(["cut", "extended", "flipped", "filled", "byte order mark", "utf-16", "empty"]))
    at, bit = draw(st.integers(0, max(0, len(content) - 1))), draw(st.integers(0, 7))
    if kind == "cut":
        return content[:at]
    if kind == "extended":
        return content + draw(st.sampled_from([b"\0", b"}", b"{}", content[:100], b"\xff" * 5000]))
    if kind == "flipped":
        changed = content[at : at + 1].translate(bytes(byte ^ (1 << bit) for byte in range(256)))
        return content[:at] + changed + content[at + 1 :]
    if kind == "filled":
        return content[:at] + draw(st.sampled_from([b"\0", b"\xff", b"\x7f\x80"])) * 8 + content[at + 8 :]
    if kind == "byte order mark":
        return b"\xef\xbb\xbf" + content
    return content.decode("utf-8", "replace").encode("utf-16", "replace") if kind == "utf-16" else b""


Tensors = dict[str, tuple[str, list[int], bytes]]
"""The tensors of a safetensors file: dtype, shape and bytes by name."""

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "BOOL": 1}
DTYPES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
PATTERNS = [b"\0", b"\1", b"\xff", b"\x7f", b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\x80\x7f", b"\0\x7c"]
"""Zeros, ones, negative and large integers; infinities and NaN of float32, bfloat16 and float16."""


def split(content: bytes) -> tuple[dict[str, Any], Tensors]:
    """The metadata and the tensors of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__", None)
    tensors = {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }
    return metadata, tensors


def join(metadata: dict[str, Any] | None, tensors: Tensors) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return header, data


def framed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file. Args: length: of the header, if the file has a wrong one."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


@st.composite
def mutated_safetensors(draw: Any, content: bytes) -> bytes:
    """The bytes of a safetensors file with a mistake in its header, its tensors or its bytes."""
    metadata, tensors = split(content)
    kind = draw(st.sampled_from([*["tensor"] * 6, *["header"] * 3, "length", "metadata", "bytes"]))
    if kind == "bytes":
        return draw(mutated_bytes(content))
    if kind == "metadata":
        metadata = draw(st.sampled_from([None, {}, {"format": "tf"}, {"format": "np"}]))
    if kind == "tensor":
        tensors = draw(_mutated_tensors(tensors))
    header, data = join(metadata, tensors)
    if kind == "header":
        return framed(draw(mutated_json(header)), data)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = draw(st.sampled_from([0, 1, len(text) - 1, len(text) + 1, 2**20, 2**40, 2**63, 2**64 - 1]))
    return framed(text, data, length if kind == "length" else None)


@st.composite
def _mutated_tensors(draw: Any, tensors: Tensors) -> Tensors:
    """Tensors of which one is missing, has another name, dtype, shape or other values; the file is valid."""
    tensors = dict(tensors)
    if not tensors:
        return tensors
    name = draw(st.sampled_from([*tensors]))
    dtype, shape, content = tensors.pop(name)
    kind = draw(st.sampled_from(["delete", "rename", "dtype", "values", "shape", "longer", "empty", "other"]))
    if kind == "delete":
        return tensors
    if kind == "rename":
        name = draw(names)
    elif kind == "dtype":
        dtype = draw(st.sampled_from([*DTYPES]))
        content = draw(_filled(math.prod(shape) * DTYPES[dtype]))
    elif kind == "values":
        start = draw(st.integers(0, len(content)))
        content = content[:start] + draw(_filled(len(content) - start))
    elif kind == "shape":
        scalars = math.prod(shape)
        shape = draw(st.sampled_from([[1, scalars], [scalars, 1], [1, *shape], [*shape, 1], [scalars], shape[::-1]]))
    elif kind == "longer":
        extra = draw(st.sampled_from([1, 7]))
        row = len(content) // shape[0] if shape and shape[0] else 0
        shape, content = ([shape[0] + extra, *shape[1:]], content + content[:row] * extra) if row else (shape, content)
    elif kind == "empty":
        shape, content = [0, *shape[1:]], b""
    elif tensors:
        dtype, shape, content = tensors[draw(st.sampled_from([*tensors]))]
    return {**tensors, name: (dtype, shape, content)}


@st.composite
def _filled(draw: Any, size: int) -> bytes:
    pattern = draw(st.sampled_from(PATTERNS))
    return (pattern * (size // len(pattern) + 1))[:size]


FILE_KINDS = ["absent", "empty", "directory", "fifo", "socket", "loop", "dangling", "zeros", "null", "huge", "text"]
file_kinds = st.sampled_from(FILE_KINDS)


def place(path: Path, kind: str) -> None:
    """Replace a file by something else of the kinds of FILE_KINDS."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        _bind(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.with_name("nothing"))
    elif kind in ("zeros", "null"):
        path.symlink_to({"zeros": "/dev/zero", "null": "/dev/null"}[kind])
    elif kind == "huge":
        # A terabyte of zeros that takes no space
        with path.open("wb") as file:
            file.truncate(2**40)
    elif kind == "text":
        path.write_text("not what is expected\n" * 100)


def _bind(path: Path) -> None:
    # A socket's path has at most 107 bytes; the working directory is not changed for long
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)
