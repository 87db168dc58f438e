"""``finetune checkpoints ls``: what ``HEAD`` lists, and what lies there beside it."""

from dataclasses import dataclass
from typing import Any

from finetune_cli.checkpoints.attempts import Attempt, is_dead, uncommitted
from finetune_cli.checkpoints.kept import read_head, read_manifest
from finetune_cli.errors import CommandError
from finetune_cli.output import say, show_table, size
from finetune_trainer.checkpoint.commit import CHECKPOINTS_KEY
from finetune_trainer.checkpoint.head import Head, Kept
from finetune_trainer.checkpoint.manifest import Manifest
from finetune_trainer.object_store import ObjectStore

COLUMNS = ("STEP", "COMMITTED", "SIZE", "RANKS", "ZERO", "GENERATION", "METRIC", "")
REMAINS = ("STEP", "GENERATION", "OBJECTS", "SIZE", "")


@dataclass(frozen=True, slots=True)
class Row:
    """A checkpoint that ``HEAD`` lists, and its manifest, or why that cannot be read."""

    kept: Kept
    manifest: Manifest | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """What there is. Without a ``head`` there are no rows, and ``problem`` says why."""

    prefix: str
    head: Head | None
    rows: tuple[Row, ...]
    remains: tuple[Attempt, ...]
    problem: CommandError | None = None


def list_checkpoints(store: ObjectStore, prefix: str) -> Listing:
    """Return what lies below a job's prefix; a HEAD that cannot be read is part of the answer."""
    head, problem = None, None
    try:
        head = read_head(store, prefix)
    except CommandError as error:
        problem = error
    rows = () if head is None else tuple(_row(store, prefix, kept) for kept in head.kept)
    remains = tuple(uncommitted(store.list(f"{prefix}/{CHECKPOINTS_KEY}"), prefix, head))
    return Listing(prefix, head, rows, remains, problem)


def _row(store: ObjectStore, prefix: str, kept: Kept) -> Row:
    try:
        return Row(kept, read_manifest(store, prefix, kept))
    except CommandError as error:
        return Row(kept, None, str(error))


def show_listing(listing: Listing) -> None:
    """Print a listing for people."""
    if listing.head is not None and not listing.rows:
        say(f"HEAD of generation {listing.head.generation} lists no checkpoint yet.")
    if listing.rows:
        show_table(COLUMNS, (_columns(row, newest=index == 0) for index, row in enumerate(listing.rows)))
    if listing.remains:
        say("\nNot committed:")
        show_table(REMAINS, (_remains(attempt, listing.head) for attempt in listing.remains))


def _columns(row: Row, *, newest: bool) -> tuple[str, ...]:
    kept, manifest = row.kept, row.manifest
    known = ("?", "?", "?")
    if manifest is not None:
        known = (str(manifest.world_size), str(manifest.zero_stage), str(manifest.generation))
    metric = "" if kept.metric is None else f"{kept.metric:.6g}"
    notes = [*(["newest"] if newest else []), *([row.problem] if row.problem else [])]
    return (str(kept.step), kept.commit_time, size(kept.size_bytes), *known, metric, "; ".join(notes))


def _remains(attempt: Attempt, head: Head | None) -> tuple[str, ...]:
    if head is None:
        note = "HEAD would say whether it was committed"
    else:
        note = "remains" if is_dead(attempt, head) else "a save under way, or remains of one"
    return (str(attempt.step), str(attempt.generation), str(len(attempt.uris)), size(attempt.size_bytes), note)


def listing_to_json(listing: Listing) -> dict[str, Any]:
    """Return a listing as a JSON document."""
    head = listing.head
    return {
        "prefix": listing.prefix,
        "generation": None if head is None else head.generation,
        "sequence": None if head is None else head.sequence,
        "problem": None if listing.problem is None else str(listing.problem),
        "checkpoints": [_row_to_json(row) for row in listing.rows],
        "uncommitted": [
            {
                "folder": attempt.folder,
                "step": attempt.step,
                "generation": attempt.generation,
                "objects": len(attempt.uris),
                "sizeBytes": attempt.size_bytes,
                "dead": head is not None and is_dead(attempt, head),
            }
            for attempt in listing.remains
        ],
    }


def _row_to_json(row: Row) -> dict[str, Any]:
    kept, manifest = row.kept, row.manifest
    return {
        "step": kept.step,
        "commitTime": kept.commit_time,
        "sizeBytes": kept.size_bytes,
        "manifest": kept.manifest,
        "metric": kept.metric,
        "worldSize": None if manifest is None else manifest.world_size,
        "zeroStage": None if manifest is None else manifest.zero_stage,
        "generation": None if manifest is None else manifest.generation,
        "problem": row.problem,
    }
