"""The time from the command to the first training step: a submitted job compared with a plain srun, on tests/cluster.

    python benchmarks/submit.py --rounds 3

Needs root and Debian's Slurm, like tests/cluster. Both train the tests' tiny model on two hosts, in turns. The time
includes the scheduling of the job by Slurm.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS / "cluster"), str(TESTS / "distributed")]

from conftest import environment  # noqa: E402
from lab import Hosts  # noqa: E402
from lab_slurm import Slurm  # noqa: E402
from on_host import wait_until  # noqa: E402
from workload import Workload  # noqa: E402

FIRST_STEP = "step 1/"


def bare(slurm: Slurm, workload: Workload, output: Path) -> float:
    """Seconds from `srun python -m sparse_zero.train` to the first step."""
    begun = time.monotonic()
    words = ["srun", "-N2", "--ntasks-per-node=1", "python", "-m", "sparse_zero.train", workload.recipe]
    run = slurm.controller.start(*words, f"training.output_dir={output}", cwd=output.parent)
    run.wait_for(FIRST_STEP, 300)
    seconds = time.monotonic() - begun
    run.wait(300)
    return seconds


def submitted(slurm: Slurm, workload: Workload, output: Path) -> float:
    """Seconds from `sparse-zero submit` to the first step."""
    begun = time.monotonic()
    words = ["sparse-zero", "submit", workload.recipe, f"training.output_dir={output}", "launch.nodes=2", "--json"]
    facts = json.loads(slurm.run(*words, "--partition=main", cwd=output.parent).output)
    log = Path(facts["log"])
    wait_until(lambda: log.is_file() and FIRST_STEP in log.read_text(errors="replace"), 300, "the job trains")
    seconds = time.monotonic() - begun
    slurm.wait(int(facts["job"]), 300)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    ways = {"srun": bare, "submit": submitted}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as root:
        for name in ("lab", "workload", "runs"):
            (Path(root) / name).mkdir()
        hosts = Hosts(Path(root) / "lab", ["n1", "n2"], environment())
        try:
            slurm, workload = Slurm(hosts, ["n1", "n2"]), Workload(Path(root) / "workload")
            bare(slurm, workload, Path(root) / "runs" / "warm")
            for number in range(rounds):
                for way, run in ways.items():
                    seconds[way].append(run(slurm, workload, Path(root) / "runs" / f"{way}-{number}"))
        finally:
            hosts.close()
    for way, measured in seconds.items():
        print(f"{way:8} {statistics.median(measured):6.1f} s  ({min(measured):.1f} to {max(measured):.1f})")
    ratios = [late / early for late, early in zip(seconds["submit"], seconds["srun"], strict=True)]
    print(f"submit / srun: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
