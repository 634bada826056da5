"""Which tests `make check` runs after a change, and that CI skips no test that starts ranks."""

import os
import subprocess
import sys

import check
import pytest


@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("sparse_zero/zero/spans.py", "tests/unit/zero"),
        ("sparse_zero/adapters/exchange/deltas.py", "tests/unit/adapters"),
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


def test_packages_that_import_a_changed_one() -> None:
    assert {"sparse_zero/model", "sparse_zero/training"} <= check.importers({"sparse_zero/selection"})
    assert check.importers({"launcher/ways"}) == {"launcher", "launcher/doctor", "launcher/jobs"}
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
    assert "check: not run: the tests of sparse_zero/training, which import what has changed\n" in said
    assert "check: not run: what tests sparse_zero/train.py\n" in said


@pytest.mark.parametrize(("ci", "status"), [("true", 1), ("", 0)])
def test_a_skipped_test_that_starts_ranks_fails_in_ci(ci: str, status: int) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/distributed/test_doctor_probe.py",
        "-k",
        "two_real_ranks and mpi",
    ]
    environment = os.environ | {"CI": ci, "PATH": "/nowhere"}
    done = subprocess.run(command, cwd=check.REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout
    assert "no mpirun here" in done.stdout
