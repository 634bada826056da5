"""When a run is started again, on which hosts and from what; the ranks themselves are not started here."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import processes, supervise
from launcher.processes import Ending
from launcher.ways import launchers, preflight, reachability
from launcher.ways.command import Command
from sparse_zero.errors import UserError
from sparse_zero.ranks.stop_signals import STOPPED
from sparse_zero.ranks.watchdog import Address, Watchdog
from sparse_zero.recipe.recipe import Recipe

WORDS = ["sparse_zero.train", "recipe.yaml"]
DIED = Ending(137, stopped=False)
DONE = Ending(0, stopped=False)


@pytest.fixture(autouse=True)
def three_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\nn3 slots=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervise, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(launchers, "address_towards", lambda host: "n0")
    monkeypatch.setattr(reachability, "unreachable_hosts", lambda names: {})


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Command]]:
    """Sets how each attempt ends. Returns: the list in which their commands will be."""

    def attempts(*endings: Ending) -> list[Command]:
        made: list[Command] = []
        left = list(endings)

        def run(command: Command, watchdog: Watchdog, stdout: Any, grace_seconds: float) -> Ending:
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
def test_what_another_start_would_not_change_is_final(attempts, status: int) -> None:
    made = attempts(Ending(status, stopped=False))
    assert supervise.run(recipe(), WORDS).status == status
    assert len(made) == 1


def test_a_run_that_was_told_to_stop_stays_stopped(attempts) -> None:
    made = attempts(Ending(143, stopped=True))
    assert supervise.run(recipe(), WORDS) == Ending(143, stopped=True)
    assert len(made) == 1


def test_a_run_is_started_again_as_often_as_it_may(attempts, capsys) -> None:
    made = attempts(DIED, Ending(1, stopped=False, is_explained=True), DIED, Ending(9, stopped=False))
    assert supervise.run(recipe(), WORDS).status == 9
    assert len(made) == 4
    said = capsys.readouterr().err.splitlines()
    assert said == [f"sparse-zero: starting again on n1, n2, n3 (restart {count} of 3)" for count in (1, 2, 3)]


@pytest.mark.parametrize("ending", [DIED, Ending(1, stopped=False)])
def test_without_restarts_the_first_ending_is_the_last(attempts, ending: Ending, capsys) -> None:
    made = attempts(ending)
    assert supervise.run(recipe(max_restarts=0), WORDS) == ending
    assert (len(made), capsys.readouterr().err) == (1, "")


def test_a_success_ends_the_restarts(attempts) -> None:
    made = attempts(DIED, DONE)
    assert supervise.run(recipe(), WORDS) == DONE
    assert len(made) == 2


def test_a_machine_alone_is_started_again_too(attempts, capsys, monkeypatch) -> None:
    monkeypatch.setattr(reachability, "unreachable_hosts", lambda names: pytest.fail("this machine was asked for"))
    made = attempts(DIED, DONE)
    assert supervise.run(recipe(launcher="local", hostfile=None, processes_per_node=2), WORDS) == DONE
    assert len(made) == 2
    assert capsys.readouterr().err == "sparse-zero: starting again (restart 1 of 3)\n"


# Which hosts


def test_all_hosts_are_needed_unless_fewer_will_do(attempts, capsys, monkeypatch) -> None:
    made = attempts(DIED)
    lose(monkeypatch, "n2")
    assert supervise.run(recipe(), WORDS) == DIED
    assert len(made) == 1
    assert capsys.readouterr().err == (
        "sparse-zero: not starting again on 2 of 3 hosts, 3 are needed (all of them; launch.min_nodes would allow "
        "fewer): n2: no route\n"
    )


def test_a_run_goes_on_with_fewer_hosts_and_again_with_all(attempts, monkeypatch, capsys) -> None:
    made = attempts(DIED, DIED, DONE)
    answers = iter([{"n1": "no route"}, {}])
    monkeypatch.setattr(reachability, "unreachable_hosts", lambda names: next(answers))
    assert supervise.run(recipe(min_nodes=2), WORDS) == DONE
    hostfiles = [command.files["out/launch/hostfile"].split()[::2] for command in made]
    assert hostfiles == [["n1", "n2", "n3"], ["n2", "n3"], ["n1", "n2", "n3"]]
    assert [command.world_size for command in made] == [3, 2, 3]
    assert made[1].environment["MASTER_ADDR"] == "n2"
    assert "starting again on n2, n3 (restart 1 of 3)" in capsys.readouterr().err


def test_fewer_than_the_fewest_are_not_started(attempts, capsys, monkeypatch) -> None:
    made = attempts(DIED)
    lose(monkeypatch, "n1", "n3")
    assert supervise.run(recipe(min_nodes=2), WORDS) == DIED
    assert len(made) == 1
    said = capsys.readouterr().err
    assert "not starting again on 1 of 3 hosts, 2 are needed (launch.min_nodes): n1: no route; n3: no route" in said


def test_a_host_that_cannot_be_reached_is_refused_before_the_start(monkeypatch) -> None:
    preflight.check_hosts(recipe())
    lose(monkeypatch, "n3")
    with pytest.raises(UserError, match=r"launch\.hostfile: 1 of 3 hosts cannot be reached: n3: no route"):
        preflight.check_hosts(recipe())


# From what


def test_a_run_goes_on_from_its_own_checkpoint(attempts) -> None:
    made = attempts(DIED, DONE)
    checkpoint("checkpoint-4")
    supervise.run(recipe(), [*WORDS, "--merge", "--resume=runs/other/checkpoint-9"])
    assert [words_of(command) for command in made] == [
        [*WORDS, "--merge", "--resume=runs/other/checkpoint-9"],
        [*WORDS, "--merge", "--resume=auto"],
    ]


@pytest.mark.parametrize("words", [WORDS, [*WORDS, "--resume=runs/other/checkpoint-9"]])
def test_without_a_checkpoint_it_starts_as_it_did(attempts, words: list[str]) -> None:
    """training.resume_from_checkpoint would not be heeded beside --resume."""
    made = attempts(DIED, DONE)
    checkpoint("checkpoint-4.tmp-3f")
    checkpoint("checkpoint-2.deleted-3f")
    (Path("out") / "checkpoint-3").mkdir()
    supervise.run(recipe(), words)
    assert [words_of(command) for command in made] == [words, words]


def test_a_checkpoint_that_was_being_replaced_counts() -> None:
    checkpoint("checkpoint-4.replaced")
    assert supervise._resumed(WORDS, Path("out")) == [*WORDS, "--resume=auto"]


# The watchdog


def test_each_attempt_has_a_watchdog_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(command: Command, watchdog: Watchdog, stdout: Any, grace_seconds: float) -> Ending:
        address = Address.parse(command.environment["SPARSE_ZERO_WATCH"])
        assert address == watchdog.address
        assert Path("out/launch/hostfile").is_file()
        assert grace_seconds == 7
        assert (watchdog._silence_seconds, watchdog._arrival_seconds, watchdog._world_size) == (8, 9, 3)
        seen.append((watchdog, address))
        return DIED if len(seen) == 1 else DONE

    monkeypatch.setattr(processes, "run", run)
    supervise.run(recipe(grace_seconds=7, silence_seconds=8, rendezvous_seconds=9), WORDS)
    (first, old), (second, new) = seen
    assert old.host == new.host == "n0"
    assert old.token != new.token
    assert not first._thread.is_alive()
    assert not second._thread.is_alive()


def test_a_step_that_waits_in_a_queue_may_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Command, watchdog: Watchdog, stdout: Any, grace_seconds: float) -> Ending:
        assert watchdog._arrival_deadline is None
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

    def run(*arguments: Any) -> Ending:
        raise UserError("mpirun: No such file or directory")

    monkeypatch.setattr(supervise, "Watchdog", Recorded)
    monkeypatch.setattr(processes, "run", run)
    with pytest.raises(UserError, match="No such file"):
        supervise.run(recipe(), WORDS)
    assert [watchdog._thread.is_alive() for watchdog in opened] == [False]


def test_the_hosts_are_those_of_the_recipe() -> None:
    assert launchers.host_names(recipe(include="n3@n1")) == ["n1", "n3"]
