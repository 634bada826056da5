"""When a run is restarted, on which hosts and from which checkpoint. No ranks are started here."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import processes, supervise
from launcher.processes import RunExit
from launcher.ways import launchers, preflight, reachability
from launcher.ways.command import Command
from sparse_zero.errors import UserError
from sparse_zero.ranks.stop_signals import STOPPED
from sparse_zero.ranks.watchdog import Address, Watchdog
from sparse_zero.recipe.recipe import Recipe

WORDS = ["sparse_zero.train", "recipe.yaml"]
DIED = RunExit(137, stopped=False)
DONE = RunExit(0, stopped=False)


@pytest.fixture(autouse=True)
def three_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\nn3 slots=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervise, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(launchers, "address_towards", lambda host: "n0")
    monkeypatch.setattr(reachability, "unreachable_hosts", lambda names: {})


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Command]]:
    """Returns: a function that sets how each attempt exits, and returns the list of the attempts' commands."""

    def attempts(*results: RunExit) -> list[Command]:
        made: list[Command] = []
        left = list(results)

        def run(command: Command, watchdog: Watchdog, stdout: Any, grace_seconds: float) -> RunExit:
            made.append(command)
            return left.pop(0)

        monkeypatch.setattr(processes, "run", run)
        return made

    return attempts


def recipe(**launch: Any) -> Recipe:
    raw = {"model": {"name": "m"}, "data": {"path": "d", "columns": {"text": "t", "label": "l"}}}
    launch = {"launcher": "mpi", "hostfile": "hosts", "max_restarts": 3} | launch
    return Recipe.model_validate(raw | {"launch": launch, "training": {"output_dir": "out"}})


def lose(monkeypatch: pytest.MonkeyPatch, *lost: str) -> None:
    monkeypatch.setattr(
        reachability, "unreachable_hosts", lambda names: {name: "no route" for name in names if name in lost}
    )


def words_of(command: Command) -> list[str]:
    return command.argv[command.argv.index(WORDS[0]) :]


def checkpoint(name: str) -> None:
    directory = Path("out") / name
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text("{}")


@pytest.mark.parametrize("status", [0, 2, STOPPED])
def test_an_exit_status_that_a_restart_would_not_change(attempts, status: int) -> None:
    made = attempts(RunExit(status, stopped=False))
    assert supervise.run(recipe(), WORDS).status == status
    assert len(made) == 1


def test_a_run_that_was_told_to_stop_stays_stopped(attempts) -> None:
    made = attempts(RunExit(143, stopped=True))
    assert supervise.run(recipe(), WORDS) == RunExit(143, stopped=True)
    assert len(made) == 1


def test_a_run_is_restarted_max_restarts_times(attempts, capsys) -> None:
    made = attempts(DIED, RunExit(1, stopped=False, is_explained=True), DIED, RunExit(9, stopped=False))
    assert supervise.run(recipe(), WORDS).status == 9
    assert len(made) == 4
    said = capsys.readouterr().err.splitlines()
    assert said == [f"sparse-zero: restarting on n1, n2, n3 (restart {count} of 3)" for count in (1, 2, 3)]


@pytest.mark.parametrize("result", [DIED, RunExit(1, stopped=False)])
def test_without_restarts_there_is_one_attempt(attempts, result: RunExit, capsys) -> None:
    made = attempts(result)
    assert supervise.run(recipe(max_restarts=0), WORDS) == result
    assert (len(made), capsys.readouterr().err) == (1, "")


def test_a_success_ends_the_restarts(attempts) -> None:
    made = attempts(DIED, DONE)
    assert supervise.run(recipe(), WORDS) == DONE
    assert len(made) == 2


def test_a_run_on_this_machine_alone_is_restarted(attempts, capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        reachability, "unreachable_hosts", lambda names: pytest.fail("this machine was probed with ssh")
    )
    made = attempts(DIED, DONE)
    assert supervise.run(recipe(launcher="local", hostfile=None, processes_per_node=2), WORDS) == DONE
    assert len(made) == 2
    assert capsys.readouterr().err == "sparse-zero: restarting (restart 1 of 3)\n"


# Which hosts


def test_all_hosts_are_needed_without_min_nodes(attempts, capsys, monkeypatch) -> None:
    made = attempts(DIED)
    lose(monkeypatch, "n2")
    assert supervise.run(recipe(), WORDS) == DIED
    assert len(made) == 1
    assert capsys.readouterr().err == (
        "sparse-zero: not restarting: 2 of 3 hosts can be reached, 3 needed (all of them, as launch.min_nodes is not "
        "set): n2: no route\n"
    )


def test_a_run_continues_on_fewer_hosts_and_then_on_all(attempts, monkeypatch, capsys) -> None:
    made = attempts(DIED, DIED, DONE)
    answers = iter([{"n1": "no route"}, {}])
    monkeypatch.setattr(reachability, "unreachable_hosts", lambda names: next(answers))
    assert supervise.run(recipe(min_nodes=2), WORDS) == DONE
    hostfiles = [command.files["out/launch/hostfile"].split()[::2] for command in made]
    assert hostfiles == [["n1", "n2", "n3"], ["n2", "n3"], ["n1", "n2", "n3"]]
    assert [command.world_size for command in made] == [3, 2, 3]
    assert made[1].environment["MASTER_ADDR"] == "n2"
    assert "restarting on n2, n3 (restart 1 of 3)" in capsys.readouterr().err


def test_fewer_hosts_than_min_nodes(attempts, capsys, monkeypatch) -> None:
    made = attempts(DIED)
    lose(monkeypatch, "n1", "n3")
    assert supervise.run(recipe(min_nodes=2), WORDS) == DIED
    assert len(made) == 1
    said = capsys.readouterr().err
    assert (
        "not restarting: 1 of 3 hosts can be reached, 2 needed (launch.min_nodes): n1: no route; n3: no route" in said
    )


def test_an_unreachable_host_is_an_error_before_the_start(monkeypatch) -> None:
    preflight.check_hosts(recipe())
    lose(monkeypatch, "n3")
    with pytest.raises(UserError, match=r"launch\.hostfile: 1 of 3 hosts cannot be reached: n3: no route"):
        preflight.check_hosts(recipe())


# From which checkpoint


ASKED = ["--resume=out/checkpoint-4", "--reset=learning_rate"]


@pytest.mark.parametrize("saved", ["checkpoint-6", "checkpoint-9", "checkpoint-9.replaced"])
def test_a_restart_resumes_from_what_the_run_has_saved(attempts, monkeypatch, saved: str) -> None:
    """Also if it is as old as one that was there before the run left it."""
    made = attempts(DIED, DONE)
    for name in ("checkpoint-4", "checkpoint-9"):
        checkpoint(name)
    before_the_restart(monkeypatch, saved)
    supervise.run(recipe(), [*WORDS, "--merge", *ASKED])
    assert [words_of(command) for command in made] == [
        [*WORDS, "--merge", *ASKED],
        [*WORDS, "--merge", "--resume=auto"],
    ]


@pytest.mark.parametrize("saved", [None, "checkpoint-7.tmp-3f"])
def test_a_restart_before_the_first_save_resumes_from_what_was_asked_for(attempts, monkeypatch, saved) -> None:
    """The newest checkpoint is of the branch that was left, or older than the one that was asked for."""
    made = attempts(DIED, DONE)
    for name in ("checkpoint-4", "checkpoint-9"):
        checkpoint(name)
    if saved:
        before_the_restart(monkeypatch, saved)
    supervise.run(recipe(), [*WORDS, *ASKED])
    assert [words_of(command) for command in made] == [[*WORDS, *ASKED]] * 2


def before_the_restart(monkeypatch: pytest.MonkeyPatch, saved: str) -> None:
    """The first attempt moves checkpoint-9 aside, and saves another."""

    def act() -> None:
        (Path("out") / "abandoned").mkdir()
        (Path("out") / "checkpoint-9").rename(Path("out") / "abandoned" / "checkpoint-9")
        checkpoint(saved)

    sleep = supervise.time.sleep
    monkeypatch.setattr(supervise, "time", SimpleNamespace(sleep=lambda seconds: (sleep(seconds), act())))


@pytest.mark.parametrize("words", [WORDS, [*WORDS, "--resume=runs/other/checkpoint-9"]])
def test_without_a_checkpoint_it_starts_as_it_did(attempts, words: list[str]) -> None:
    """--resume takes precedence over training.resume_from_checkpoint."""
    made = attempts(DIED, DONE)
    checkpoint("checkpoint-4.tmp-3f")
    checkpoint("checkpoint-2.deleted-3f")
    (Path("out") / "checkpoint-3").mkdir()
    supervise.run(recipe(), words)
    assert [words_of(command) for command in made] == [words, words]


# The watchdog


def test_each_attempt_has_a_new_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(command: Command, watchdog: Watchdog, stdout: Any, grace_seconds: float) -> RunExit:
        address = Address.parse(command.private["SPARSE_ZERO_WATCH"])
        assert address == watchdog.address
        assert watchdog.on_last_join == command.remove_private_file
        assert str(watchdog.address) not in repr([command.argv, command.environment, command.files])
        assert grace_seconds == 7
        assert (watchdog._silence_seconds, watchdog._join_seconds, watchdog._world_size) == (8, 9, 3)
        seen.append((watchdog, address))
        return DIED if len(seen) == 1 else DONE

    monkeypatch.setattr(processes, "run", run)
    supervise.run(recipe(grace_seconds=7, silence_seconds=8, rendezvous_seconds=9), WORDS)
    (first, old), (second, new) = seen
    assert old.host == new.host == "n0"
    assert old.token != new.token
    assert not first._thread.is_alive()
    assert not second._thread.is_alive()


def test_there_is_no_deadline_for_a_step_in_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Command, watchdog: Watchdog, stdout: Any, grace_seconds: float) -> RunExit:
        assert watchdog._join_deadline is None
        return DONE

    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    monkeypatch.setattr(processes, "run", run)
    assert supervise.run(recipe(launcher="slurm", hostfile=None), WORDS) == DONE


def test_a_start_that_fails_closes_its_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Recorded(Watchdog):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            opened.append(self)

    def run(*arguments: Any) -> RunExit:
        raise UserError("mpirun: No such file or directory")

    monkeypatch.setattr(supervise, "Watchdog", Recorded)
    monkeypatch.setattr(processes, "run", run)
    with pytest.raises(UserError, match="No such file"):
        supervise.run(recipe(), WORDS)
    assert [watchdog._thread.is_alive() for watchdog in opened] == [False]


def test_the_hosts_are_those_of_the_recipe() -> None:
    assert launchers.host_names(recipe(include="n3@n1")) == ["n1", "n3"]
