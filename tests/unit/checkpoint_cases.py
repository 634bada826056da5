"""Checkpoints whose files were changed by somebody who also writes the right sizes and checksums."""

import json
import shutil
from pathlib import Path
from typing import Any

import xxhash

from sparse_zero.checkpoint.shards import BLOCK_BYTES

MANIFEST = "manifest.json"


def record(content: bytes) -> dict[str, Any]:
    """A file's entry in the manifest."""
    blocks = [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]
    return {
        "bytes": len(content),
        "xxh3_128": xxhash.xxh3_128_hexdigest(content),
        "blocks": [xxhash.xxh3_64_hexdigest(block) for block in blocks],
        "block_bytes": BLOCK_BYTES,
    }


def signed(text: bytes) -> bytes:
    """A manifest without its checksum, with the right one. What is not a JSON object stays as it is."""
    try:
        body = json.loads(text)
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return text
    if not isinstance(body, dict) or not body:
        return text
    checksum = xxhash.xxh3_128_hexdigest(canonical)
    return text.replace(b"{", b'{"checksum": "%s", ' % checksum.encode(), 1)


class ChangedCheckpoint:
    """A copy of a checkpoint, of which single files are changed."""

    def __init__(self, original: Path, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        self.directory = Path(shutil.copytree(original, directory))
        self.manifest: dict[str, Any] = json.loads((original / MANIFEST).read_text())
        del self.manifest["checksum"]

    @property
    def shards(self) -> list[str]:
        return [shard["name"] for shard in self.manifest["shards"]]

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()

    def change(self, name: str, content: bytes) -> None:
        """Change a file other than the manifest, and its size and checksums in the manifest."""
        (self.directory / name).write_bytes(content)
        if name in self.manifest["files"]:
            self.manifest["files"][name] = record(content)
        else:
            self.manifest["shards"][self.shards.index(name)]["file"] = record(content)
        self.sign()

    def sign(self, text: bytes | None = None) -> Path:
        """Write a manifest with its checksum. Args: text: None for `self.manifest`."""
        text = json.dumps(self.manifest).encode() if text is None else text
        (self.directory / MANIFEST).write_bytes(signed(text))
        return self.directory
