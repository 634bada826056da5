"""`sparse-zero submit`: options, the script, what sbatch is given, and what the script does when it is signalled."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.jobs import render, sbatch_options
from launcher.jobs.batch_script import batch_script
from launcher.jobs.sbatch_options import gpus_per_node, job_options, log_path, split_words, time_limit_seconds
from sparse_zero.errors import UserError
from sparse_zero.recipe import shipped

REPOSITORY = Path(__file__).parents[4]
DEFAULTS = {"job-name": "run", "nodes": 2, "output": "slurm-%j.log"}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "model: {name: m}\ndata: {path: d, columns: {text: t, label: l}}\n"
    Path("recipe.yaml").write_text(text + "training: {output_dir: runs/a b}\nlaunch: {slurm: {account: lab}}\n")
    return "recipe.yaml"


def program(directory: Path, name: str, script: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/bash\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Installs an sbatch that prints and ends as told, and copies what it was given."""

    def install(answer: str, status: int = 0) -> None:
        keep = f'printf "%s\\n" "$@" > {tmp_path}/given; cp "${{@: -1}}" {tmp_path}/script'
        program(tmp_path / "bin", "sbatch", f"{keep}\n{answer}\nexit {status}")

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return install


# Options


def test_words_are_told_from_options():
    words = ["r.yaml", "--partition", "gpu", "training.seed=1", "--exclusive", "--time=1:00:00", "--json"]
    assert split_words(words) == (
        {"partition": "gpu", "exclusive": True, "time": "1:00:00"},
        ["r.yaml", "training.seed=1", "--json"],
    )


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("-p", "long names"),
        ("--training.seed=1", "without dashes"),
        ("--comment x\n#SBATCH --uid=0", "no option of sbatch has such a name"),
        ("--comment x=y", "no option of sbatch has such a name"),
        ("--$(id)=y", "no option of sbatch has such a name"),
        ("---wrap=id", "no option of sbatch has such a name"),
        ("--=y", "no option of sbatch has such a name"),
    ],
)
def test_words_that_are_neither_are_refused(word, complaint):
    with pytest.raises(UserError, match=complaint):
        split_words(["r.yaml", word])


def test_the_command_line_wins_over_the_recipe_over_the_defaults():
    options = job_options(DEFAULTS, {"job_name": "a", "time": "1-0", "requeue": None}, {"job-name": "b"}, 4, cpu=True)
    assert options["job-name"] == "b"
    assert options["time"] == "1-0"
    assert options["nodes"] == 2
    assert options["ntasks-per-node"] == 4
    assert options["signal"] == "B:USR1@120"
    assert "requeue" not in options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gres": "gpu:4"}, 4),
        ({"gres": "gpu:a100:2,license:1"}, 2),
        ({"gres": "shard:1"}, None),
        ({"gpus-per-node": "h100:8"}, 8),
        ({"gpus": "8", "nodes": 2}, 4),
        ({"tres-per-node": "gres/gpu:3"}, 3),
        ({}, None),
    ],
)
def test_gpus_of_a_node(options, expected):
    assert gpus_per_node(options) == expected


def test_auto_takes_a_rank_for_each_gpu():
    assert job_options(DEFAULTS, {}, {"gres": "gpu:4"}, "auto", cpu=False)["ntasks-per-node"] == 4
    assert job_options(DEFAULTS, {}, {"ntasks": "6"}, "auto", cpu=False)["ntasks-per-node"] == 3
    assert job_options(DEFAULTS, {}, {}, "auto", cpu=False)["ntasks-per-node"] == 1


@pytest.mark.parametrize(
    ("given", "ranks", "complaint"),
    [
        ({"gres": "gpu:2"}, 4, "4 ranks need as many GPUs, the job requests 2"),
        ({"gpus": "3"}, "auto", "3 cannot be split evenly over 2 nodes"),
        ({"array": "1-3"}, 1, "--array: not available for a submitted run"),
        ({"time": "2"}, 1, "leave no time to train"),
    ],
)
def test_what_a_submitted_run_cannot_have(given, ranks, complaint):
    with pytest.raises(UserError) as error:
        job_options(DEFAULTS, {}, given, ranks, cpu=False)
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-1", 90000), ("1-0:30", 88200), ("UNLIMITED", None)],
)
def test_time_limits(limit, expected):
    assert time_limit_seconds(limit) == expected


def test_log_path():
    assert log_path({"output": "a%%/%x-%j.log", "job-name": "n"}, "7") == "a%/n-7.log"
    assert sbatch_options.WARNING_SECONDS == 120


# The command


def test_dry_run_prints_the_script_and_writes_nothing(recipe, capsys):
    assert (
        main(["submit", recipe, "sparse.targets=[v_proj, 'o']", "--partition", "gpu", "--exclusive", "--dry-run"]) == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n")
    for line in ("#SBATCH --partition=gpu", "#SBATCH --exclusive", "#SBATCH --account=lab", "#SBATCH --requeue"):
        assert f"{line}\n" in out
    assert """ train recipe.yaml 'sparse.targets=[v_proj, '"'"'o'"'"']' """ in out
    assert "sbatch --parsable 'runs/a b/submit.sbatch'" in out
    assert sorted(path.name for path in Path().iterdir()) == [recipe]


def test_a_job_is_submitted_and_described(recipe, sbatch, capsys, tmp_path, monkeypatch):
    sbatch("echo 'welcome'; echo '42;east'")
    monkeypatch.setenv("SBATCH_ACCOUNT", "someone")
    assert main(["submit", recipe, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["job"], facts["cluster"]) == ("42", "east")
    assert facts["log"] == str(tmp_path / "runs/a b/slurm-42.log")
    assert facts["state"] == "squeue --clusters east --jobs 42"
    assert {"follow", "save_and_stop", "save_and_queue_again", "resume"} <= facts.keys()
    assert (tmp_path / "given").read_text() == "--parsable\nruns/a b/submit.sbatch\n"
    assert (tmp_path / "script").read_text() == Path("runs/a b/submit.sbatch").read_text()
    # Another job's script is left alone, the same is used again.
    assert main(["submit", recipe]) == 0
    assert main(["submit", recipe, "training.seed=3"]) == 0
    assert sorted(path.name for path in Path("runs/a b").iterdir()) == ["submit-2.sbatch", "submit.sbatch"]


@pytest.mark.parametrize("how", [["--dry-run"], ["--dry-run", "--json"], [], ["--json"]])
def test_values_reach_the_job_in_its_environment_only(recipe, sbatch, capsys, tmp_path, how):
    sbatch(f'printf "%s" "$A_TOKEN" > {tmp_path}/value; echo 4711')
    words = ["submit", recipe, "launch.environment.A_TOKEN=5ec2e7", "launch.environment={A_TOKEN: 5ec2e7, B: x5ec2e7}"]
    assert main([*words, *how]) == 0
    out, err = capsys.readouterr()
    assert "5ec2e7" not in out + err
    assert "launch.environment.A_TOKEN looks like a secret" in err
    if "--dry-run" in how:
        assert "launch.environment.A_TOKEN=null" in out
        return
    assert (tmp_path / "value").read_text() == "5ec2e7"
    script = Path("runs/a b/submit.sbatch").read_text()
    assert "launch.environment.A_TOKEN=null" in script
    assert "5ec2e7" not in script + (tmp_path / "given").read_text()
    assert 'A_TOKEN="${A_TOKEN?}"' in out.replace("\\", ""), "to resume, the variable must be set"


def test_what_sbatch_refuses_is_said_in_its_words_and_nothing_is_left(recipe, sbatch, capsys):
    sbatch("echo 'sbatch: error: invalid partition specified: gpu' >&2", status=1)
    assert main(["submit", recipe, "--partition=gpu"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "sparse-zero: error: sbatch rejects the job: invalid partition specified: gpu\n")
    assert not Path("runs").exists()


def test_unknown_options_stay_errors_of_other_commands(recipe, capsys):
    with pytest.raises(SystemExit):
        main(["train", recipe, "--partition=gpu"])
    assert "unrecognized arguments: --partition=gpu" in capsys.readouterr().err


# The scripts


def test_the_templates_are_what_submit_would_write():
    for name, text in render.scripts().items():
        assert (shipped.directory() / name).read_text() == text, f"run python -m launcher.jobs.render: {name} differs"


RUN = """
trap 'echo USR1 >> told; exit {stopped}' USR1
echo "$@" > words; echo $$ > started
{wait}
exit {status}
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Runs a script like submit's with a stand-in for `sparse-zero train`."""
    monkeypatch.chdir(tmp_path)
    program(tmp_path / "bin", "scontrol", 'echo "$@" >> asked; cat reason 2>/dev/null || true')
    (tmp_path / "script").write_text(batch_script("a job", {"nodes": 1}, "train 'a b'", ["export PREPARED=yes"]))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")

    def run(signum=None, status=0, stopped=75):
        wait = "for i in $(seq 200); do sleep 0.05; done" if signum else ""
        program(tmp_path / "bin", "train", RUN.format(wait=wait, status=status, stopped=stopped))
        script = subprocess.Popen(["bash", "script"], stdout=subprocess.PIPE, text=True, start_new_session=True)
        if signum:
            deadline = time.monotonic() + 20
            while not Path("started").exists() or not Path("started").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            script.send_signal(signum)
        said = script.communicate(timeout=30)[0]
        asked = Path("asked").read_text().splitlines() if Path("asked").exists() else []
        return script.returncode, asked, said

    return run


def test_a_run_that_ends_is_not_queued_again(job):
    assert job() == (0, [], "")
    assert Path("words").read_text().split() == [
        *("a", "b", "launch.launcher=slurm", "launch.nodes=2", "launch.processes_per_node=auto", "--resume"),
    ]


def test_a_failure_passes_through(job):
    assert job(status=2)[:2] == (2, [])


def test_the_warning_is_passed_on_and_the_stopped_run_queued_again_once(job):
    status, asked, said = job(signal.SIGUSR1)
    assert (status, asked) == (75, ["requeue 7"])
    assert Path("told").read_text() == "USR1\n"
    assert "job 7 is requeued, and will resume" in said


def test_a_task_of_an_array_is_queued_again_alone(job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert job(signal.SIGUSR1)[1] == ["requeue 5_3"]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("Reason=None PreemptTime=None", ["--oneliner show job 7"]),
        ("Reason=TimeLimit", ["--oneliner show job 7", "requeue 7"]),
        ("PreemptTime=2026-01-01T00:00:00", ["--oneliner show job 7", "requeue 7"]),
    ],
)
def test_a_term_queues_again_only_where_it_was_not_the_users(job, reason, expected):
    Path("reason").write_text(reason)
    status, asked, output = job(signal.SIGTERM)
    assert (status, asked) == (75, expected)
    assert ("was told to stop" in output) == ("requeue 7" not in expected)
    assert Path("told").read_text() == "USR1\n"
