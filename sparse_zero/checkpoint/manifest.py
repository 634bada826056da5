"""The manifest of a checkpoint: the facts that all ranks share, and every other file with its size and checksum."""

import json
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from sparse_zero.checkpoint.shards import FileRecord, write_bytes
from sparse_zero.errors import UserError
from sparse_zero.zero.resharding import Span

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ParameterRecord(_Record):
    """A trained parameter."""

    name: str
    """The parameter's name in the base model, as in the adapter."""
    shape: list[int]
    """(n,) for the n selected values of a weight; the full shape of a parameter that is trained in full."""
    dtype: str
    """The dtype of the values in the adapter. The shards are float32."""
    steps: int
    """The number of optimizer steps so far."""


class ShardRecord(_Record):
    """The file of one rank."""

    name: str
    file: FileRecord
    spans: list[Span]
    """The spans of the vector of all parameters, in the manifest's order, that the shard contains."""
    running_loss: float
    """The sum of this rank's losses since the last line of the log."""


class Progress(_Record):
    """The state of the Trainer's loop that trainer_state.json does not contain."""

    last_logged_step: int
    finished: bool = False
    """A callback has stopped the training for good."""
    epoch_ended: bool = False
    """The checkpoint is of the last step of an epoch, and the callbacks have already handled the epoch's end."""
    postponed_evaluation: bool = False
    postponed_save: bool = False
    """What remained to be done in this step when a signal arrived."""
    forwards: int = 0
    """Training forward passes so far. They seed what is random in each forward pass."""


class Manifest(_Record):
    """The content of manifest.json, without its checksum."""

    format_version: int = FORMAT_VERSION
    run: str
    """A random ID of the run. A resumed run keeps it."""
    step: int
    world_size: int
    zero_stage: int
    examples_per_step: int
    parameters: list[ParameterRecord]
    moments: list[str]
    optimizer: str
    learning_rates: list[float]
    scheduler: dict[str, Any] | None
    engine: dict[str, int]
    """DeepSpeed's counters."""
    loss_scale: dict[str, Any] | None
    progress: Progress
    adapter: dict[str, Any]
    """The content of adapter_config.json for this model."""
    shards: list[ShardRecord]
    files: dict[str, FileRecord]

    def sizes(self) -> dict[str, int]:
        """The number of scalars of each parameter, in the order of the vector of all parameters."""
        sizes = {}
        for parameter in self.parameters:
            count = 1
            for extent in parameter.shape:
                count *= extent
            sizes[parameter.name] = count
        return sizes


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
    try:
        body = json.loads(path.read_bytes())
        checksum = body.pop("checksum")
        if isinstance(body.get("format_version"), int) and body["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{path}: has format {body['format_version']}; this version of sparse-zero reads formats up to "
                f"{FORMAT_VERSION}"
            )
        if checksum != _checksum(body):
            raise UserError(f"{path}: damaged: the checksum does not match")
        return Manifest.model_validate(body)
    except FileNotFoundError:
        raise UserError(f"{directory}: not a complete checkpoint ({MANIFEST_NAME} is missing)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())[:200]})") from None


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
