"""Check every family of the installed transformers, and write docs/families.md. `make families` runs all of it.

    python tests/families/every_family.py [--shard 0/2] [--results FILE] [FAMILY ...]

Each family is a line of the results. A run goes on where the one before was stopped, and starts again if that was
complete. Named families are checked again.
"""

import argparse
import json
import logging
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from families_table import write_table
from family_check import RAW, TARGETS, Dense, check, default_endings
from tiny_family import NotBuiltError, families, one_line

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "runs" / f"families-{transformers.__version__}.jsonl"
TABLE = REPOSITORY / "docs" / "families.md"
SECONDS = 120
"""Limit for one family."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("families", nargs="*", metavar="FAMILY", help="check only these, even if done")
    arguments.add_argument("--shard", default="0/1", help="i/n: this process checks every n-th family, from the i-th")
    arguments.add_argument("--results", type=Path, default=RESULTS, help="JSON lines; shards may share the file")
    options = arguments.parse_args()
    index, count = map(int, options.shard.split("/"))
    transformers.logging.set_verbosity_error()
    logging.getLogger("sparse_zero").addHandler(logging.NullHandler())
    options.results.parent.mkdir(parents=True, exist_ok=True)
    every = families()
    done = read(options.results)
    if not options.families and not [name for name in every if name not in done]:
        options.results.unlink()
        done = {}
    left = options.families or [name for name in every[index::count] if name not in done]
    for position, family in enumerate(left, 1):
        append(options.results, {"family": family, "not_built": "the process ended"})
        record = check_family(family)
        append(options.results, record)
        found = record.get("not_built") or ", ".join(f"{n}: {o['kind']}" for n, o in record["outcomes"].items())
        print(f"{position}/{len(left)} {family}: {found} ({record['seconds']:.1f} s)", flush=True)
    done = read(options.results)
    if missing := [name for name in every if name not in done]:
        print(f"{len(missing)} families have no result yet: {TABLE.name} is not written")
        return
    write_table(TABLE, [done[name] for name in every])
    print(f"wrote {TABLE.relative_to(REPOSITORY)}")
    wrong = [
        name for name in every if any(o["kind"] in ("wrong", RAW) for o in done[name].get("outcomes", {}).values())
    ]
    sys.exit(f"wrong, or with a raw error: {', '.join(wrong)}" if wrong else 0)


def check_family(family: str) -> dict[str, Any]:
    """The result of a family: `not_built` with the reason, or the outcomes by targets."""
    start = time.perf_counter()
    record: dict[str, Any] = {"family": family}
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    try:
        dense = Dense(family)
        endings, messages = default_endings(dense)
        record |= {"model": type(dense.model).__name__, "default": endings, "messages": messages}
        record["outcomes"] = {name: asdict(check(dense, targets)) for name, targets in TARGETS.items()}
    except NotBuiltError as error:
        record["not_built"] = str(error)
    except TooSlowError:
        record["not_built"] = f"not done after {SECONDS} s"
        record.pop("outcomes", None)
    except Exception as error:
        record["not_built"] = one_line(error)
    finally:
        signal.alarm(0)
    return record | {"seconds": round(time.perf_counter() - start, 2)}


class TooSlowError(BaseException):
    """Not an Exception, so that no check takes it for an error of the model."""


def _too_slow(*_: object) -> None:
    raise TooSlowError


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The last result of each family."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {record["family"]: record for record in map(json.loads, lines)}


def append(results: Path, record: dict[str, Any]) -> None:
    """One write for each line, so that shards can share a file."""
    line = (json.dumps(record) + "\n").encode()
    file = os.open(results, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line)
    finally:
        os.close(file)


if __name__ == "__main__":
    main()
