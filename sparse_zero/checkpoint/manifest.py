"""The manifest of a checkpoint: the facts that all ranks share, and every other file with its size and checksum.

Whoever can write a manifest can also write its checksum, so every field has a type and a range, and the fields are
compared with each other and with the sizes of the files: no reader does more work than the files' sizes justify.
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparse_zero.adapters.reading import read_json
from sparse_zero.adapters.schema import Count, DtypeName, reason_of
from sparse_zero.checkpoint.listing import MANIFEST_NAME
from sparse_zero.checkpoint.shards import FileRecord, write_bytes
from sparse_zero.errors import UserError
from sparse_zero.zero.partitions import VALUE

FORMAT_VERSION = 1

Step = Annotated[int, Field(ge=0, lt=10**8)]
Name = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$")]
_SCALAR_BYTES = 4
"""Values and moments are float32."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ParameterRecord(_Record):
    """A trained parameter."""

    name: Name
    """The parameter's name in the base model, as in the adapter."""
    shape: list[Count] = Field(max_length=8)
    """(n,) for the n selected values of a weight; the full shape of a parameter that is trained in full."""
    dtype: DtypeName
    """The dtype of the values in the adapter. The shards are float32."""
    steps: Step
    """The number of optimizer steps so far."""


class ShardRecord(_Record):
    """The file of one rank."""

    name: str
    """`shard_name(rank, ranks)`"""
    file: FileRecord
    spans: list[tuple[Count, Count]]
    """The spans of the vector of all parameters, in the manifest's order, that the shard contains."""
    running_loss: float
    """The sum of this rank's losses since the last line of the log."""


class Progress(_Record):
    """The state of the Trainer's loop that trainer_state.json does not contain."""

    last_logged_step: Step
    finished: bool = False
    """A callback has stopped the training for good."""
    epoch_ended: bool = False
    """The checkpoint is of the last step of an epoch, and the callbacks have already handled the epoch's end."""
    postponed_evaluation: bool = False
    postponed_save: bool = False
    """What remained to be done in this step when a signal arrived."""
    forwards: Count = 0
    """Training forward passes so far. They seed what is random in each forward pass."""
    train_seconds: float = Field(0, ge=0, allow_inf_nan=False)
    """Seconds of training so far, without evaluations."""
    train_tokens: Count = 0
    """Tokens of all ranks so far, including padding."""


class Manifest(_Record):
    """The content of manifest.json, without its checksum."""

    format_version: int = Field(FORMAT_VERSION, ge=1, le=FORMAT_VERSION)
    run: str = Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")
    """A random ID of the run. A resumed run keeps it, and names directories with it."""
    step: Step
    world_size: int = Field(ge=1, lt=2**31)
    zero_stage: int = Field(ge=0, le=3)
    examples_per_step: int = Field(ge=1, lt=2**31)
    parameters: list[ParameterRecord]
    moments: list[Name] = Field(max_length=100)
    optimizer: Name
    learning_rates: list[Annotated[float, Field(allow_inf_nan=False)]]
    scheduler: dict[str, Any] | None
    engine: dict[Literal["global_steps", "global_samples", "micro_steps", "skipped_steps"], Count]
    """DeepSpeed's counters."""
    loss_scale: dict[str, Any] | None
    progress: Progress
    adapter: dict[str, Any]
    """The content of adapter_config.json for this model."""
    shards: list[ShardRecord]
    files: dict[Literal["trainer_state.json", "fixed.safetensors", "settings.json"], FileRecord]

    def sizes(self) -> dict[str, int]:
        """The number of scalars of each parameter, in the order of the vector of all parameters."""
        return {parameter.name: math.prod(parameter.shape) for parameter in self.parameters}


def shard_name(rank: int, ranks: int) -> str:
    """The name of a rank's file."""
    return f"shard-{rank:05d}-of-{ranks:05d}.safetensors"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write a manifest with its checksum, and flush it to the disk. Raises OSError."""
    body = manifest.model_dump()  # pydantic's JSON mode would write an infinite number as null
    text = json.dumps({"checksum": _checksum(body), **body}, indent=1)
    write_bytes(directory / MANIFEST_NAME, [text.encode()])


def read_manifest(directory: Path) -> Manifest:
    """Read and verify the manifest of a checkpoint directory.

    Raises UserError: there is no such directory or no manifest, or the manifest is damaged or of a newer format.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise UserError(f"{directory}: no such checkpoint")
    if not path.exists():
        raise UserError(f"{directory}: not a complete checkpoint ({MANIFEST_NAME} is missing)")
    body = read_json(path)
    version = body.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise UserError(
            f"{path}: has format {version}; this version of sparse-zero reads formats up to {FORMAT_VERSION}"
        )
    if body.pop("checksum", None) != _checksum(body):
        raise UserError(f"{path}: damaged: the checksum does not match")
    try:
        manifest = Manifest.model_validate_json(json.dumps(body), strict=True)
    except ValidationError as error:
        raise UserError(f"{path}: damaged ({reason_of(error)})") from None
    if problem := _contradiction(manifest):
        raise UserError(f"{path}: damaged ({problem})")
    return manifest


def _contradiction(manifest: Manifest) -> str | None:
    """What in a manifest, whose fields are right by themselves, contradicts another field."""
    sizes, ranks = manifest.sizes(), manifest.world_size
    total = sum(sizes.values())
    if len(sizes) < len(manifest.parameters):
        return "two parameters have the same name"
    if not total or total >= 2**62:
        return f"{total} trained scalars"
    if len(manifest.shards) != ranks:
        return f"{len(manifest.shards)} shards of {ranks} ranks"
    if {*manifest.moments} >= {VALUE} or len({*manifest.moments}) < len(manifest.moments):
        return "two moments have the same name"
    # DeepSpeed's optimizers for bfloat16 count a first step without gradients, which makes their states
    if max(parameter.steps for parameter in manifest.parameters) > manifest.step + 1:
        return f"a parameter has more optimizer steps than the {manifest.step} of the run"
    if "trainer_state.json" not in manifest.files:
        return "trainer_state.json is not among the files"
    for rank, shard in enumerate(manifest.shards):
        if shard.name != shard_name(rank, ranks):
            return f"the shard of rank {rank} is called {shard.name}"
        if any(start > end for start, end in shard.spans):
            return f"{shard.name} has a span that ends before it begins"
        count = sum(end - start for start, end in shard.spans)
        if count * (1 + len(manifest.moments)) * _SCALAR_BYTES > shard.file.bytes:
            return f"{shard.name} is too small for {count} scalars and their moments"
    spans = sorted((start, end) for shard in manifest.shards for start, end in shard.spans if start < end)
    if any(a[1] != b[0] for a, b in pairwise(spans)):
        return "the shards overlap or leave gaps"
    if not spans or (spans[0][0], spans[-1][1]) != (0, total):
        return f"the shards do not contain all {total} scalars"
    return None


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
