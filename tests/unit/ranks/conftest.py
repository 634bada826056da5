"""Fixtures of the watchdog's tests."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rank_processes import RankProcess

from sparse_zero.ranks.failures import Outcome
from sparse_zero.ranks.watchdog import Watchdog


@pytest.fixture
def outcomes() -> list[Outcome]:
    """The outcomes that the watchdog has reported."""
    return []


@pytest.fixture
def open_watchdog(outcomes: list[Outcome]) -> Iterator[Callable[..., Watchdog]]:
    with contextlib.ExitStack() as opened:

        def open_watchdog(
            on_outcome: Callable[[Outcome], None] = outcomes.append, host: str = "127.0.0.1"
        ) -> Watchdog:
            watchdog = Watchdog(on_outcome, silence_seconds=30, host=host)
            opened.callback(watchdog.close)
            return watchdog

        yield open_watchdog


@pytest.fixture
def start() -> Iterator[Callable[..., RankProcess]]:
    started = []

    def start(*arguments: Any, **settings: Any) -> RankProcess:
        started.append(RankProcess(*arguments, **settings))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()
