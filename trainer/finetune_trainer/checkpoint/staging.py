"""Two buffers per rank in which a checkpoint waits on its way to storage, and which outlive the worker that filled them.

They are files in a memory-backed folder of the pod, mapped into memory and allocated before the first step, so that saving neither
allocates nor can run out of room later. While hashing and uploading read from one buffer the next save goes to the other.

Beside each buffer lies a *seal*, a small JSON file that says what the buffer holds and what its chunks hash to. It is removed before
the buffer is touched and written, whole, after the last chunk is hashed. So a seal always speaks the truth about its buffer, a worker
killed in the middle of a copy leaves none, and the other buffer still has its own: one of the two is always whole once a first save
was. The workers of the next generation that start in the same pod take up what is sealed.

Where the folder is too small, the pod's scratch folder on disk serves: slower, and said so.
"""

import errno
import json
import logging
import mmap
import os
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune_trainer.checkpoint.manifest import (
    Json,
    Position,
    Shard,
    position_from_json,
    position_to_json,
    shard_from_json,
    shard_to_json,
)
from finetune_trainer.checkpoint.trained_on import Sources, sources_from_json, sources_to_json
from finetune_trainer.errors import StorageUnavailable

log = logging.getLogger(__name__)

SLOTS = 2


@dataclass(frozen=True, slots=True)
class SaveId:
    """Which save a buffer holds a part of: a generation takes each step once. ``lineage`` is ``HEAD``'s (see head)."""

    lineage: int
    step: int
    generation: int


@dataclass(frozen=True, slots=True)
class Seal:
    """What a buffer holds: one rank's shard of a save of the job with this prefix, and what all ranks need to take it up."""

    prefix: str
    save: SaveId
    rank: int
    world_size: int
    zero_stage: int
    recipe_digest: str
    position: Position
    scalars: Json
    shard: Shard
    sources: Sources = field(default_factory=dict)


class Slot:
    """One buffer and its seal."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._seal_path = path.with_suffix(".seal")
        if not path.exists() or path.stat().st_size != size_bytes:
            self.break_seal()
            _allocate(path, size_bytes)
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), size_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        self.buffer = memoryview(mapped)

    def break_seal(self) -> None:
        """Say that the buffer holds nothing any more; before it is written to."""
        self._seal_path.unlink(missing_ok=True)

    def seal(self, seal: Seal) -> None:
        """Say what the buffer holds; after its last byte was written and hashed."""
        unfinished = self._seal_path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(_to_json(seal)))
        unfinished.replace(self._seal_path)

    def read_seal(self) -> Seal | None:
        """Return what the buffer holds, or None."""
        try:
            return _from_json(json.loads(self._seal_path.read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return None


class Staging:
    """The buffers of one rank.

    Raises:
        StorageUnavailable: none of the folders has room for them.
    """

    def __init__(self, folders: Sequence[Path], *, rank: int, size_bytes: int) -> None:
        self.slots = _open_in_first_with_room(folders, rank, size_bytes)
        self._next = 0

    def free(self, busy: Container[Slot]) -> Slot | None:
        """Return the buffer to fill next, the one that was filled longer ago, or None where all are ``busy``."""
        for _ in range(SLOTS):
            slot = self.slots[self._next]
            self._next = (self._next + 1) % SLOTS
            if slot not in busy:
                return slot
        return None

    def sealed(self) -> list[tuple[Slot, Seal]]:
        """Return the buffers that hold something whole, and what."""
        seals = ((slot, slot.read_seal()) for slot in self.slots)
        return [(slot, seal) for slot, seal in seals if seal is not None]

    def forget_all_but(self, kept: Slot | None) -> None:
        """Break all other seals, and fill those buffers first."""
        for number, slot in enumerate(self.slots):
            if slot is not kept:
                slot.break_seal()
                self._next = number


def _open_in_first_with_room(folders: Sequence[Path], rank: int, size_bytes: int) -> list[Slot]:
    for folder in folders:
        paths = [folder / f"rank-{rank:05}-{number}.shard" for number in range(SLOTS)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return [Slot(path, size_bytes) for path in paths]
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}:
                raise
            for path in paths:
                path.unlink(missing_ok=True)
            log.warning(
                "No room in %s to stage checkpoints: rank %d needs %d times %.0f MiB; raise spec.checkpoint.stagingMemory",
                folder,
                rank,
                SLOTS,
                size_bytes / 2**20,
            )
    raise StorageUnavailable(
        f"no room to stage checkpoints in {' or '.join(map(str, folders))}: rank {rank} needs {SLOTS} times "
        f"{size_bytes / 2**20:.0f} MiB; raise spec.checkpoint.stagingMemory"
    )


def _allocate(path: Path, size_bytes: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    finally:
        os.close(descriptor)


def _to_json(seal: Seal) -> Json:
    return {
        "prefix": seal.prefix,
        "save": [seal.save.lineage, seal.save.step, seal.save.generation],
        "rank": seal.rank,
        "worldSize": seal.world_size,
        "zeroStage": seal.zero_stage,
        "recipe": seal.recipe_digest,
        **sources_to_json(seal.sources),
        **position_to_json(seal.position),
        "scalars": seal.scalars,
        "shard": shard_to_json(seal.shard),
    }


def _from_json(document: Json) -> Seal:
    return Seal(
        prefix=document["prefix"],
        save=SaveId(*document["save"]),
        rank=document["rank"],
        world_size=document["worldSize"],
        zero_stage=document["zeroStage"],
        recipe_digest=document["recipe"],
        position=position_from_json(document),
        scalars=document["scalars"],
        shard=shard_from_json(document["shard"]),
        sources=sources_from_json(document),
    )
