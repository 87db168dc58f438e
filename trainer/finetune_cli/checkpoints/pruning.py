"""``finetune checkpoints prune``: fewer checkpoints, beside a job that may be running.

First the checkpoints go off ``HEAD`` (finetune_trainer.checkpoint.pruning says why no running job minds), then their objects are
deleted, and the remains of saves that can never be committed any more: those of lower generations, which ``HEAD`` has fenced, and those
behind a later commit of their own generation, which saves in rising steps. A save that may be under way is left alone.

What stays is looked at before anything else is taken away: if the newest is torn, the older ones are all there is to fall back on.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_cli.checkpoints.attempts import Attempt, is_dead, uncommitted
from finetune_cli.checkpoints.kept import read_head, read_manifest
from finetune_cli.checkpoints.verification import size_faults
from finetune_cli.errors import CannotTell, Damaged
from finetune_cli.output import say, size
from finetune_trainer.checkpoint.commit import CHECKPOINTS_KEY
from finetune_trainer.checkpoint.head import Kept, Retention
from finetune_trainer.checkpoint.pruning import NoneWouldStay, prune
from finetune_trainer.object_store import ObjectStore


class Best(StrEnum):
    """Whether the best checkpoint by the metric of its evaluation stays too."""

    HIGHEST = "highest"
    LOWEST = "lowest"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Pruning:
    """What is to go, and what stays."""

    prefix: str
    doomed: tuple[Kept, ...]
    staying: tuple[Kept, ...]
    remains: tuple[Attempt, ...]

    @property
    def size_bytes(self) -> int:
        """How much room this makes."""
        return sum(kept.size_bytes for kept in self.doomed) + sum(attempt.size_bytes for attempt in self.remains)


def plan_pruning(store: ObjectStore, prefix: str, keep: int, best: Best | None = None) -> Pruning:
    """Return what would go if the newest ``keep`` stayed, and the best.

    Raises:
        Damaged: ``HEAD`` cannot be read, or what would stay is torn.
        CannotTell: ``best`` is not given, and there is one to lose.
    """
    head = read_head(store, prefix)
    staying = _retention(keep, best).retained(head.kept)
    doomed = tuple(kept for kept in head.kept if kept not in staying)
    if best is None:
        _require_ungraded(doomed)
    if doomed:
        _require_present(store, prefix, staying)
    attempts = uncommitted(store.list(f"{prefix}/{CHECKPOINTS_KEY}"), prefix, head)
    return Pruning(prefix, doomed, staying, tuple(attempt for attempt in attempts if is_dead(attempt, head)))


def _retention(keep: int, best: Best | None) -> Retention:
    match best:
        case Best.HIGHEST:
            return Retention(keep, "highest")
        case Best.LOWEST:
            return Retention(keep, "lowest")
    return Retention(keep)


def _require_ungraded(doomed: Iterable[Kept]) -> None:
    """Refuse to guess: ``HEAD`` has the metrics of a job that keeps its best, but not which end of them is good."""
    graded = ", ".join(f"{kept.step} ({kept.metric:.6g})" for kept in doomed if kept.metric is not None)
    if graded:
        raise CannotTell(
            f"these would go, and were evaluated because the job keeps its best: step {graded}; "
            "say --keep-best highest, lowest or none"
        )


def carry_out(store: ObjectStore, pruning: Pruning) -> None:
    """Take the checkpoints off ``HEAD``, then delete their objects and the remains.

    Raises:
        Damaged: what was to stay has gone meanwhile; nothing was deleted.
    """
    prefix = pruning.prefix
    if pruning.doomed:
        try:
            prune(store, prefix, pruning.doomed)
        except NoneWouldStay:
            raise Damaged(
                f"{prefix}/HEAD no longer lists what was to stay, and nothing was pruned: the job has dropped it as broken; "
                "look again with ls and verify"
            ) from None
    for kept in pruning.doomed:
        store.delete([info.uri for info in store.list(f"{prefix}/{kept.folder}")])
    store.delete([uri for attempt in pruning.remains for uri in attempt.uris])


def _require_present(store: ObjectStore, prefix: str, staying: Iterable[Kept]) -> None:
    for kept in staying:
        faults = list(size_faults(store, prefix, kept, read_manifest(store, prefix, kept)))
        if faults:
            raise Damaged(
                f"step {kept.step} would stay, but {faults[0].uri} {faults[0].problem}: nothing was pruned; "
                f"finetune checkpoints verify --all {prefix} tells which checkpoints are whole"
            )


def show_pruning(pruning: Pruning, *, done: bool) -> None:
    """Print what goes, or went, for people."""
    verb = "deleted" if done else "would delete"
    for kept in pruning.doomed:
        say(f"{verb} step {kept.step} of {kept.commit_time} ({size(kept.size_bytes)})")
    for attempt in pruning.remains:
        say(f"{verb} {attempt.folder}, never committed ({size(attempt.size_bytes)})")
    if not pruning.doomed and not pruning.remains:
        say("nothing to delete")
    stay = ", ".join(str(kept.step) for kept in pruning.staying) or "none"
    say(f"{size(pruning.size_bytes)} in all; steps that stay: {stay}")


def pruning_to_json(pruning: Pruning, *, done: bool) -> dict[str, Any]:
    """Return a pruning as a JSON document."""
    return {
        "prefix": pruning.prefix,
        "done": done,
        "sizeBytes": pruning.size_bytes,
        "checkpoints": [kept.step for kept in pruning.doomed],
        "uncommitted": [attempt.folder for attempt in pruning.remains],
        "staying": [kept.step for kept in pruning.staying],
    }
