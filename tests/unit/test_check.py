"""Which tests `make check` runs after a change, and that CI skips no test that starts ranks."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import check
import pytest


@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("sparse_zero/zero/resharding.py", "tests/unit/zero"),
        ("sparse_zero/adapters/formats/deltas.py", "tests/unit/adapters"),
        ("sparse_zero/gradient/csrc/sampled.cpp", "tests/unit/gradient"),
        ("sparse_zero/train.py", None),
        ("launcher/ways/slurm.py", "tests/unit/launcher/ways"),
        ("launcher/cli.py", "tests/unit/launcher"),
        ("rpn/noise.py", "tests/unit/rpn"),
        ("benchmarks/tables.py", "tests/unit/benchmarks"),
        ("tests/unit/zero/test_resharding.py", "tests/unit/zero/test_resharding.py"),
        ("tests/unit/zero/test_that_was_deleted.py", None),
        ("tests/unit/gradient/compile_kernels.py", "tests/unit/gradient"),
        ("tests/unit/families.py", None),
        ("tests/distributed/ranks.py", None),
        ("README.md", None),
    ],
)
def test_tests_of_a_changed_file(file: str, tests: str | None) -> None:
    assert check.tests_of(file) == tests
    assert tests is None or (check.REPOSITORY / file).exists(), "an example of the past"


def test_packages_that_import_a_changed_one() -> None:
    assert {"sparse_zero/model", "sparse_zero/training"} <= check.importers({"sparse_zero/selection"})
    assert check.importers({"launcher/ways"}) == {
        "launcher",
        "launcher/comparison",
        "launcher/doctor",
        "launcher/jobs",
    }
    assert check.importers({"benchmarks"}) == set()


def test_changes_are_those_of_the_working_tree_and_of_new_commits(tmp_path, monkeypatch) -> None:
    def git(*words: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", *author, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--initial-branch", "main")
    for name in ("old", "edited", "committed"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "--message", "first")
    git("update-ref", "refs/remotes/origin/main", "HEAD")
    (tmp_path / "committed").write_text("2")
    git("commit", "--all", "--message", "second")
    (tmp_path / "edited").write_text("2")
    (tmp_path / "new").write_text("1")
    monkeypatch.setattr(check, "REPOSITORY", tmp_path)
    assert check.changed_files() == {"edited", "committed", "new"}
    git("update-ref", "-d", "refs/remotes/origin/main")
    assert check.changed_files() == {"edited", "new"}, "without an origin"


def test_what_is_run_and_what_is_not_is_said(monkeypatch, capsys) -> None:
    files = {"launcher/ways/slurm.py", "launcher/cli.py", "sparse_zero/checkpoint/shards.py", "sparse_zero/train.py"}
    files.add("README.md")
    commands = []
    monkeypatch.setattr(check, "changed_files", lambda: files)
    monkeypatch.setattr(
        check.subprocess, "run", lambda command, **_: commands.append(command) or subprocess.CompletedProcess([], 5)
    )
    assert check.main(["-k", "slurm"]) == 5
    tests = [check.TWO_RANKS, "tests/unit/checkpoint", "tests/unit/launcher", check.IMPORT_ORDER]
    assert commands[0][-6:] == [*tests, "-k", "slurm"]
    said = capsys.readouterr().out
    assert f"check: pytest {' '.join(tests)} -k slurm" in said
    assert "check: not run: the tests of benchmarks, sparse_zero/training, which import what has changed\n" in said
    assert "check: left to make test: README.md, sparse_zero/train.py\n" in said


SKIPS = {
    "distributed/test_one.py": """
        import pytest
        pytestmark = pytest.mark.distributed
        def test_one(): pytest.skip("no mpirun")
        @pytest.mark.xfail
        def test_xfail(): assert False
    """,
    "distributed/test_file.py": """
        import pytest
        pytest.skip("no Slurm", allow_module_level=True)
    """,
    "cluster/test_fixture.py": """
        import pytest
        pytestmark = pytest.mark.cluster
        @pytest.fixture
        def hosts(): pytest.skip("no sshd")
        def test_hosts(hosts): pass
    """,
    "unit/test_gpu.py": """
        import pytest
        def test_gpu(): pytest.skip("no GPU")
    """,
}


@pytest.mark.parametrize(("ci", "failed"), [("true", {"no mpirun", "no Slurm", "no sshd"}), ("", set())])
def test_skipped_tests_that_start_ranks_fail_in_ci(ci: str, failed: set[str], tmp_path: Path) -> None:
    for name, text in SKIPS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    options = ["-p", "conftest", "-p", "no:cacheprovider", "-c", str(check.REPOSITORY / "pyproject.toml")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--continue-on-collection-errors", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"CI": ci, "PYTHONPATH": str(check.REPOSITORY / "tests")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == bool(failed), done.stdout
    lines = done.stdout.splitlines()
    refused = {
        line.rpartition(": ")[2].removeprefix("Skipped: ") for line in lines if line.startswith("CI has to run")
    }
    assert refused == failed, done.stdout
