"""Doing things together, beside the training's own collectives.

A gloo group of its own carries small Python values between ranks, so that a save under way never mixes with the
collectives of the training group, whatever backend and thread those run on. What fails on one rank fails, as the same
error, on all.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")
S = TypeVar("S")

TIMEOUT = timedelta(hours=2)
"""How long one rank may take for its part; a rank that dies is noticed at once, through its closed connections."""


class Ranks:
    """All ranks of the job. Constructed by all of them together."""

    def __init__(self, *shared_errors: type[Exception]) -> None:
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._shared_errors = shared_errors
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def close(self) -> None:
        """Give up the group and its threads. Local: the others may be gone."""
        dist.destroy_process_group(self.group)
        self.group = None

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do the work on each rank and return all results, in the order of ranks, on every rank.

        Errors of the kinds given to the constructor are raised everywhere: the one of the lowest rank that has one.
        """
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, self._outcome(work), group=self.group)
        return _values(outcomes)

    def each_keeps(self, work: Callable[[], T]) -> T:
        """Do the work on each rank and return this rank's own result, which need not be sent; errors as in :meth:`each`."""
        outcome = self._outcome(work)
        self.each(partial(_reraise, outcome[1]))
        return cast("T", outcome[0])

    def collect(self, work: Callable[[], T], combine: Callable[[list[T]], S]) -> S:
        """Do the work on each rank, combine the results on rank 0, and return what that gave, or raise its error, on every rank.

        Only the combined result goes to all: the descriptions of a thousand shards need not.
        """
        outcomes: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(self._outcome(work), outcomes, dst=0, group=self.group)
        return self.first(lambda: combine(_values(outcomes or [])))

    def first(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0 and return its result, or raise its error, on every rank."""
        outcome = [self._outcome(work) if self.rank == 0 else None]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        _raise_if_error(cast("tuple[Any, Exception | None]", outcome[0]))
        return cast("tuple[T, None]", outcome[0])[0]

    def _outcome(self, work: Callable[[], T]) -> tuple[T | None, Exception | None]:
        try:
            return work(), None
        except self._shared_errors as error:
            return None, error


def _reraise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _values(outcomes: list[Any]) -> list[Any]:
    """Return the results, or raise the error of the lowest rank that has one."""
    for outcome in outcomes:
        _raise_if_error(outcome)
    return [value for value, _ in outcomes]


def _raise_if_error(outcome: tuple[Any, Exception | None]) -> None:
    if outcome[1] is not None:
        raise outcome[1]
