"""Of all that ranks say when a run ends, what is taken for the cause, and the line that the user reads."""

import itertools
import random

import pytest

from sparse_zero.ranks.failures import DIED, Failure, Member, find_cause, say_silent

HOSTS = ["n1", "n1", "n2", "n2"]
MEMBERS = {rank: Member(rank, host, 100 + rank, f"logs/rank-{rank}.log") for rank, host in enumerate(HOSTS)}


def failure(rank: int, message: str = "ValueError: no", traceback: str = "Traceback\n") -> Failure:
    return Failure(rank, "failure", message, traceback)


def refusal(rank: int, message: str = "no such column") -> Failure:
    return Failure(rank, "refusal", message, status=2)


def test_a_failure_is_said_with_its_rank_host_log_and_traceback() -> None:
    outcome = find_cause([failure(2)], MEMBERS)
    assert outcome.message == "rank 2 on n2 failed: ValueError: no; its log is logs/rank-2.log"
    assert (outcome.status, outcome.ranks, outcome.traceback, outcome.is_error) == (1, (2,), "Traceback\n", True)


def test_of_failures_the_first_is_the_cause() -> None:
    outcome = find_cause([failure(3, "first", "third's\n"), failure(0, "echo", "echo's\n")], MEMBERS)
    assert (outcome.ranks, outcome.traceback) == ((3,), "third's\n")
    assert "rank 3 on n2 failed: first;" in outcome.message
    assert "echo" not in outcome.message


OTHERS = [failure(2), refusal(3), Failure(0, "end", "was told to stop", status=75)]


@pytest.mark.parametrize("order", itertools.permutations(OTHERS))
def test_of_ranks_that_speak_the_first_is_the_cause(order: tuple[Failure, ...]) -> None:
    """The others fail because it left, or are told to end because it failed."""
    assert find_cause(order, MEMBERS) == find_cause(order[:1], MEMBERS)


@pytest.mark.parametrize("seed", range(5))
def test_a_rank_that_is_gone_is_the_cause_whatever_came_first(seed: int) -> None:
    gravest_first = [Failure(0, "death"), Failure(1, "silence"), Failure(9, "absence")]
    for start in range(len(gravest_first)):
        here = gravest_first[start:] + OTHERS
        random.Random(seed).shuffle(here)
        assert find_cause(here, MEMBERS, 30) == find_cause([gravest_first[start]], MEMBERS, 30)


def test_a_dead_rank_is_named_with_its_process_and_log() -> None:
    outcome = find_cause([failure(0), Failure(2, "death")], MEMBERS)
    assert outcome.message == f"rank 2 on n2 (process 102) {DIED}; its log is logs/rank-2.log"
    assert (outcome.status, outcome.ranks, outcome.traceback, outcome.is_error) == (1, (2,), "", True)


def test_dead_ranks_are_named_by_host_and_once() -> None:
    dead = [Failure(rank, "death") for rank in (3, 1, 0, 1)]
    outcome = find_cause(dead, MEMBERS)
    assert outcome.message.startswith(f"ranks 0, 1 on n1 and rank 3 on n2 (process 103) {DIED}")
    assert outcome.ranks == (0, 1, 3)


def test_of_many_ranks_the_first_eight_are_named() -> None:
    members = {rank: Member(rank, "n1", rank) for rank in range(12)}
    outcome = find_cause([Failure(rank, "death") for rank in range(12)], members)
    assert outcome.message == f"ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more on n1 {DIED}"
    assert outcome.ranks == tuple(range(12))


def test_what_every_rank_refuses_is_no_matter_of_a_host() -> None:
    outcome = find_cause([refusal(rank) for rank in (2, 0, 3, 1)], MEMBERS)
    assert find_cause([refusal(1), refusal(2)], MEMBERS).message == "rank 1 on n1: no such column"
    assert (outcome.message, outcome.status, outcome.is_error) == ("no such column", 2, True)
    assert outcome.ranks == (2, 0, 3, 1)


def test_what_one_rank_refuses_is_said_of_its_host() -> None:
    outcome = find_cause([refusal(2, "no such file"), refusal(0, "another thing")], MEMBERS)
    assert (outcome.message, outcome.status, outcome.ranks) == ("rank 2 on n2: no such file", 2, (2,))


def test_silent_ranks_are_said_as_their_host() -> None:
    outcome = find_cause([failure(0), Failure(3, "silence"), Failure(2, "silence")], MEMBERS, 12.5)
    assert outcome.message == f"n2 (ranks 2, 3) {say_silent(12.5)}; its log is logs/rank-2.log"
    assert "has not answered for 12.5 s" in outcome.message
    assert (outcome.status, outcome.ranks) == (1, (2, 3))


def test_absent_ranks_are_named_beside_those_that_are_there() -> None:
    there = {0: MEMBERS[0], 3: MEMBERS[3]}
    outcome = find_cause([Failure(1, "absence"), Failure(2, "absence")], there, 300)
    assert outcome.message == (
        "ranks 1, 2 did not come within 300 s (launch.rendezvous_seconds); there: rank 0 on n1, rank 3 on n2"
    )
    assert find_cause([Failure(0, "absence")], {}, 0.5).message == (
        "rank 0 did not come within 0.5 s (launch.rendezvous_seconds)"
    )


def test_an_end_by_itself_is_no_error_and_keeps_its_status() -> None:
    outcome = find_cause([Failure(1, "end", "was told to stop", status=75)], MEMBERS)
    assert outcome.message == "rank 1 on n1 was told to stop"
    assert (outcome.status, outcome.is_error, outcome.traceback) == (75, False, "")


def test_a_rank_without_a_log_is_not_said_to_have_one() -> None:
    members = {0: Member(0, "n1", 7)}
    assert find_cause([failure(0)], members).message == "rank 0 on n1 failed: ValueError: no"
    assert find_cause([Failure(0, "death")], members).message.endswith(DIED)
