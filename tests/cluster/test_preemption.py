"""Jobs of Slurm that are warned, queued again or cancelled: nothing is lost, nothing is left."""

import json
import re
from pathlib import Path

import pytest
import without_training
from lab import Hosts, need
from lab_slurm import Slurm
from on_host import wait_until
from workload import Workload, losses

pytestmark = pytest.mark.cluster

STEPS = 200


@pytest.fixture(scope="module")
def long_losses(hosts: Hosts, workload: Workload) -> dict[int, float]:
    """The losses of a run of STEPS steps that nothing disturbs, on two ranks of one host."""
    output = workload.directory / "undisturbed"
    words = [f"training.output_dir={output}", f"training.max_steps={STEPS}", f"training.save_steps={STEPS}"]
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", 2, "-m", "sparse_zero.train"]
    hosts["n1"].run(*torchrun, workload.recipe, *words, timeout=180)
    return losses(output)


@pytest.fixture
def stand_in(hosts: Hosts) -> dict[str, str]:
    """The environment of a job whose ranks have a stand-in for the training."""
    return without_training.environment(hosts.environment["PYTHONPATH"])


class Submitted:
    """A job that the product has submitted and that trains."""

    def __init__(
        self, slurm: Slurm, workload: Workload, directory: Path, nodes: int = 2, env: dict[str, str] | None = None
    ) -> None:
        need("slurm")
        self.output, self.slurm = directory / "out", slurm
        words = [f"training.output_dir={self.output}", f"training.max_steps={STEPS}", f"launch.nodes={nodes}"]
        words += [f"training.save_steps={STEPS}", "training.save_total_limit=2", "--partition=main"]
        said = slurm.run("sparse-zero", "submit", workload.recipe, *words, "--json", cwd=directory, env=env).output
        self.number = int(json.loads(said[said.index("{") :])["job"])

    def wait_for_step(self, step: int) -> None:
        def trains() -> bool:
            steps = re.findall(r"step (\d+)/", self.slurm.output(self.number))
            return any(int(each) >= step for each in steps)

        wait_until(trains, 120, f"job {self.number} trains: {self.slurm.output(self.number)}")

    def resumed(self) -> list[int]:
        """The steps from which the job has gone on."""
        found = re.findall(
            r"resuming from \S*checkpoint-(\d+) \(step \d+, saved on 2 ranks\)", self.slurm.output(self.number)
        )
        return [int(step) for step in found]

    def restarts(self) -> int:
        return int(self.slurm.job(self.number)["Restarts"])


def test_a_job_that_is_queued_again_goes_on_as_if_nothing_had_been(
    slurm: Slurm, workload: Workload, tmp_path: Path, long_losses: dict[int, float]
) -> None:
    """By itself after a warning, then by `scontrol requeue`."""
    job = Submitted(slurm, workload, tmp_path)
    job.wait_for_step(20)
    # What --signal=B:USR1@120 sends before the time limit
    slurm.cancel(job.number, "--batch", "--signal=USR1")
    wait_until(lambda: job.restarts() == 1, 60, "the job is queued again", every=0.2)
    # What the first run has printed is there, too
    wait_until(lambda: job.resumed(), 120, f"job {job.number} resumes: {slurm.output(job.number)}")
    [saved] = job.resumed()
    assert saved >= 20
    job.wait_for_step(saved + 1)
    slurm.run("scontrol", "requeue", job.number)
    slurm.wait(job.number, 180)
    printed = slurm.output(job.number)
    assert job.restarts() == 2, printed
    assert len(job.resumed()) == 2, printed
    assert job.resumed()[1] >= saved
    # The same numbers, and the curve has each step once.
    assert losses(job.output) == long_losses
    runs = {event.parent for event in (job.output / "runs").rglob("events.out.tfevents.*")}
    assert len(runs) == 1, "TensorBoard shows one curve"


def test_a_stopped_run_goes_on_in_a_job_of_another_number_of_nodes(
    slurm: Slurm, workload: Workload, tmp_path: Path, long_losses: dict[int, float]
) -> None:
    job = Submitted(slurm, workload, tmp_path)
    job.wait_for_step(60)
    # What `submit` prints as "save and stop"
    slurm.cancel(job.number, "--batch", "--signal=TERM")
    slurm.wait(job.number, 60, state="FAILED")
    assert job.restarts() == 0
    again = Submitted(slurm, workload, tmp_path, nodes=1)
    slurm.wait(again.number, 180)
    assert re.search(r"resuming from .*saved on 2 ranks", slurm.output(again.number))
    assert json.loads((job.output / "results.json").read_text())["world_size"] == 1
    assert losses(job.output) == pytest.approx(long_losses, abs=1e-5)


def test_each_task_of_an_array_is_a_run(
    slurm: Slurm, workload: Workload, tmp_path: Path, stand_in: dict[str, str]
) -> None:
    (tmp_path / "sweep.txt").write_text("training.learning_rate=0.01\ntraining.learning_rate=0.02 training.seed=3\n")
    script = Path(__file__).parents[2] / "configs" / "array.sbatch"
    words = [workload.recipe, "sweep.txt", "training.max_steps=3", "training.save_steps=3"]
    number = slurm.submit("--array=1-2", script, *words, cwd=tmp_path, env=stand_in)
    wait_until(lambda: not slurm.jobs(), 120, f"the array {number} has ended")
    runs = tmp_path / "runs" / workload.recipe.stem
    assert sorted(path.name for path in runs.iterdir()) == ["1", "2"]
    results = [json.loads((runs / name / "results.json").read_text()) for name in ("1", "2")]
    assert [each["training"]["learning_rate"] for each in results] == [0.01, 0.02]
    assert [each["training"].get("seed") for each in results] == [None, 3]


def test_a_cancelled_job_leaves_no_process(
    slurm: Slurm, hosts: Hosts, workload: Workload, tmp_path: Path, stand_in: dict[str, str]
) -> None:
    job = Submitted(slurm, workload, tmp_path, env=stand_in)
    job.wait_for_step(10)
    assert hosts["n2"].processes("sparse_zero.train")
    slurm.cancel(job.number)
    assert slurm.wait(job.number, 60, state="CANCELLED")["Restarts"] == "0"
    for name in slurm.names:
        wait_until(lambda name=name: not hosts[name].processes("sparse_zero"), 30, f"nothing is left on {name}")
