"""From any world size, stage and precision to any other, full and LoRA: every pair of values once, and what the ranks do about each.

The micro-batches of a step are the same whatever the number of ranks, which deal them out, as the trainer does. So the loss of a step
is one number, and can be compared with that of a run that was not interrupted. They are also the same in all steps, so that the loss
falls, and depends on all that the steps before have learned.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tests.trainer.checkpoint.trainee import CLASSES, MICRO_BATCH, TOKENS, Case, new_engine

MICRO_BATCHES = 6
"""Of a step: one, two and three ranks deal them out evenly."""


@dataclass(frozen=True)
class Move:
    """A job that is saved by so many ranks on one stage, and goes on with other ranks on another."""

    ranks: int
    stage: int
    precision: str
    lora: bool
    to_ranks: int
    to_stage: int

    @property
    def name(self) -> str:
        kind = "LoRA" if self.lora else "full"
        return f"{kind} {self.precision}, zero {self.stage} on {self.ranks} to zero {self.to_stage} on {self.to_ranks}"


MOVES = (
    Move(1, 0, "BF16", False, 2, 2),
    Move(1, 1, "FP32", False, 1, 0),
    Move(1, 2, "FP32", False, 3, 1),
    Move(1, 2, "FP16", True, 1, 3),
    Move(1, 3, "BF16", True, 3, 3),
    Move(2, 0, "FP16", True, 3, 0),
    Move(2, 0, "FP32", False, 1, 3),
    Move(2, 1, "BF16", True, 1, 1),
    Move(2, 2, "FP16", True, 2, 2),
    Move(2, 3, "FP32", False, 2, 0),
    Move(3, 0, "BF16", False, 1, 1),
    Move(3, 1, "FP16", False, 2, 3),
    Move(3, 1, "FP16", False, 3, 2),
    Move(3, 2, "BF16", True, 3, 0),
    Move(3, 3, "FP32", True, 1, 2),
    Move(3, 3, "FP16", False, 2, 1),
)
"""Each value of each field meets each value of each other field in one of them."""

VALUES = {
    "ranks": (1, 2, 3),
    "stage": (0, 1, 2, 3),
    "precision": ("FP32", "BF16", "FP16"),
    "lora": (False, True),
    "to_ranks": (1, 2, 3),
    "to_stage": (0, 1, 2, 3),
}


def missing_pairs() -> set[tuple[str, object, str, object]]:
    """Return the pairs of values that no move has."""
    return {
        (one, x, other, y)
        for (one, xs), (other, ys) in itertools.combinations(VALUES.items(), 2)
        for x, y in itertools.product(xs, ys)
        if not any(getattr(move, one) == x and getattr(move, other) == y for move in MOVES)
    }


def engine_of(move: Move, stage: int):
    """Return an engine for the ranks there are. Its loss scale never overflows: stages would step over different steps."""
    accumulation = MICRO_BATCHES // dist.get_world_size()
    return new_engine(
        Case(move.name, stage, move.precision, lora=move.lora, accumulation=accumulation, loss_scale_power=8)
    )


def train_dealt(engine, steps) -> list[float]:
    """Train steps of which each rank takes its micro-batches; return the mean loss of each."""
    losses = []
    for _ in steps:
        total = torch.zeros(())
        for micro in range(dist.get_rank(), MICRO_BATCHES, dist.get_world_size()):
            generator = torch.Generator().manual_seed(micro)
            tokens = torch.randint(0, TOKENS, (MICRO_BATCH, 7), generator=generator)
            labels = torch.randint(0, CLASSES, (MICRO_BATCH,), generator=generator)
            loss = engine(tokens, labels)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / MICRO_BATCHES)
    return losses
