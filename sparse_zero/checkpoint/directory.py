"""The checkpoint directory: complete or absent.

checkpoint-100/
    shard-00000-of-00004.safetensors    one for each rank: its scalars' float32 values and moments, its random states
    trainer_state.json                  transformers' own: steps, log, best metric, states of callbacks
    fixed.safetensors                   where positions cannot be drawn again: what training does not change
    manifest.json                       written last: every file with its size and checksum, and what all ranks share

It is written as checkpoint-100.tmp-RUN, flushed, and renamed when all of it is there. Whatever has another name than
checkpoint-N is no checkpoint; which one is the newest is a matter of its number, never of a clock.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from sparse_zero.checkpoint.shards import FileRecord, check_digest, check_file, flush_directory, write_bytes
from sparse_zero.errors import UserError
from sparse_zero.zero.resharding import Span

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
FIXED_NAME = "fixed.safetensors"
FORMAT_VERSION = 1

_NAME = re.compile(r"checkpoint-(\d+)(\.replaced)?")
_ASIDE = re.compile(r"checkpoint-\d+\.(tmp|deleted)-\w+")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ParameterRecord(_Record):
    name: str
    """As in the adapter: the base model's own name."""
    shape: list[int]
    """(n,) of a selected weight's values; the whole shape of a parameter that is trained whole."""
    dtype: str
    """What the adapter holds it in; the shards are float32."""
    steps: int
    """Optimizer steps that it has had."""


class ShardRecord(_Record):
    name: str
    file: FileRecord
    spans: list[Span]
    """What it holds of the vector of all parameters, in the manifest's order."""
    running_loss: float
    """This rank's losses since the last line of the log."""


class Progress(_Record):
    """Where the Trainer stood, beyond what trainer_state.json says."""

    last_logged_step: int
    finished: bool = False
    """Training had been stopped for good, by a callback."""
    epoch_ended: bool = False
    """The epoch's end had been seen to, in a checkpoint at the last step of an epoch."""
    postponed_evaluation: bool = False
    postponed_save: bool = False
    """What the step still owed when a signal came."""
    forwards: int = 0
    """Training forwards so far; they seed what is random per forward."""


class Manifest(_Record):
    format_version: int = FORMAT_VERSION
    run: str
    """Drawn when a run is started, and kept when it goes on."""
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
    """DeepSpeed's own counters."""
    loss_scale: dict[str, Any] | None
    progress: Progress
    adapter: dict[str, Any]
    """What adapter_config.json says of this model."""
    shards: list[ShardRecord]
    files: dict[str, FileRecord]

    def sizes(self) -> dict[str, int]:
        """Scalars of each parameter, in the order of the vector."""
        sizes = {}
        for parameter in self.parameters:
            count = 1
            for extent in parameter.shape:
                count *= extent
            sizes[parameter.name] = count
        return sizes


class Checkpoint:
    """A complete checkpoint on disk."""

    def __init__(self, directory: str | Path) -> None:
        """Raises UserError, which names the file: no manifest, or one that is damaged; a file that is not there or not
        as long as it was written. What the shards hold is checked as it is read.
        """
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        for shard in self.manifest.shards:
            check_file(self.directory / shard.name, shard.file)
        for name, record in self.manifest.files.items():
            check_digest(self.directory / name, record)

    @property
    def step(self) -> int:
        return self.manifest.step


def write_manifest(directory: Path, manifest: Manifest) -> None:
    body = manifest.model_dump()  # in pydantic's JSON mode an infinite number would become null
    text = json.dumps({"checksum": _checksum(body), **body}, indent=1)
    write_bytes(directory / MANIFEST_NAME, [text.encode()])


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise UserError(f"{directory}: no such checkpoint")
    try:
        body = json.loads(path.read_bytes())
        checksum = body.pop("checksum")
        if isinstance(body.get("format_version"), int) and body["format_version"] > FORMAT_VERSION:
            raise UserError(f"{path}: format {body['format_version']} is newer than this version reads")
        if checksum != _checksum(body):
            raise UserError(f"{path}: damaged: its checksum is not what was written")
        return Manifest.model_validate(body)
    except FileNotFoundError:
        raise UserError(f"{directory}: not a complete checkpoint ({MANIFEST_NAME} is not there)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())[:200]})") from None


def checkpoint_directory(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def aside(directory: Path, run: str) -> Path:
    """Where a checkpoint is written before it is complete."""
    return directory.with_name(f"{directory.name}.tmp-{run}")


def publish(written: Path, directory: Path) -> None:
    """Make a checkpoint visible under its name, in one step. One of that name is replaced. Raises OSError."""
    flush_directory(written)
    replaced = directory.with_name(f"{directory.name}.replaced")
    if directory.exists():
        # Between the two renames the old one is still found, as checkpoint-N.replaced.
        shutil.rmtree(replaced, ignore_errors=True)
        directory.rename(replaced)
    written.rename(directory)
    flush_directory(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def numbered(output: Path) -> list[Path]:
    """Directories that are named like checkpoints, complete or not, oldest step first."""
    if not output.is_dir():
        return []
    found = [(match, path) for path in output.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    # The replaced one comes first: whoever wants the newest takes the last.
    return [path for _, path in sorted(found, key=lambda entry: (int(entry[0][1]), entry[0][2] is None))]


def newest_complete(output: Path) -> tuple[Checkpoint | None, list[str]]:
    """Returns: the newest complete checkpoint of a run's output directory, and why newer ones were passed over."""
    problems = []
    for path in reversed(numbered(output)):
        try:
            return Checkpoint(path), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def clean(output: Path) -> None:
    """Remove what interrupted saves and deletions have left. Only the run that holds the directory may call it."""
    if not output.is_dir():
        return
    for path in output.iterdir():
        if _ASIDE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif (match := _NAME.fullmatch(path.name)) and match[2]:
            final = path.with_name(f"checkpoint-{match[1]}")
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(final)


def _is_complete(path: Path) -> bool:
    try:
        Checkpoint(path)
    except UserError:
        return False
    return True


def delete_old(output: Path, keep: int | None, best: str | None) -> None:
    """Keep the newest `keep` complete checkpoints, and the best. The newest complete one is never deleted."""
    if keep is None or keep <= 0:
        return
    complete = [path for path in numbered(output) if _is_complete(path)]
    protected = {path.name for path in complete[-1:]} | ({Path(best).name} if best else set())
    surplus = len(complete) - max(keep, len(protected))
    for path in [path for path in complete if path.name not in protected][: max(0, surplus)]:
        doomed = path.with_name(f"{path.name}.deleted-{xxhash.xxh3_64_hexdigest(path.name.encode())}")
        try:
            # Renamed first: a deletion that is interrupted must not leave half a checkpoint.
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("%s: cannot be deleted (%s)", path, error.strerror)
