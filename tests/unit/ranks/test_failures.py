"""Which of the failures is the root cause, and the line that the user reads."""

import itertools
import random

import pytest

from sparse_zero.ranks.failures import DIED, Failure, RankInfo, find_root_cause, unreachable_message

HOSTS = ["n1", "n1", "n2", "n2"]
RANKS = {rank: RankInfo(rank, host, 100 + rank, f"logs/rank-{rank}.log") for rank, host in enumerate(HOSTS)}


def exception(rank: int, message: str = "ValueError: no", traceback: str = "Traceback\n") -> Failure:
    return Failure(rank, "exception", message, traceback)


def user_error(rank: int, message: str = "no such column") -> Failure:
    return Failure(rank, "user_error", message, status=2)


def test_an_exception_is_reported_with_its_rank_host_log_and_traceback() -> None:
    outcome = find_root_cause([exception(2)], RANKS)
    assert outcome.message == "rank 2 on n2 failed: ValueError: no; its log is logs/rank-2.log"
    assert (outcome.status, outcome.ranks, outcome.traceback, outcome.is_error) == (1, (2,), "Traceback\n", True)


def test_the_first_exception_is_the_cause() -> None:
    outcome = find_root_cause([exception(3, "first", "third's\n"), exception(0, "second", "rank 0's\n")], RANKS)
    assert (outcome.ranks, outcome.traceback) == ((3,), "third's\n")
    assert "rank 3 on n2 failed: first;" in outcome.message
    assert "second" not in outcome.message


REPORTED = [exception(2), user_error(3), Failure(0, "stopped", "received a stop request", status=75)]


@pytest.mark.parametrize("order", itertools.permutations(REPORTED))
def test_the_first_reported_failure_is_the_cause(order: tuple[Failure, ...]) -> None:
    """The other ranks fail because this rank is gone, or are ended because it failed."""
    assert find_root_cause(order, RANKS) == find_root_cause(order[:1], RANKS)


@pytest.mark.parametrize("seed", range(5))
def test_a_rank_that_is_gone_is_the_cause_in_any_order(seed: int) -> None:
    most_severe_first = [Failure(0, "died"), Failure(1, "unreachable"), Failure(9, "missing")]
    for start in range(len(most_severe_first)):
        failures = most_severe_first[start:] + REPORTED
        random.Random(seed).shuffle(failures)
        assert find_root_cause(failures, RANKS, 30) == find_root_cause([most_severe_first[start]], RANKS, 30)


def test_a_dead_rank_is_named_with_its_process_and_log() -> None:
    outcome = find_root_cause([exception(0), Failure(2, "died")], RANKS)
    assert outcome.message == f"rank 2 on n2 (process 102) {DIED}; its log is logs/rank-2.log"
    assert (outcome.status, outcome.ranks, outcome.traceback, outcome.is_error) == (1, (2,), "", True)


def test_dead_ranks_are_named_by_host_and_once() -> None:
    dead = [Failure(rank, "died") for rank in (3, 1, 0, 1)]
    outcome = find_root_cause(dead, RANKS)
    assert outcome.message.startswith(f"ranks 0, 1 on n1 and rank 3 on n2 (process 103) {DIED}")
    assert outcome.ranks == (0, 1, 3)


def test_of_many_ranks_the_first_eight_are_named() -> None:
    ranks = {rank: RankInfo(rank, "n1", rank) for rank in range(12)}
    outcome = find_root_cause([Failure(rank, "died") for rank in range(12)], ranks)
    assert outcome.message == f"ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more on n1 {DIED}"
    assert outcome.ranks == tuple(range(12))


def test_a_user_error_of_all_ranks_names_no_host() -> None:
    outcome = find_root_cause([user_error(rank) for rank in (2, 0, 3, 1)], RANKS)
    assert find_root_cause([user_error(1), user_error(2)], RANKS).message == "rank 1 on n1: no such column"
    assert (outcome.message, outcome.status, outcome.is_error) == ("no such column", 2, True)
    assert outcome.ranks == (2, 0, 3, 1)


def test_a_user_error_of_one_rank_names_its_host() -> None:
    outcome = find_root_cause([user_error(2, "no such file"), user_error(0, "another error")], RANKS)
    assert (outcome.message, outcome.status, outcome.ranks) == ("rank 2 on n2: no such file", 2, (2,))


def test_unreachable_ranks_are_reported_by_host() -> None:
    outcome = find_root_cause([exception(0), Failure(3, "unreachable"), Failure(2, "unreachable")], RANKS, 12.5)
    assert outcome.message == f"n2 (ranks 2, 3) {unreachable_message(12.5)}; its log is logs/rank-2.log"
    assert "has not answered for 12.5 s" in outcome.message
    assert (outcome.status, outcome.ranks) == (1, (2, 3))


def test_missing_ranks_are_reported_with_those_that_have_joined() -> None:
    joined = {0: RANKS[0], 3: RANKS[3]}
    outcome = find_root_cause([Failure(1, "missing"), Failure(2, "missing")], joined, 300)
    assert outcome.message == (
        "ranks 1, 2 did not join within 300 s (launch.rendezvous_seconds); joined: rank 0 on n1, rank 3 on n2"
    )
    assert find_root_cause([Failure(0, "missing")], {}, 0.5).message == (
        "rank 0 did not join within 0.5 s (launch.rendezvous_seconds)"
    )


def test_a_stop_on_request_is_no_error_and_keeps_its_status() -> None:
    outcome = find_root_cause([Failure(1, "stopped", "received a stop request", status=75)], RANKS)
    assert outcome.message == "rank 1 on n1 received a stop request"
    assert (outcome.status, outcome.is_error, outcome.traceback) == (75, False, "")


def test_no_log_is_mentioned_if_the_rank_has_none() -> None:
    ranks = {0: RankInfo(0, "n1", 7)}
    assert find_root_cause([exception(0)], ranks).message == "rank 0 on n1 failed: ValueError: no"
    assert find_root_cause([Failure(0, "died")], ranks).message.endswith(DIED)
