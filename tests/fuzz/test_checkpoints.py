"""Damaged and hostile checkpoints: opening, exporting, inspecting and resuming succeeds, or raises one UserError."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import ChangedCheckpoint
from families import tiny
from hypothesis import given
from hypothesis import strategies as st
from mutations import FILE_KINDS, mutated_bytes, mutated_json, mutated_safetensors, place
from outcomes import bits, outcome

from sparse_zero import SparseConfig, SparseTrainer, sparsify
from sparse_zero.adapters.files import read_adapter
from sparse_zero.adapters.inspection import describe
from sparse_zero.checkpoint.directory import Checkpoint, newest_complete
from sparse_zero.checkpoint.export import export
from sparse_zero.recipe.training import TrainingArguments

STEP = 2
OLDER = Path(__file__).parents[1] / "fixtures" / "v0.1" / "checkpoint-3"
SPARSE = {
    "stratified": {"density": 0.02, "modules_to_save": ["norm"]},
    "rows": {
        "density": 0.02,
        "selection": "bernoulli",
        "targets": ["embed_tokens"],
        "trainable_token_indices": [3, 7],
    },
    "stored": {"density": 0.02, "selection": "magnitude"},
}
ROWS = [{"input_ids": list(range(n, n + 6)), "labels": list(range(n, n + 6))} for n in range(4)]


def trainer(out: Path, name: str) -> SparseTrainer:
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "save_steps": STEP}
    arguments = TrainingArguments(str(out), **quiet, max_steps=STEP, logging_steps=1, per_device_train_batch_size=2)
    torch.manual_seed(0)
    model = sparsify(tiny("llama"), SparseConfig(**SPARSE[name]))
    return SparseTrainer(model, arguments, train_dataset=ROWS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of one rank, by selection."""
    directories = {}
    for name in SPARSE:
        out = tmp_path_factory.mktemp(name)
        trainer(out, name).train()
        directories[name] = out / f"checkpoint-{STEP}"
    return directories


@st.composite
def damaged(draw: Any, changed: ChangedCheckpoint) -> str:
    """Damage a checkpoint. Returns: what was changed."""
    kind = draw(st.sampled_from(["manifest", "manifest", "shard", "shard", "fixed", "state", "unsigned", "kind"]))
    files = [*changed.shards, *changed.manifest["files"]]
    if kind == "manifest":
        changed.sign(draw(mutated_json(changed.manifest)))
    elif kind == "shard" or (kind == "fixed" and "fixed.safetensors" not in files):
        name = draw(st.sampled_from(changed.shards))
        changed.change(name, draw(mutated_safetensors(changed.read(name))))
    elif kind == "fixed":
        changed.change("fixed.safetensors", draw(mutated_safetensors(changed.read("fixed.safetensors"))))
    elif kind == "state":
        state = json.loads(changed.read("trainer_state.json"))
        changed.change("trainer_state.json", draw(mutated_json(state)))
    elif kind == "unsigned":
        name = draw(st.sampled_from([*files, "manifest.json"]))
        (changed.directory / name).write_bytes(draw(mutated_bytes(changed.read(name))))
    else:
        place(changed.directory / draw(st.sampled_from([*files, "manifest.json"])), draw(st.sampled_from(FILE_KINDS)))
    return kind


def exported(directory: Path, out: Path) -> Callable[[], object]:
    def call() -> None:
        shutil.rmtree(out, ignore_errors=True)
        export(directory, out)
        read_adapter(out)

    return call


@given(data=st.data())
@pytest.mark.parametrize("name", ["older", *SPARSE])
def test_opening_exporting_inspecting(name: str, data: st.DataObject, saved: dict[str, Path], tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    changed = ChangedCheckpoint(saved.get(name, OLDER), run / "checkpoint-3")
    data.draw(damaged(changed))
    problem = outcome(lambda: Checkpoint(changed.directory))
    found, problems = newest_complete(run)
    assert (found is None) == (problem is not None) == bool(problems)
    refused = outcome(exported(changed.directory, out))
    if refused is not None:
        assert not out.exists() or not [path for path in out.iterdir() if path.name.endswith(".tmp")]
        assert problem is None or str(problem) == str(refused)
    outcome(lambda: describe(changed.directory))


@given(data=st.data())
@pytest.mark.parametrize("name", SPARSE)
def test_resuming(name: str, data: st.DataObject, saved: dict[str, Path], tmp_path: Path) -> None:
    """What is refused has changed nothing of the model, the optimizer or the scheduler."""
    changed = ChangedCheckpoint(saved[name], tmp_path / "run" / f"checkpoint-{STEP}")
    data.draw(damaged(changed))
    resumed = trainer(tmp_path / "run", name)
    optimizer, scheduler = resumed.create_optimizer(), resumed.create_scheduler(STEP)
    before = bits(resumed.model), repr(optimizer.state_dict()), repr(scheduler.state_dict())
    with contextlib.redirect_stdout(None):
        refused = outcome(lambda: resumed.train(resume_from_checkpoint=str(changed.directory)))
    if refused is not None:
        assert before == (bits(resumed.model), repr(optimizer.state_dict()), repr(scheduler.state_dict()))
