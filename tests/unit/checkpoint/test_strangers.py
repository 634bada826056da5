"""Checkpoints of somebody who also writes the right sizes and checksums: each is refused with one sentence."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import ChangedCheckpoint
from families import tiny
from safetensors.torch import load_file, save, save_file

from sparse_zero import SparseConfig, SparseTrainer, sparsify
from sparse_zero.checkpoint.directory import Checkpoint
from sparse_zero.checkpoint.export import export
from sparse_zero.checkpoint.saved_state import fitted
from sparse_zero.errors import UserError
from sparse_zero.recipe.training import TrainingArguments

OLDER = Path(__file__).parents[2] / "fixtures" / "v0.1" / "checkpoint-3"
STEP = 2


@pytest.fixture
def changed(tmp_path: Path) -> ChangedCheckpoint:
    return ChangedCheckpoint(OLDER, tmp_path / "run" / "checkpoint-3")


def test_what_is_signed_again_is_opened(changed: ChangedCheckpoint, tmp_path: Path) -> None:
    """Otherwise every change below would be refused for its checksum."""
    for name in (*changed.shards, *changed.manifest["files"]):
        changed.change(name, changed.read(name))
    export(changed.directory, tmp_path / "adapter")


def put(*path: Any) -> Callable[[dict], None]:
    """Sets a value in the manifest. Args: path: the keys, and the value."""

    def change(manifest: dict) -> None:
        *keys, last, value = path
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return change


MANIFESTS = {
    "format -1": (put("format_version", -1), "format_version: "),
    "format 0": (put("format_version", 0), "format_version: "),
    "format true": (put("format_version", True), "format_version: "),
    "format 1.0": (put("format_version", 1.0), "format_version: "),
    "newer": (put("format_version", 2), "has format 2; this version of sparse-zero reads formats up to 1"),
    "a path as the run": (put("run", "../../x"), "run: "),
    "a path as a shard": (put("shards", 0, "name", "../../shard"), "the shard of rank 0 is called ../../shard"),
    "a path as a file": (put("files", "../../x", OLDER.name), "files"),
    "escape codes": (put("parameters", 0, "name", "\x1b[31m"), "parameters.0.name: "),
    "ranks 0": (put("world_size", 0), "world_size: "),
    "ranks 3": (put("world_size", 3), "2 shards of 3 ranks"),
    "no shards": (put("shards", []), "0 shards of 2 ranks"),
    "steps 10^18": (put("parameters", 0, "steps", 10**18), "parameters.0.steps: "),
    "steps after the last": (put("parameters", 0, "steps", 5), "more optimizer steps than the 3 of the run"),
    "step NaN": (put("step", float("nan")), "step: "),
    "dtype": (put("parameters", 0, "dtype", "nn"), "parameters.0.dtype: "),
    "negative shape": (put("parameters", 0, "shape", [-43]), "parameters.0.shape.0: "),
    "huge shape": (put("parameters", 0, "shape", [10**9, 10**9]), "do not contain all"),
    "two names": (put("parameters", 0, "name", "model.norm.weight"), "two parameters have the same name"),
    "a gap": (put("shards", 0, "spans", [[0, 66], [131, 162], [194, 202]]), "overlap or leave gaps"),
    "an overlap": (put("shards", 0, "spans", [[0, 67], [130, 162], [194, 202]]), "overlap or leave gaps"),
    "a span backwards": (put("shards", 0, "spans", [[66, 0], [130, 162]]), "ends before it begins"),
    "a span of 10^18": (put("shards", 0, "spans", [[0, 10**18]]), "is too small for"),
    "block_bytes 0": (put("shards", 0, "file", "block_bytes", 0), "shards.0.file.block_bytes: "),
    "block_bytes 10^18": (put("shards", 0, "file", "block_bytes", 10**18), "shards.0.file.block_bytes: "),
    "block_bytes 1": (put("shards", 0, "file", "block_bytes", 1), "1 blocks of 1 bytes"),
    "no blocks": (put("shards", 0, "file", "blocks", []), "0 blocks of"),
    "a moment twice": (put("moments", ["exp_avg", "exp_avg"]), "two moments"),
    "the value as a moment": (put("moments", ["exp_avg", "value"]), "two moments"),
    "an attribute of the engine": (put("engine", "train", 1), "engine"),
    "no state": (lambda manifest: manifest["files"].pop("trainer_state.json"), "trainer_state.json is not among"),
    "an unknown key": (put("lr", 1), "lr: "),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(changed: ChangedCheckpoint, name: str) -> None:
    change, words = MANIFESTS[name]
    change(changed.manifest)
    with pytest.raises(UserError, match=words) as raised:
        Checkpoint(changed.sign())
    assert str(raised.value).startswith(f"{changed.directory / 'manifest.json'}: ")
    assert "\n" not in str(raised.value)


TEXTS = {
    "deep": (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested"),
    "a list": (b"[1, 2]", "not a JSON object"),
    "empty": (b"", "damaged"),
    "digits": (b'{"step": ' + b"9" * 5000 + b"}", "damaged"),
    "null characters": (b'{"run": "a\\u0000b"}', "null character"),
    "half a character": (b'{"run": "\\ud800"}', "damaged"),
    "a key twice": (b'{"run": "a", "run": "b"}', "the key 'run' occurs twice"),
    "no JSON": (b"\0" * 100, "damaged"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_a_manifest(changed: ChangedCheckpoint, name: str) -> None:
    text, words = TEXTS[name]
    with pytest.raises(UserError, match=words):
        Checkpoint(changed.sign(text))


@pytest.mark.parametrize("file", ["manifest.json", "shard-00000-of-00002.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_no_other_than_regular_files_are_opened(changed: ChangedCheckpoint, file: str, kind: str) -> None:
    """A FIFO would hang."""
    path = changed.directory / file
    path.unlink()
    make = {"fifo": os.mkfifo, "directory": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}
    make[kind](path)
    with pytest.raises(UserError, match=f"{file}: is not a file but a directory, pipe or device"):
        Checkpoint(changed.directory)


def framed(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensors_of(changed: ChangedCheckpoint, name: str) -> dict[str, torch.Tensor]:
    return load_file(changed.directory / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"value": t["value"].double()}, "'value' is torch.float64"),
        (lambda t: t | {"value": t["value"].int()}, "'value' is torch.int32"),
        (lambda t: t | {"value": t["value"] > 0}, "'value' is torch.bool"),
        (lambda t: t | {"value": t["value"].to(torch.complex64)}, "header"),
        (lambda t: t | {"value": t["value"][None]}, r"'value' is torch.float32 \[1, 106\]"),
        (lambda t: t | {"value": t["value"][1:]}, r"'value' is torch.float32 \[105\]"),
        (lambda t: {name: value for name, value in t.items() if name != "value"}, "has no tensor 'value'"),
    ],
)
def test_values_of_another_kind(changed: ChangedCheckpoint, tmp_path: Path, change: Callable, words: str) -> None:
    name = changed.shards[0]
    changed.change(name, save(change(tensors_of(changed, name))) + bytes(10**4))
    with pytest.raises(UserError, match=f"{name}: damaged.*{words}"):
        export(changed.directory, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "content",
    [
        framed(b"[" * 10**5),
        framed({"value": 1}),
        framed({"value": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}),
        framed({"value": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        framed({"value": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        framed({"value": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
        framed({"value": {"dtype": "F32", "shape": [106], "data_offsets": [10**9, 10**9 + 424]}}),
        struct.pack("<Q", 2**63) + bytes(100),
        b"abc",
    ],
)
def test_headers_of_a_shard(changed: ChangedCheckpoint, tmp_path: Path, content: bytes) -> None:
    name = changed.shards[0]
    changed.change(name, content + bytes(10**4) if len(content) > 3 else content)
    with pytest.raises(UserError, match=rf"{name}|is too small"):
        export(changed.directory, tmp_path / "adapter")


def test_a_header_without_metadata_is_read(changed: ChangedCheckpoint, tmp_path: Path) -> None:
    export(changed.directory, tmp_path / "expected")
    for name in changed.shards:
        changed.change(name, save(tensors_of(changed, name)))
    export(changed.directory, tmp_path / "adapter")
    expected, found = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("expected", "adapter"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_values_that_are_not_finite_are_exported_with_a_warning(changed, tmp_path, caplog) -> None:
    """A training that diverged can be looked at; `merge` refuses it."""
    name = changed.shards[0]
    tensors = tensors_of(changed, name)
    tensors["value"][3] = float("nan")
    changed.change(name, save(tensors))
    export(changed.directory, tmp_path / "adapter")
    assert "exported values that are NaN or infinite: model.layers.0.self_attn.v_proj.weight (1 value)" in caplog.text


@pytest.mark.parametrize("change", [lambda p: p.flip(0), lambda p: p + 1, lambda p: p.float(), lambda p: p[None]])
def test_stored_positions(changed: ChangedCheckpoint, tmp_path: Path, change: Callable) -> None:
    tensors = tensors_of(changed, "fixed.safetensors")
    name = next(name for name in tensors if name.startswith("positions."))
    changed.change("fixed.safetensors", save(tensors | {name: change(tensors[name]).contiguous()}))
    with pytest.raises(UserError, match=r"position"):
        export(changed.directory, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("granularity", 0), "granularity"),
        (("count", 44), "43|count"),
        (("rule", "bernoulli-v1"), "bernoulli"),
    ],
)
def test_descriptions_of_the_adapter(changed: ChangedCheckpoint, tmp_path: Path, path: tuple, words: str) -> None:
    put("adapter", "tensors", "model.layers.0.self_attn.v_proj.weight", *path)(changed.manifest)
    with pytest.raises(UserError, match=words):
        export(changed.sign(), tmp_path / "adapter")


# Resuming


def trainer(out: Path, **settings: Any) -> SparseTrainer:
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "save_steps": STEP}
    arguments = TrainingArguments(str(out), **quiet, max_steps=STEP, logging_steps=1, **settings)
    torch.manual_seed(0)
    rows = [{"input_ids": list(range(n, n + 6)), "labels": list(range(n, n + 6))} for n in range(4)]
    return SparseTrainer(sparsify(tiny("llama"), SparseConfig(density=0.02)), arguments, train_dataset=rows)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved")
    trainer(out).train()
    return out / f"checkpoint-{STEP}"


def change_state(*path: Any) -> Callable[[ChangedCheckpoint], None]:
    def change(changed: ChangedCheckpoint) -> None:
        state = json.loads(changed.read("trainer_state.json"))
        put(*path)(state)
        changed.change("trainer_state.json", json.dumps(state).encode())

    return change


def change_manifest(*path: Any) -> Callable[[ChangedCheckpoint], None]:
    def change(changed: ChangedCheckpoint) -> None:
        put(*path)(changed.manifest)
        changed.sign()

    return change


def change_random_state(name: str, value: torch.Tensor) -> Callable[[ChangedCheckpoint], None]:
    def change(changed: ChangedCheckpoint) -> None:
        (shard,) = changed.shards
        changed.change(shard, save(tensors_of(changed, shard) | {f"random.{name}": value}))

    return change


def flip_last_moment(changed: ChangedCheckpoint) -> None:
    """A broken disk: found while the last of all tensors is read."""
    path = changed.directory / changed.shards[0]
    tensors = tensors_of(changed, path.name)
    tensors["exp_avg_sq"][-1] += 1
    save_file(tensors, path)


RESUMES = {
    "a method of the scheduler": (change_manifest("scheduler", "step", 5), None),
    "the scheduler's kind": (change_manifest("scheduler", "last_epoch", "x"), "scheduler.last_epoch"),
    "the scheduler's length": (change_manifest("scheduler", "base_lrs", []), "scheduler.base_lrs"),
    "no first moment": (change_manifest("moments", ["exp_avg_sq"]), "moments"),
    "another moment": (change_manifest("moments", ["exp_avg", "exp_sq"]), "moments"),
    "the adapter": (change_manifest("adapter", "modules_to_save", 5), "adapter: modules_to_save"),
    "the fingerprint": (change_manifest("adapter", "base_fingerprint", []), "adapter: base_fingerprint"),
    "another step": (change_state("global_step", 1), "is of step 1, but the checkpoint of step 2"),
    "no epoch": (change_state("epoch", None), "epoch"),
    "an infinite epoch": (change_state("epoch", float("inf")), "epoch"),
    "another field": (change_state("learning_rate", 1), "which this version of transformers does not have"),
    "a log of texts": (change_state("log_history", [{"step": 1, "loss": "x"}]), "log_history.0.loss"),
    "callbacks": (change_state("stateful_callbacks", {"TrainerControl": 5}), "stateful_callbacks"),
    "a generator of 3 bytes": (change_random_state("python", torch.ones(3, dtype=torch.uint8)), "random generator"),
    "a generator of numbers": (change_random_state("torch", torch.ones(5056)), "random generator"),
    "numpy's position": (
        change_random_state("numpy", torch.full((2520,), 255, dtype=torch.uint8)),
        "random generator",
    ),
    "a broken disk": (flip_last_moment, "size|damaged|truncated"),
}


@pytest.mark.parametrize("name", RESUMES)
def test_what_is_refused_has_changed_nothing(saved: Path, tmp_path: Path, name: str) -> None:
    change, words = RESUMES[name]
    changed = ChangedCheckpoint(saved, tmp_path / "run" / saved.name)
    change(changed)
    resumed = trainer(tmp_path / "run")
    optimizer, scheduler = resumed.create_optimizer(), resumed.create_scheduler(STEP)
    before = {name: value.clone() for name, value in resumed.model.state_dict().items()}
    if words is None:
        resumed.train(resume_from_checkpoint=str(changed.directory))
        assert callable(resumed.lr_scheduler.step)
        return
    with pytest.raises(UserError, match=words):
        resumed.train(resume_from_checkpoint=str(changed.directory))
    assert all(torch.equal(value, before[name]) for name, value in resumed.model.state_dict().items())
    assert not optimizer.state
    assert scheduler.last_epoch == 0


def test_a_state_keeps_its_structure() -> None:
    own = {"best": float("inf"), "count": 0, "rates": [0.1, 0.2], "mode": "min", "unknown": None, "on": False}
    saved = {"best": 0.5, "count": 3, "rates": [1, 0.0], "unknown": [1], "method": 1}
    assert fitted(saved, own, "s") == own | {"best": 0.5, "count": 3, "rates": [1, 0.0], "unknown": [1]}
    for wrong in (
        {"best": float("nan"), "mode": "max"},
        {"count": 0.5},
        {"count": True},
        {"count": 10**30},
        {"rates": [0.1]},
        {"rates": [0.1, float("nan")]},
        {"rates": {"0": 1}},
        {"mode": 1},
        {"on": 1},
    ):
        with pytest.raises(UserError, match=r"s\."):
            fitted(wrong, own, "s")
