"""Which samples make up each micro-batch, and which rank computes which: the same numbers whatever the cluster.

Steps cut the endless row of samples (see order) into global batches, and those into micro-batches; both sizes are constants of the recipe, so
what is computed never depends on who computes it. A global batch is sorted by length before it is cut, so that short samples are not
padded to the length of long ones: on sentences that halves the padded tokens, and the loss does not know.

Ranks are dealt the micro-batches of a step like cards, there and back, so that nobody always gets the longest. Where the deal comes
out short the place is filled with an ignored micro-batch, because every rank must make the same number of passes (ZeRO-3 gathers
weights in each).

Ranges of samples that spoilt training are skipped (see checkpoint.head): the row closes up over them.

Epochs follow one another without a seam: a global batch may hold the end of one epoch and the start of the next, none is dropped and
none is short. A run of ``epochs`` passes therefore rounds up to whole global batches.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from finetune_api.recipe import Training
from finetune_trainer.data.order import Indices, sample_order

Range: TypeAlias = tuple[int, int]

# Sequences per forward pass when the recipe does not say: what fits beside the model on a device of 16 GiB at 512 tokens. The
# user's own number is better; this one only has to be safe. (Parameters up to, cap.)
DEFAULT_MICRO_BATCHES = ((50e6, 32), (500e6, 16), (2e9, 8), (8e9, 4), (20e9, 2), (math.inf, 1))


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The micro-batches of every step."""

    samples: int
    global_batch_size: int
    micro_batch_size: int
    seed: int

    def numbers(self, step: int, skipped: Sequence[Range] = ()) -> Indices:
        """Return which samples of the endless row one step (counted from 0) takes; ``skipped`` ones do not count."""
        first = step * self.global_batch_size
        numbers = np.arange(first, first + self.global_batch_size, dtype=np.int64)
        for start, end in merged(skipped):
            numbers[numbers >= start] += end - start
        return numbers

    def chosen(self, step: int, skipped: Sequence[Range] = ()) -> Indices:
        """Return the samples of one step, as they lie in the data."""
        return sample_order(self.numbers(step, skipped), samples=self.samples, seed=self.seed)

    def rounds(self, ranks: int) -> int:
        """Return how many passes each rank makes per step."""
        return math.ceil(self.global_batch_size // self.micro_batch_size / ranks)

    def epoch(self, step: int) -> float:
        """Return how many passes over the data are done after ``step`` steps."""
        return step * self.global_batch_size / self.samples

    def total_steps(self, training: Training) -> int:
        """Return the number of steps of the whole run."""
        if training.steps is not None:
            return training.steps
        assert training.epochs is not None
        return max(1, math.ceil(training.epochs * self.samples / self.global_batch_size - 1e-9))


def cut(samples: Indices, lengths: Indices, size: int) -> list[Indices]:
    """Return the samples as micro-batches of ``size`` (the last may be smaller), those of like length together."""
    ordered = samples[np.argsort(lengths, kind="stable")]
    return np.array_split(ordered, range(size, len(ordered), size))


def merged(ranges: Sequence[Range]) -> list[Range]:
    """Return half-open ranges in their order, those that touch joined."""
    result: list[Range] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def deal(count: int, *, ranks: int, rank: int) -> list[int | None]:
    """Return the micro-batches that ``rank`` computes, in order; None is an ignored one."""
    turns = range(math.ceil(count / ranks))
    mine = (turn * ranks + (rank if turn % 2 == 0 else ranks - 1 - rank) for turn in turns)
    return [index if index < count else None for index in mine]


def default_micro_batch_size(parameters: int, global_batch_size: int) -> int:
    """Return the largest divisor of the global batch that is not above the cap for a model of this size."""
    cap = next(cap for limit, cap in DEFAULT_MICRO_BATCHES if parameters <= limit)
    return next(size for size in range(min(cap, global_batch_size), 0, -1) if global_batch_size % size == 0)


def random_seed(*parts: int | str) -> int:
    """Return a 63-bit seed made of ``parts``: dropout is seeded per micro-batch, so that it does not depend on who draws it."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
