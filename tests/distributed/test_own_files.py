"""Files in the working directory with the names of modules that ranks import: none of them is imported.

`python -m` searches the working directory first.
"""

import json
import subprocess
import sys
from pathlib import Path

import own_files
import pytest
from ranks import run_ranks
from recipes import write_recipe

pytestmark = pytest.mark.distributed

TASK = "sequence-classification"
SHORT = {"max_steps": 1, "eval_on_start": False, "deepspeed": "zero2.json"}


@pytest.fixture
def recipe(bases: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with a noise function in a file beside it; the working directory is another one."""
    (tmp_path / "noises").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "noises" / "json.py").write_text(
        "import os\n\n"
        "def shrink(embeddings, keep, stream):\n"
        "    open(os.environ['SEEN'] + str(stream.rank), 'w').close()\n"
        "    return embeddings * 0.5\n"
    )
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    training = SHORT | {"output_dir": str(tmp_path / "out")}
    file = tmp_path / "noises" / "run.yaml"
    return write_recipe(file, bases[TASK], TASK, data, training=training, rpn={"noise": "json.py:shrink"})


def finished(tmp_path: Path, ranks: int) -> None:
    assert json.loads((tmp_path / "out" / "results.json").read_text())["world_size"] == ranks
    for rank in range(ranks):
        assert (tmp_path / f"seen{rank}").is_file(), f"rank {rank} has not used the noise function"


def test_ranks_of_the_command(recipe: Path, tmp_path: Path) -> None:
    """The other launchers: tests/cluster/test_secrets.py"""
    own_files.write(Path())
    words = ["train", recipe, "launch.launcher=local", "launch.processes_per_node=1"]
    command = [Path(sys.executable).with_name("sparse-zero"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    finished(tmp_path, ranks=1)


def test_ranks_that_are_started_by_hand(recipe: Path, tmp_path: Path) -> None:
    own_files.write(Path(), own_files.WITHOUT_SPARSE_ZERO)
    run_ranks(2, "sparse_zero.train", recipe, launcher="torchrun script")
    finished(tmp_path, ranks=2)


@pytest.mark.parametrize("module", ["sparse_zero.train", "launcher"])
def test_python_m(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [name for name in own_files.WITHOUT_SPARSE_ZERO if name != f"{module}.py"]
    own_files.write(tmp_path, names)
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    own_files.write(tmp_path)
    done = subprocess.run([sys.executable, "-P", "-m", module, "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its report of this host, and its ranks."""
    monkeypatch.chdir(tmp_path)
    own_files.write(tmp_path)
    command = [Path(sys.executable).with_name("sparse-zero"), "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    told = json.loads(done.stdout)
    assert told["errors"] == 0, told["findings"]
    assert told["ranks"]["problems"] == []
    assert told["ranks"]["world_size"] >= 1
