"""What `make check` tests: the packages that have changed, and one run on two ranks. `make test` tests everything.

    python tests/check.py [pytest's options]

Changed are the files that differ from HEAD or are untracked, and those of commits that origin/main does not have.
"""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
IMPORT_ORDER = "tests/unit/test_imports.py"
TOPS = ("sparse_zero", "launcher", "rpn", "benchmarks")
TWO_RANKS = "tests/distributed/test_training_loops.py"


def git(*words: str) -> list[str]:
    """The lines that a git command prints; none if it fails."""
    done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed_files() -> set[str]:
    uncommitted = {*git("diff", "--name-only", "HEAD"), *git("ls-files", "--others", "--exclude-standard")}
    return uncommitted | {*git("diff", "--name-only", "origin/main...HEAD")}


def package_of(file: str) -> str | None:
    """The package that a file of the product belongs to: sparse_zero/X, launcher/X, launcher, rpn or benchmarks."""
    top, *rest = Path(file).parts
    if top not in TOPS or not rest:
        return None
    if len(rest) > 1 and top in ("sparse_zero", "launcher"):
        return f"{top}/{rest[0]}"
    return None if top == "sparse_zero" else top


def tests_of(file: str) -> str | None:
    """The file or directory of unit tests that a changed file asks for; None if there is none."""
    path = Path(file)
    if file.startswith("tests/unit/"):
        tests = path if path.name.startswith("test_") else path.parent
    elif package := package_of(file):
        tests = Path("tests/unit", package.removeprefix("sparse_zero/"))
    else:
        return None
    is_all = tests == Path("tests/unit")
    return str(tests) if (REPOSITORY / tests).exists() and not is_all else None


def importers(packages: Iterable[str]) -> set[str]:
    """The other packages that import one of these."""
    names = "|".join(re.escape(package.replace("/", ".")) for package in packages)
    importing = re.compile(rf"^\s*(from|import) ({names})\b", re.MULTILINE)
    files = [file for top in TOPS for file in (REPOSITORY / top).rglob("*.py")] if names else []
    found = {package_of(str(file.relative_to(REPOSITORY))) for file in files if importing.search(file.read_text())}
    return found - {*packages, None}


def main(options: list[str]) -> int:
    files = sorted(changed_files())
    tests = {path for path in map(tests_of, files) if path}

    def is_within(path: str) -> bool:
        return any(str(parent) in tests for parent in Path(path).parents)

    tests = sorted(path for path in tests if not is_within(path))
    packages = {package for package in map(package_of, files) if package}
    others = [each for each in importers(packages) if not {each, str(Path(each).parent)} & packages]
    untested = [file for file in files if not tests_of(file)]
    print(f"check: {len(files)} files have changed")
    if others:
        print(f"check: not run: the tests of {', '.join(sorted(others))}, which import what has changed")
    if untested:
        print(f"check: left to make test: {', '.join(untested)}")
    words = [*dict.fromkeys([TWO_RANKS, *tests, IMPORT_ORDER]), *options]
    print(f"check: pytest {' '.join(words)}", flush=True)
    parallel = ["--numprocesses", "2", "--dist", "loadfile"]
    return subprocess.run([sys.executable, "-m", "pytest", *parallel, *words], cwd=REPOSITORY).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
