"""The directory of a comparison: what it holds, and whether it is that of the one that goes on.

OUT/comparison.json         which recipe and data are compared, and with which methods, rates and seeds
OUT/NAME/rate-R/seed-S/     the directory of a run; run.json has its overrides, log.txt what it printed
"""

import glob
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.comparison.variants import Comparison, Run
from sparse_zero.data.file_names import expanded, home, names_of
from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError
from sparse_zero.json_text import json_text
from sparse_zero.recipe.recipe import DataSection

COMPARISON_FILE, RUN_FILE, LOG_FILE, RESULTS_FILE = "comparison.json", "run.json", "log.txt", "results.json"

Asked = Mapping[str, Any]
"""Methods, rates, seeds, budget and text as the command line gives them. None: not given."""


def with_earlier(out: Path, asked: Asked) -> dict[str, Any]:
    """What is asked of a comparison that goes on: the methods, rates and seeds of before and the new ones.

    Args: out: its directory.

    Raises UserError: comparison.json is damaged, or a name stands for another variant than before.
    """
    file = out / COMPARISON_FILE
    before = _read(file).get("asked", {}) if file.exists() else {}
    methods = [*(before.get("methods") or ())]
    for word in asked["methods"] or ():
        name = word.partition("=")[0]
        if other := next((each for each in methods if each.partition("=")[0] == name and each != word), None):
            raise UserError(f"--methods: '{word}' was '{other}' before; give it another name")
        methods += [] if word in methods else [word]
    return {
        "methods": methods or None,
        "rates": list(dict.fromkeys([*(before.get("rates") or ()), *asked["rates"]])),
        "seeds": max(asked["seeds"] or 0, before.get("seeds") or 0) or asked["seeds"],
        "budget": asked["budget"] or before.get("budget"),
        "text": asked["text"] or before.get("text"),
    }


def open_directory(comparison: Comparison, resume: bool) -> str:
    """Make the directory of a comparison, or check that it is that of this one.

    Returns: a checksum of what its runs have in common, for `write_comparison`.

    Raises UserError: it is another's, has runs although the comparison does not resume, or cannot be written.
    """
    out, file, checksum = comparison.out, comparison.out / COMPARISON_FILE, _checksum(comparison)
    if not file.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: exists and is not a comparison; name another directory with --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_be_written(out, error) from None
        return checksum
    if _read(file)["checksum"] != checksum:
        raise UserError(
            f"{out}: is the comparison of another recipe, of other data, of other overrides or of another text; "
            "name another directory with --out"
        )
    if not resume and any(out.glob(f"*/*/*/{RUN_FILE}")):
        raise UserError(f"{out}: has runs of this comparison; go on with --resume, or name another with --out")
    for variant, seed in itertools.product(comparison.variants, comparison.seeds):
        for rate in variant.rates:
            check_run(comparison.run(variant, rate, seed))
    return checksum


def write_comparison(comparison: Comparison, asked: Asked, checksum: str) -> None:
    """Write what is compared into its directory. Raises UserError: that cannot be written."""
    here = {"recipe": comparison.path, "overrides": list(comparison.shared), "checksum": checksum}
    try:
        write_json(comparison.out / COMPARISON_FILE, here | {"asked": dict(asked)})
    except OSError as error:
        raise _cannot_be_written(comparison.out, error) from None


def _cannot_be_written(out: Path, error: OSError) -> UserError:
    return UserError(f"{out}: cannot be written ({error.strerror}); name another directory with --out")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
        found["checksum"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: damaged; name another directory with --out") from None
    return found


def check_run(run: Run) -> None:
    """Raise UserError if the directory of a run has one with other overrides, apart from those of its launch."""
    known = run.directory / RUN_FILE
    if not known.exists():
        return
    before, now = (
        [word for word in words if not word.startswith("launch.")]
        for words in (json.loads(known.read_text())["overrides"], run.overrides)
    )
    if before != now:
        changed = [*(f"without {word}" for word in now if word not in before), *(w for w in before if w not in now)]
        raise UserError(
            f"{run.directory}: is a run with other overrides ({', '.join(changed) or 'in another order'}); name "
            "another directory with --out"
        )


def _checksum(comparison: Comparison) -> str:
    """Of what all runs have in common and decides their numbers, as far as this machine can say."""
    facts = comparison.recipe.with_contents().model_dump(mode="json", exclude={"launch"})
    for key in ("output_dir", "run_name"):
        facts["training"].pop(key, None)
    own = comparison.out.resolve()
    files = (found for found in _files(comparison.recipe.data) if own not in Path(found[0]).resolve().parents)
    facts["files"] = sorted(files)
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _files(data: DataSection) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of the last change of each file of the data that is on this machine."""
    for name in {package_path(home(data.path)), *names_of(expanded(data.data_files))}:
        for found in [name] if Path(name).exists() else glob.glob(name):
            for file in Path(found).rglob("*") if Path(found).is_dir() else [Path(found)]:
                if file.is_file():
                    yield str(file), file.stat().st_size, file.stat().st_mtime_ns


def write_json(path: Path, value: Any) -> None:
    """Replace a file as a whole. What is not finite becomes null."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json_text(value) + "\n")
    temporary.replace(path)
