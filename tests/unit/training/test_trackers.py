"""What arrives at wandb and mlflow, offline, in their own files: parameters, losses and metrics, and no secrets."""

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from sparse_zero import SparseConfig, UserError, sparsify
from sparse_zero.training.trackers import TrackedSettings, check_imports

SECRET = "0123456789" * 4
IS_CI = os.environ.get("CI") == "true"


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("wandb")
    settings = {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "API_KEY": SECRET, "PROJECT": "sparse"}
    settings |= {"DISABLE_GIT": "true", "DISABLE_CODE": "true", "_DISABLE_STATS": "true", "_DISABLE_META": "true"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    yield module
    module.teardown()


def test_parameters_losses_and_metrics_arrive(wandb: Any, trainer: Any, tmp_path: Path) -> None:
    """The Trainer's callback starts the run; the sparse settings are added to it."""
    run = trainer(tmp_path / "out", report_to="wandb", max_steps=4, save_strategy="no", hub_token=SECRET)
    run.train()
    config, summary = dict(wandb.run.config), dict(wandb.run.summary)
    assert config["learning_rate"] == run.args.learning_rate
    assert (config["sparse.density"], config["sparse.selection"]) == (0.1, "stratified")
    assert config["sparse.trainable_scalars"] == run.model.sparsity.trainable_parameters
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert summary["train/loss"] == logged[-1]["loss"]
    evaluated = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert summary["eval/loss"] == evaluated[-1]["eval_loss"]
    assert summary["train/global_step"] == 4
    wandb.finish()
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert not (tmp_path / "out" / "runs").exists()


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(sys.prefix, "mlflow"))  # where the Makefile installs it
    module = importlib.import_module("mlflow") if IS_CI else pytest.importorskip("mlflow")
    address = f"file:{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    module.set_tracking_uri(address)
    yield module
    module.end_run()
    module.set_tracking_uri(None)


def test_parameters_losses_and_metrics_arrive_at_mlflow(mlflow: Any, trainer: Any, tmp_path: Path) -> None:
    """In a directory of files, which its own client reads."""
    run = trainer(tmp_path / "out", report_to="mlflow", max_steps=4, save_strategy="no", hub_token=SECRET)
    run.train()
    client = mlflow.MlflowClient()
    (only,) = client.search_runs(["0"])
    assert only.info.status == "FINISHED"
    found = only.data
    assert float(found.params["learning_rate"]) == run.args.learning_rate
    assert (found.params["sparse.density"], found.params["sparse.selection"]) == ("0.1", "stratified")
    assert found.params["sparse.trainable_scalars"] == str(run.model.sparsity.trainable_parameters)
    logged = {key: entry[key] for entry in run.state.log_history for key in ("loss", "eval_loss") if key in entry}
    assert {key: found.metrics[key] for key in logged} == logged
    history = client.get_metric_history(only.info.run_id, "loss")
    losses = [(entry["step"], entry["loss"]) for entry in run.state.log_history if "loss" in entry]
    assert [(point.step, point.value) for point in history] == losses
    files = [path for path in (tmp_path / "mlruns").rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


class Config(dict):
    def update(self, values: dict, **_: Any) -> None:
        super().update(values)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_each_tracker_gets_the_sparse_settings_from_rank_0(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the calls that transformers makes on each of them."""
    from families import tiny

    got = Config()
    module = {
        "wandb": SimpleNamespace(run=SimpleNamespace(config=got)),
        "mlflow": SimpleNamespace(active_run=lambda: object(), log_params=got.update),
        "trackio": SimpleNamespace(config=got),
    }[name]
    monkeypatch.setitem(sys.modules, name, module)
    model = sparsify(tiny("llama"), SparseConfig(density=0.1))
    for is_first in (False, True):
        assert got == {}
        state = TrainerState(is_world_process_zero=is_first)
        TrackedSettings().on_train_begin(SimpleNamespace(report_to=[name]), state, TrainerControl(), model=model)
    assert (got["sparse.density"], got["sparse.base_scalars"]) == (0.1, model.sparsity.total_parameters)
    assert None not in got.values()


def test_a_tracker_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.py").write_text("from google.protobuf import no_such_service\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(UserError, match=r"training.report_to: the package of 'mlflow' cannot be imported: .*service"):
        check_imports(["mlflow", "tensorboard"])
