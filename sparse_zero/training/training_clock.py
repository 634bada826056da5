"""The seconds of a training, without its evaluations."""

import contextlib
import time
from collections.abc import Callable, Iterator


class TrainingClock:
    """Counts seconds between `start` and `stop`, except within `paused`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Args: clock: returns seconds."""
        self._clock = clock
        self._counted = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """What has been counted since the last start."""
        running = self._clock() - self._since if self._since is not None else 0.0
        return self._counted + running

    def start(self) -> None:
        """Count from 0."""
        self._counted, self._since = 0.0, self._clock()

    def stop(self) -> None:
        """Keep what has been counted."""
        self._counted, self._since = self.seconds, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count within the block; nor after it, if it did not count before."""
        was_running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if was_running:
                self._since = self._clock()
