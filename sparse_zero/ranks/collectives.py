"""Small collective operations on Python objects and flags. With a single process they need no process group."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sparse_zero.errors import UserError

T = TypeVar("T")


class Ranks:
    """The ranks of torch's default process group. All methods are collective, the constructor included."""

    def __init__(self) -> None:
        self.is_single = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        self.rank = 0 if self.is_single else dist.get_rank()
        self.world_size = 1 if self.is_single else dist.get_world_size()
        # With the accelerator's backend, each call would wait for all work that is queued on the accelerator.
        is_gloo = self.is_single or dist.get_backend() == "gloo"
        self._group = None if is_gloo else dist.new_group(backend="gloo")

    def gather(self, value: T) -> list[T]:
        """Gather a picklable object from every rank.

        Returns:
            The objects of all ranks in rank order, on every rank.
        """
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """Whether at least one rank raised each flag. One small message, cheap enough for every step."""
        if self.is_single:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised.tolist()]

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0. On a shared directory, the others may see something else for a while.

        Returns:
            What the function returned, on every rank. It must be picklable.

        Raises:
            UserError: as `run_together`.
        """
        return self.gather(self.run_together(lambda: function() if self.rank == 0 else None))[0]  # type: ignore

    def run_together(self, function: Callable[[], T]) -> T:
        """Call a function on every rank; if it fails on one rank, fail on all.

        Returns:
            The return value of this rank's call.

        Raises:
            UserError: the function raised UserError or OSError on some rank. All ranks raise the message of the first
                such rank.
        """
        result, problem = None, None
        try:
            result = function()
        except (UserError, OSError) as error:
            problem = str(error)
        problems = [each for each in self.gather(problem) if each is not None]
        if problems:
            raise UserError(problems[0])
        return result  # type: ignore[return-value]
