"""``HEAD``, the one object that says which checkpoints exist, and the state machine that changes it. Pure.

Every change is a compare-and-swap of the whole object, numbered, and marked with a nonce that no other write ever
had. A store's answer proves nothing but success: a refusal may be the echo of our own success, a lost answer may
stand for a write that is still on its way. So after anything but success the writer reads again and decides from what
is there:

- one of its own nonces: the change happened, by whichever of its writes;
- a higher generation, or its own generation under a nonce it never wrote: it has been replaced, and writes no more;
- anything else: the change has not happened *yet*, and is swapped in again, on top of what was read.

An earlier write that arrives late finds an ETag that is gone, because no two HEADs are alike. A writer keeps all its
nonces for as long as it lives: a swap it gave up may arrive before its next one, and is then what that builds on.

Nothing may be deleted between a write and its settlement. ``tests/trainer/checkpoint/test_head_interleavings.py``
searches every interleaving of two generations with lost and late writes.
"""

import json
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

FORMAT_VERSION = 1


class Unreadable(Exception):
    """Bytes that should be one of our JSON documents are not."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A committed checkpoint: its manifest's key below the job's prefix, and what that must hash to."""

    step: int
    manifest: str
    sha256: str
    size_bytes: int
    commit_time: str

    @property
    def folder(self) -> str:
        """The key below which everything of this checkpoint lies, with a slash at its end."""
        return self.manifest.rpartition("/")[0] + "/"


@dataclass(frozen=True, slots=True)
class Head:
    """The content of ``HEAD``. ``kept`` is newest first; ``sequence`` rises by one with each swap."""

    sequence: int
    generation: int
    nonce: str
    kept: tuple[Kept, ...] = ()


@dataclass(frozen=True, slots=True)
class Fence:
    """Raise the generation, so that lower ones can no longer commit."""

    def apply(self, kept: tuple[Kept, ...]) -> tuple[Kept, ...]:
        """Return what is kept afterwards."""
        return kept


@dataclass(frozen=True, slots=True)
class Add:
    """Commit a checkpoint, and keep no more than ``keep`` in all."""

    new: Kept
    keep: int

    def apply(self, kept: tuple[Kept, ...]) -> tuple[Kept, ...]:
        """Return what is kept afterwards."""
        return (self.new, *(old for old in kept if old != self.new))[: self.keep]


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget checkpoints that cannot be loaded."""

    lost: tuple[Kept, ...]

    def apply(self, kept: tuple[Kept, ...]) -> tuple[Kept, ...]:
        """Return what is kept afterwards."""
        return tuple(old for old in kept if old not in self.lost)


Change: TypeAlias = Fence | Add | Drop


@dataclass(frozen=True, slots=True)
class Seen:
    """``HEAD`` as it was read. None where there is none yet."""

    head: Head
    etag: str


@dataclass(frozen=True, slots=True)
class Write:
    """Swap ``head`` in where ``etag`` still stands; where there is none (``etag`` None), create it."""

    head: Head
    etag: str | None


@dataclass(frozen=True, slots=True)
class Settled:
    """The change has happened; ``head`` is what stands."""

    head: Head


@dataclass(frozen=True, slots=True)
class Overtaken:
    """Another incarnation owns ``HEAD``; this one may never write again."""

    head: Head


@dataclass(frozen=True, slots=True)
class Swap:
    """One change under way, between a read and the next write."""

    generation: int
    change: Change
    attempted: frozenset[str] = frozenset()
    """The nonces of this change's own writes."""
    owned: frozenset[str] = frozenset()
    """The nonces of this incarnation's earlier changes, given up or settled."""

    def decide(self, seen: Seen | None, nonce: str) -> Write | Settled | Overtaken:
        """Return what follows from what was read; a write that follows carries ``nonce``, which must be new."""
        if seen is None:
            return Write(Head(1, self.generation, nonce, self.change.apply(())), None)
        head = seen.head
        if head.nonce in self.attempted:
            return Settled(head)
        if head.generation > self.generation or (head.generation == self.generation and head.nonce not in self.owned):
            return Overtaken(head)
        return Write(Head(head.sequence + 1, self.generation, nonce, self.change.apply(head.kept)), seen.etag)

    def sent(self, write: Write) -> "Swap":
        """Return the swap after a write left, whatever became of it."""
        return replace(self, attempted=self.attempted | {write.head.nonce})


def encode(head: Head) -> bytes:
    """Return the bytes of ``HEAD``."""
    kept = [
        {
            "step": entry.step,
            "manifest": entry.manifest,
            "sha256": entry.sha256,
            "sizeBytes": entry.size_bytes,
            "commitTime": entry.commit_time,
        }
        for entry in head.kept
    ]
    document = {
        "version": FORMAT_VERSION,
        "sequence": head.sequence,
        "generation": head.generation,
        "nonce": head.nonce,
        "kept": kept,
    }
    return json.dumps(document, indent=1).encode()


def decode(body: bytes) -> Head:
    """Return what the bytes of ``HEAD`` say.

    Raises:
        Unreadable: they are no HEAD, or one of a version to come.
    """
    try:
        document: dict[str, Any] = json.loads(body)
        if document["version"] != FORMAT_VERSION:
            raise Unreadable(f"version {document['version']!r}, this trainer reads {FORMAT_VERSION}")
        return Head(
            sequence=int(document["sequence"]),
            generation=int(document["generation"]),
            nonce=str(document["nonce"]),
            kept=tuple(_kept(entry) for entry in document["kept"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def _kept(entry: dict[str, Any]) -> Kept:
    return Kept(
        step=int(entry["step"]),
        manifest=str(entry["manifest"]),
        sha256=str(entry["sha256"]),
        size_bytes=int(entry["sizeBytes"]),
        commit_time=str(entry["commitTime"]),
    )
