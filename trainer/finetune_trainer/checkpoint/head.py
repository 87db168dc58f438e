"""``HEAD``, the one object that says which checkpoints exist, and the state machine that changes it. Pure.

Every change is a compare-and-swap of the whole object, numbered, and marked with a nonce that no other write ever
had. A store's answer proves nothing but success: a refusal may be the echo of our own success, a lost answer may
stand for a write that is still on its way. So after anything but success the writer reads again and decides from what
is there:

- one of its own nonces: the change happened, by whichever of its writes;
- a higher generation, or its own generation under a nonce it never wrote: it has been replaced, and writes no more;
- nothing, where it has settled something before: somebody deleted ``HEAD``. It writes nothing either: only a fence makes ``HEAD``,
  else one that was replaced long ago could make it anew, and commit;
- anything else: the change has not happened *yet*, and is swapped in again, on top of what was read.

An earlier write that arrives late finds an ETag that is gone, because no two HEADs are alike. A writer keeps all its
nonces for as long as it lives: a swap it gave up may arrive before its next one, and is then what that builds on.

Nothing may be deleted between a write and its settlement. ``tests/trainer/checkpoint/test_head_interleavings.py``
searches every interleaving of two generations with lost and late writes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

FORMAT_VERSION = 1


class Unreadable(Exception):
    """Bytes that should be one of our JSON documents are not."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A committed checkpoint: its manifest's key below the job's prefix, and what that must hash to.

    ``metric`` is what the evaluation of its step gave, where the job keeps the best by a metric.
    """

    step: int
    manifest: str
    sha256: str
    size_bytes: int
    commit_time: str
    metric: float | None = None

    @property
    def folder(self) -> str:
        """The key below which everything of this checkpoint lies, with a slash at its end."""
        return self.manifest.rpartition("/")[0] + "/"


@dataclass(frozen=True, slots=True)
class Head:
    """The content of ``HEAD``. ``kept`` is newest first; ``sequence`` rises by one with each swap.

    ``lineage`` rises with each rollback, and with it everything staged before becomes void; ``skipped_ranges`` are the samples left
    out since, half-open, and ``rollbacks`` counts them. ``graded_by`` names what the ``metric`` of each checkpoint is.
    """

    sequence: int
    generation: int
    nonce: str
    kept: tuple[Kept, ...] = ()
    lineage: int = 0
    skipped_ranges: tuple[tuple[int, int], ...] = ()
    rollbacks: int = 0
    graded_by: str | None = None


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints stay: the newest ``keep``, and the best by ``metric`` unless ``best`` is None."""

    keep: int
    best: Literal["highest", "lowest"] | None = None
    metric: str | None = None

    def graded(self, head: Head, kept: tuple[Kept, ...], grades: Mapping[int, float]) -> Head:
        """Return ``HEAD`` with what stays of ``kept`` after evaluations by this metric. What another one gave is no grade any more."""
        if self.metric is not None and head.graded_by != self.metric:
            kept = tuple(replace(old, metric=None) for old in kept)
        kept = tuple(replace(old, metric=grades.get(old.step, old.metric)) for old in kept)
        return replace(head, kept=self.retained(kept), graded_by=self.metric or head.graded_by)

    def retained(self, kept: tuple[Kept, ...]) -> tuple[Kept, ...]:
        """Return what stays of checkpoints that are listed newest first."""
        newest, rest = kept[: self.keep], kept[self.keep :]
        candidates = [entry for entry in kept if entry.metric is not None and math.isfinite(entry.metric)]
        if self.best is None or not candidates:
            return newest
        best = (max if self.best == "highest" else min)(candidates, key=lambda entry: entry.metric or 0.0)
        return newest + tuple(entry for entry in rest if entry is best)


@dataclass(frozen=True, slots=True)
class Fence:
    """Raise the generation, so that lower ones can no longer commit."""

    def apply(self, head: Head) -> Head:
        """Return the content afterwards."""
        return head


@dataclass(frozen=True, slots=True)
class Add:
    """Commit a checkpoint, and with it what evaluations gave that could not be noted before."""

    new: Kept
    retention: Retention
    grades: tuple[tuple[int, float], ...] = ()

    def apply(self, head: Head) -> Head:
        """Return the content afterwards."""
        kept = (self.new, *(old for old in head.kept if old.manifest != self.new.manifest))
        return self.retention.graded(head, kept, dict(self.grades))


@dataclass(frozen=True, slots=True)
class Grade:
    """Note what the evaluation of a step gave; nothing changes where no checkpoint of that step is kept."""

    step: int
    metric: float
    retention: Retention

    def apply(self, head: Head) -> Head:
        """Return the content afterwards."""
        return self.retention.graded(head, head.kept, {self.step: self.metric})


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget checkpoints that cannot be loaded."""

    lost: tuple[Kept, ...]

    def apply(self, head: Head) -> Head:
        """Return the content afterwards."""
        lost = {one.manifest for one in self.lost}
        return replace(head, kept=tuple(old for old in head.kept if old.manifest not in lost))


def last_good(kept: tuple[Kept, ...], suspect_from: int) -> int:
    """Return the step of the newest checkpoint not later than ``suspect_from``, else of the oldest; 0 without any."""
    steps = [entry.step for entry in kept]
    return next((step for step in steps if step <= suspect_from), steps[-1] if steps else 0)


@dataclass(frozen=True, slots=True)
class RollBack:
    """Go back to before the step ``suspect_from`` and leave out a range of samples from there on.

    To which checkpoint is decided from what HEAD lists when it is swapped: there may be one whose commit its writer never heard of.
    """

    skipped: tuple[int, int]
    suspect_from: int

    def apply(self, head: Head) -> Head:
        """Return the content afterwards."""
        return replace(
            head,
            kept=tuple(old for old in head.kept if old.step <= last_good(head.kept, self.suspect_from)),
            lineage=head.lineage + 1,
            skipped_ranges=(*head.skipped_ranges, self.skipped),
            rollbacks=head.rollbacks + 1,
        )


Change: TypeAlias = Fence | Add | Grade | Drop | RollBack


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
class Lost:
    """Somebody deleted ``HEAD`` since this incarnation has settled it."""


@dataclass(frozen=True, slots=True)
class Swap:
    """One change under way, between a read and the next write."""

    generation: int
    change: Change
    attempted: frozenset[str] = frozenset()
    """The nonces of this change's own writes."""
    owned: frozenset[str] = frozenset()
    """The nonces of this incarnation's earlier changes, given up or settled."""
    last: Head | None = None
    """What this incarnation last settled: since then there must be a ``HEAD``."""

    def decide(self, seen: Seen | None, nonce: str) -> Write | Settled | Overtaken | Lost:
        """Return what follows from what was read; a write that follows carries ``nonce``, which must be new."""
        if seen is None:
            return Lost() if self.last else Write(self._changed(Head(0, self.generation, ""), nonce), None)
        head = seen.head
        if head.nonce in self.attempted:
            return Settled(head)
        if head.generation > self.generation or (head.generation == self.generation and head.nonce not in self.owned):
            return Overtaken(head)
        return Write(self._changed(head, nonce), seen.etag)

    def sent(self, write: Write) -> "Swap":
        """Return the swap after a write left, whatever became of it."""
        return replace(self, attempted=self.attempted | {write.head.nonce})

    def _changed(self, head: Head, nonce: str) -> Head:
        changed = self.change.apply(head)
        return replace(changed, sequence=head.sequence + 1, generation=self.generation, nonce=nonce)


def encode(head: Head) -> bytes:
    """Return the bytes of ``HEAD``."""
    kept = [
        {
            "step": entry.step,
            "manifest": entry.manifest,
            "sha256": entry.sha256,
            "sizeBytes": entry.size_bytes,
            "commitTime": entry.commit_time,
            "metric": entry.metric,
        }
        for entry in head.kept
    ]
    document = {
        "version": FORMAT_VERSION,
        "sequence": head.sequence,
        "generation": head.generation,
        "nonce": head.nonce,
        "kept": kept,
        "lineage": head.lineage,
        "skippedRanges": [list(pair) for pair in head.skipped_ranges],
        "rollbacks": head.rollbacks,
        "gradedBy": head.graded_by,
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
            lineage=int(document.get("lineage", 0)),
            skipped_ranges=tuple((int(first), int(last)) for first, last in document.get("skippedRanges", ())),
            rollbacks=int(document.get("rollbacks", 0)),
            graded_by=None if document.get("gradedBy") is None else str(document["gradedBy"]),
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
        metric=None if entry.get("metric") is None else float(entry["metric"]),
    )
