"""What all ranks of a run must agree on; in a process without others everything is agreed."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sparse_zero.errors import UserError

T = TypeVar("T")


class Ranks:
    """All ranks of torch's default group. Every method but the constructor is collective."""

    def __init__(self) -> None:
        self.is_alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        self.rank = 0 if self.is_alone else dist.get_rank()
        self.count = 1 if self.is_alone else dist.get_world_size()
        # Over the accelerator's own backend every question would wait for all the work that is queued there.
        is_gloo = self.is_alone or dist.get_backend() == "gloo"
        self._group = None if is_gloo else dist.new_group(backend="gloo")

    def gather(self, value: T) -> list[T]:
        """Returns: what each rank gave, on every rank."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """Whether some rank raised each flag: one small message, for every step."""
        if self.is_alone:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised.tolist()]

    def agree(self, attempt: Callable[[], T]) -> T:
        """Do something on every rank that some may fail at. Returns: what this rank's attempt returned.

        Raises UserError on every rank, with the first rank's message, where one raised UserError or OSError.
        """
        result, problem = None, None
        try:
            result = attempt()
        except (UserError, OSError) as error:
            problem = str(error)
        problems = [each for each in self.gather(problem) if each is not None]
        if problems:
            raise UserError(problems[0])
        return result  # type: ignore[return-value]
