"""Taking up the state that the workers of an earlier generation left in the memory of their pods (see staging).

Possible when every rank holds its part of the same save, whole: its digests are checked on all ranks before any number is used. That
is so when the pods lived and the same ranks start in them again; then a restart reads nothing from storage but ``HEAD``. Where a rank
saves less than it holds (state that ZeRO does not partition), the ranks send one another their parts.
"""

from typing import Any

import torch
import torch.distributed as dist

from finetune_trainer.checkpoint import deepspeed_state as state
from finetune_trainer.checkpoint.head import Head
from finetune_trainer.checkpoint.manifest import STATES, Interval
from finetune_trainer.checkpoint.ranks import Ranks
from finetune_trainer.checkpoint.shard import Layout, chunk_digests, copy_out, numbers_of
from finetune_trainer.checkpoint.staging import SaveId, Seal, Slot, Staging
from finetune_trainer.checkpoint.trained_on import Sources, require_unchanged


def restore_from_memory(
    engine: Any,
    staging: Staging,
    layout: Layout,
    head: Head,
    *,
    prefix: str,
    recipe_digest: str,
    sources: Sources,
    ranks: Ranks,
) -> tuple[Slot, Seal] | None:
    """Restore the newest save that all ranks hold whole, unless ``head`` lists a newer one. Called by all ranks together.

    Raises:
        BadData: it was trained on other data, or from another model, than what ``sources`` says of now.
    """
    mine = {
        seal.save: (slot, seal)
        for slot, seal in staging.sealed()
        if (seal.rank, seal.world_size, seal.zero_stage) == (ranks.rank, ranks.size, state.zero_stage(engine))
        and (seal.prefix, seal.recipe_digest, seal.shard.intervals) == (prefix, recipe_digest, layout.intervals)
    }
    for save in candidates(ranks.each(lambda: set(mine)), head):
        slot, seal = mine[save]
        if all(ranks.each(lambda: chunk_digests(slot.buffer) == seal.shard.sha256)):  # noqa: B023  called at once
            require_unchanged(seal.sources, sources, f"of step {save.step} in memory")
            _restore(engine, slot, seal, layout, ranks)
            return slot, seal
    return None


def candidates(held: list[set[SaveId]], head: Head) -> list[SaveId]:
    """Return the saves that all ranks hold and that may be taken up, the best first.

    What was staged before a rollback belongs to another lineage. What is older than the newest committed checkpoint is of no use.
    """
    newest = head.kept[0].step if head.kept else 0
    common = set.intersection(*held)
    usable = (save for save in common if save.lineage == head.lineage and save.step >= newest)
    return sorted(usable, key=lambda save: (save.step, save.generation), reverse=True)


def _restore(engine: Any, slot: Slot, seal: Seal, layout: Layout, ranks: Ranks) -> None:
    state.begin_restore(engine)
    if state.is_replicated(engine):
        _exchange(engine, numbers_of(layout, slot.buffer), layout, ranks)
    else:
        copy_out(layout, slot.buffer, state.owned(engine))
    state.finish_restore(engine, seal.scalars)


@torch.no_grad()
def _exchange(engine: Any, mine: torch.Tensor, layout: Layout, ranks: Ranks) -> None:
    """Set the whole replicated state from the parts of all ranks: each sends its own to all others."""
    names = [parameter.name for parameter in state.trainable_parameters(engine)]
    held = {part.name: part for part in state.held(engine)}
    for source, intervals in enumerate(ranks.each(lambda: layout.intervals)):
        count = sum(len(STATES) * interval.count for interval in intervals)
        numbers = mine if source == ranks.rank else torch.empty(count)
        dist.broadcast(numbers, src=source, group=ranks.group)
        _spread(numbers, intervals, names, held)


def _spread(numbers: torch.Tensor, intervals: tuple[Interval, ...], names: list[str], held: dict[str, Any]) -> None:
    at = 0
    for interval in intervals:
        part = held[names[interval.parameter]]
        for view in part.views:
            view.narrow(0, interval.start - part.start, interval.count).copy_(numbers[at : at + interval.count])
            at += interval.count
