"""Of all that ranks say when a run ends, what is taken for the cause, and the line that the user reads."""

import itertools
import random

import pytest

from sparse_zero.verdict import DIED, Member, Trouble, judge, say_silent

HOSTS = ["n1", "n1", "n2", "n2"]
MEMBERS = {rank: Member(rank, host, 100 + rank, f"logs/rank-{rank}.log") for rank, host in enumerate(HOSTS)}


def failure(rank: int, message: str = "ValueError: no", traceback: str = "Traceback\n") -> Trouble:
    return Trouble(rank, "failure", message, traceback)


def refusal(rank: int, message: str = "no such column") -> Trouble:
    return Trouble(rank, "refusal", message, status=2)


def test_a_failure_is_said_with_its_rank_host_log_and_traceback() -> None:
    verdict = judge([failure(2)], MEMBERS)
    assert verdict.message == "rank 2 on n2 failed: ValueError: no; its log is logs/rank-2.log"
    assert (verdict.status, verdict.ranks, verdict.traceback, verdict.is_error) == (1, (2,), "Traceback\n", True)


def test_of_failures_the_first_is_the_cause() -> None:
    verdict = judge([failure(3, "first", "third's\n"), failure(0, "echo", "echo's\n")], MEMBERS)
    assert (verdict.ranks, verdict.traceback) == ((3,), "third's\n")
    assert "rank 3 on n2 failed: first;" in verdict.message
    assert "echo" not in verdict.message


OTHERS = [failure(2), refusal(3), Trouble(0, "end", "was told to stop", status=75)]


@pytest.mark.parametrize("order", itertools.permutations(OTHERS))
def test_of_ranks_that_speak_the_first_is_the_cause(order: tuple[Trouble, ...]) -> None:
    """The others fail because it left, or are told to end because it failed."""
    assert judge(order, MEMBERS) == judge(order[:1], MEMBERS)


@pytest.mark.parametrize("seed", range(5))
def test_a_rank_that_is_gone_is_the_cause_whatever_came_first(seed: int) -> None:
    gravest_first = [Trouble(0, "death"), Trouble(1, "silence"), Trouble(9, "absence")]
    for start in range(len(gravest_first)):
        here = gravest_first[start:] + OTHERS
        random.Random(seed).shuffle(here)
        assert judge(here, MEMBERS, 30) == judge([gravest_first[start]], MEMBERS, 30)


def test_a_dead_rank_is_named_with_its_process_and_log() -> None:
    verdict = judge([failure(0), Trouble(2, "death")], MEMBERS)
    assert verdict.message == f"rank 2 on n2 (process 102) {DIED}; its log is logs/rank-2.log"
    assert (verdict.status, verdict.ranks, verdict.traceback, verdict.is_error) == (1, (2,), "", True)


def test_dead_ranks_are_named_by_host_and_once() -> None:
    dead = [Trouble(rank, "death") for rank in (3, 1, 0, 1)]
    verdict = judge(dead, MEMBERS)
    assert verdict.message.startswith(f"ranks 0, 1 on n1 and rank 3 on n2 (process 103) {DIED}")
    assert verdict.ranks == (0, 1, 3)


def test_of_many_ranks_the_first_eight_are_named() -> None:
    members = {rank: Member(rank, "n1", rank) for rank in range(12)}
    verdict = judge([Trouble(rank, "death") for rank in range(12)], members)
    assert verdict.message == f"ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more on n1 {DIED}"
    assert verdict.ranks == tuple(range(12))


def test_what_every_rank_refuses_is_no_matter_of_a_host() -> None:
    verdict = judge([refusal(rank) for rank in (2, 0, 3, 1)], MEMBERS)
    assert judge([refusal(1), refusal(2)], MEMBERS).message == "rank 1 on n1: no such column"
    assert (verdict.message, verdict.status, verdict.is_error) == ("no such column", 2, True)
    assert verdict.ranks == (2, 0, 3, 1)


def test_what_one_rank_refuses_is_said_of_its_host() -> None:
    verdict = judge([refusal(2, "no such file"), refusal(0, "another thing")], MEMBERS)
    assert (verdict.message, verdict.status, verdict.ranks) == ("rank 2 on n2: no such file", 2, (2,))


def test_silent_ranks_are_said_as_their_host() -> None:
    verdict = judge([failure(0), Trouble(3, "silence"), Trouble(2, "silence")], MEMBERS, 12.5)
    assert verdict.message == f"n2 (ranks 2, 3) {say_silent(12.5)}; its log is logs/rank-2.log"
    assert "has not answered for 12.5 s" in verdict.message
    assert (verdict.status, verdict.ranks) == (1, (2, 3))


def test_absent_ranks_are_named_beside_those_that_are_there() -> None:
    there = {0: MEMBERS[0], 3: MEMBERS[3]}
    verdict = judge([Trouble(1, "absence"), Trouble(2, "absence")], there, 300)
    assert verdict.message == (
        "ranks 1, 2 did not come within 300 s (launch.rendezvous_seconds); there: rank 0 on n1, rank 3 on n2"
    )
    assert judge([Trouble(0, "absence")], {}, 0.5).message == (
        "rank 0 did not come within 0.5 s (launch.rendezvous_seconds)"
    )


def test_an_end_by_itself_is_no_error_and_keeps_its_status() -> None:
    verdict = judge([Trouble(1, "end", "was told to stop", status=75)], MEMBERS)
    assert verdict.message == "rank 1 on n1 was told to stop"
    assert (verdict.status, verdict.is_error, verdict.traceback) == (75, False, "")


def test_a_rank_without_a_log_is_not_said_to_have_one() -> None:
    members = {0: Member(0, "n1", 7)}
    assert judge([failure(0)], members).message == "rank 0 on n1 failed: ValueError: no"
    assert judge([Trouble(0, "death")], members).message.endswith(DIED)
