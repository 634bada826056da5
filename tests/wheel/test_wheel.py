"""The wheel: its contents, and what works after `pip install` in an empty environment, from another directory.

The environments see the packages of this one, torch and all, but not its sparse-zero; those of other Pythons contain
only what the commands without torch need.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("sparse_zero", "rpn", "launcher")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
WITHOUT_TORCH = ("pydantic", "PyYAML", "psutil", "rich", "packaging")
"""What the commands need that do not import torch."""
PYTHONS = ("3.11", "3.12", "3.13")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def skip_unless_in_ci(reason: str) -> None:
    """Skip on a user's machine, which may be offline; in CI it is a failure."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@dataclass
class Environment:
    """A virtual environment with the wheel, and an empty working directory."""

    root: Path
    here: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def packages(self) -> Path:
        return next(self.root.glob("lib/python3*/site-packages"))

    def run(self, *words: object, status: int = 0) -> str:
        """Run a program of the environment; returns what it printed on stdout."""
        __tracebackhide__ = True
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        # ninja, which DeepSpeed needs, is among the programs of this environment.
        path = f"{self.root / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            [str(self.root / "bin" / str(words[0])), *map(str, words[1:])],
            cwd=self.here,
            env={**environment, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, f"{words}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def json(self, *words: object) -> dict:
        return json.loads(self.run("sparse-zero", *words, "--json"))

    def pip(self, *words: object) -> subprocess.CompletedProcess:
        command = [*PIP, "--python", str(self.python), "install", "--quiet", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: pip leaves files in the directory that it builds."""
    directory = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(REPOSITORY / name, directory)
    for name in (*PACKAGES, "tests", "benchmarks", "configs"):
        shutil.copytree(REPOSITORY / name, directory / name, ignore=ignored)
    command = [*PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory / "dist")]
    # Offline, the setuptools of this environment will do.
    for options in ([], ["--no-build-isolation"]):
        built = subprocess.run([*command, *options, str(directory)], capture_output=True, text=True)
        if built.returncode == 0:
            return next((directory / "dist").glob("*.whl"))
    skip_unless_in_ci(f"pip cannot build a wheel here: {built.stderr.strip()[-1000:]}")


def create(directory: Path, python: str, wheel: Path) -> Environment:
    environment = Environment(directory / "venv", directory / "here")
    environment.here.mkdir()
    subprocess.run([python, "-m", "venv", "--without-pip", environment.root], check=True, cwd=directory)
    installed = environment.pip("--no-deps", "--no-index", "--no-compile", wheel)
    assert installed.returncode == 0, installed.stderr
    return environment


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = create(tmp_path_factory.mktemp("installed"), sys.executable, wheel)
    # Of the directories that a .pth file names, the .pth files are not read: those of editable installs among them.
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (environment.packages / "dependencies.pth").write_text("\n".join(seen) + "\n")
    return environment


# Contents


def test_the_wheel_contains_the_packages_and_nothing_else(wheel: Path) -> None:
    files = [file for package in PACKAGES for file in (REPOSITORY / package).rglob("*") if file.is_file()]
    wanted = {str(file.relative_to(REPOSITORY)) for file in files if "__pycache__" not in file.parts}
    assert {f"sparse_zero/gradient/csrc/{name}" for name in ("sampled.cpp", "positions.h")} <= wanted
    assert "sparse_zero/py.typed" in wanted
    assert {f"sparse_zero/recipe/configs/{name}" for name in ("demo.yaml", "zero2.json", "array.sbatch")} <= wanted
    information = f"sparse_zero-{PROJECT['version']}.dist-info"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if not name.startswith(information)} == wanted
    assert {name.removeprefix(information) for name in names if name.startswith(information)} == {
        *("/METADATA", "/WHEEL", "/RECORD", "/entry_points.txt", "/top_level.txt", "/licenses/LICENSE")
    }


def test_metadata(installed: Environment) -> None:
    script = (
        "import json; from importlib.metadata import metadata; found = metadata('sparse-zero'); "
        "print(json.dumps({name: found.get_all(name) for name in found}))"
    )
    found = json.loads(installed.run("python", "-c", script))
    assert found["Version"] == [PROJECT["version"]]
    assert found["Requires-Python"] == [">=3.11"]
    assert found["License-Expression"] == ["Apache-2.0"]
    assert {line.partition(",")[0] for line in found["Project-URL"]} == {
        *("Homepage", "Documentation", "Repository", "Issues", "Changelog")
    }
    for python in PYTHONS:
        assert f"Programming Language :: Python :: {python}" in found["Classifier"]
    assert "sparse fine-tuning" in found["Keywords"][0].split(",")


# What the installed command does


def test_the_installed_packages_are_imported(installed: Environment) -> None:
    code = "import launcher, rpn, sparse_zero, torch; print(launcher.__file__, rpn.__file__, sparse_zero.__file__)"
    assert installed.run("python", "-c", code).split() == [
        str(installed.packages / package / "__init__.py") for package in ("launcher", "rpn", "sparse_zero")
    ]


def check_the_commands_without_torch(environment: Environment) -> None:
    """They find the shipped files from an empty directory, and leave nothing there."""
    configs = environment.packages / "sparse_zero" / "recipe" / "configs"
    assert environment.run("sparse-zero", "--version") == f"sparse-zero {PROJECT['version']}\n"
    assert "sparse-zero train demo.yaml" in environment.run("sparse-zero", "--help")
    listed = {row["name"]: row["path"] for row in environment.json("recipes")}
    assert listed == {path.name: str(path) for path in configs.iterdir()}
    assert "zero3_offload.json" in environment.run("sparse-zero", "recipes")
    assert "sparse.density: float" in environment.run("sparse-zero", "keys")
    assert set(environment.json("keys")["properties"]) >= {"model", "data", "sparse", "rpn", "training", "launch"}

    train = environment.json("train", "demo.yaml", "training.deepspeed=zero3.json", "--dry-run")
    assert train["command"][-3:] == ["sparse_zero.train", "demo.yaml", "training.deepspeed=zero3.json"]
    assert str(environment.root) in train["command"][0]
    script = environment.run("sparse-zero", "submit", "demo.yaml", "--partition", "gpu", "--dry-run")
    assert f"{environment.root / 'bin' / 'sparse-zero'} train demo.yaml" in script
    assert not any(environment.here.iterdir())

    assert environment.run("sparse-zero", "recipes", "copy", "demo.yaml") == "demo.yaml\n"
    copied = environment.here / "demo.yaml"
    assert copied.read_bytes() == (configs / "demo.yaml").read_bytes()
    # Of `train --dry-run` as above, what is left to see: that the copy is found and read. It does not import torch.
    environment.run("sparse-zero", "submit", "demo.yaml", "--partition", "gpu", "--dry-run")
    environment.run("sparse-zero", "recipes", "copy", "demo.yaml", status=2)
    environment.run("sparse-zero", "train", "dmo.yaml", "--dry-run", status=2)
    copied.unlink()


def test_the_commands_without_torch(installed: Environment) -> None:
    check_the_commands_without_torch(installed)


def test_plan(installed: Environment, reviews_csv: Path) -> None:
    plan = installed.json("plan", "demo.yaml", "--ranks", "2")
    assert {"0", "1", "2", "3", "3, offload"} <= {stage["stage"] for stage in plan["stages"]}


def test_doctor(installed: Environment, reviews_csv: Path) -> None:
    """Finds the recipe's files. Whether this machine has a compiler does not matter here."""
    words = ["doctor", "demo.yaml", "training.use_cpu=true", "--no-ranks", "--json"]
    done = subprocess.run([installed.root / "bin" / "sparse-zero", *words], cwd=installed.here, capture_output=True)
    found = json.loads(done.stdout)
    files = [finding for finding in found["findings"] if finding["check"] == "files"]
    assert {finding["severity"] for finding in files} == {"ok"}, files
    (host,) = found["hosts"].values()
    configs = installed.packages / "sparse_zero" / "recipe" / "configs"
    assert {path: bool(checksum) for path, checksum in host["files"].items()} == {
        str(configs / "demo.yaml"): True,
        str(configs / "zero2.json"): True,
    }


def test_a_run_on_two_ranks(installed: Environment, reviews_csv: Path) -> None:
    small = ["data.train_size=64", "data.eval_size=32", "data.max_length=16", "training.max_steps=2"]
    quick = ["training.use_cpu=true", "training.eval_on_start=false", "training.report_to=none"]
    results = installed.json("train", "demo.yaml", "launch.processes_per_node=2", *small, *quick)
    assert (results["world_size"], results["zero_stage"], results["steps"]) == (2, 2, 2)
    assert (installed.here / "runs" / "demo" / "adapter" / "adapter_model.safetensors").is_file()


# Other Pythons


def find_python(version: str) -> str | None:
    """An interpreter of this version: on PATH, or pyenv's."""
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    for candidate in filter(None, candidates):
        # A shim of pyenv may be there without the version.
        tried = subprocess.run(
            [candidate, "-c", "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
        )
        if tried.stdout.strip() == version:
            return candidate
    return None


@pytest.mark.parametrize("version", [version for version in PYTHONS if not sys.version.startswith(f"{version}.")])
def test_another_python(version: str, wheel: Path, tmp_path: Path) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"this machine has no Python {version}")
    environment = create(tmp_path, python, wheel)
    added = environment.pip("--constraint", REPOSITORY / "constraints.txt", *WITHOUT_TORCH)
    if added.returncode != 0:
        skip_unless_in_ci(f"pip cannot install {', '.join(WITHOUT_TORCH)}: {added.stderr.strip()[-1000:]}")
    environment.run("python", "-W", "error", "-m", "compileall", "-q", *(environment.packages / p for p in PACKAGES))
    check_the_commands_without_torch(environment)
    told = environment.run("sparse-zero", "doctor", "--no-ranks", status=1)
    assert "torch is not installed" in told
