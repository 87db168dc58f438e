"""Reading a checkpoint back: the bytes that a rank needs, in whole chunks, verified before a number is used.

A rank asks for intervals of parameters; where they were cut differently, at another world size or ZeRO stage, each is
put together from those that intersect it. Bytes that do not hash to what the manifest says are read once more, since
they may have broken on their way, and then the checkpoint counts as broken.

Neighbouring chunks are read with one request, and a few such runs side by side, each by a thread that also hashes and
copies what it read: none of the three needs Python's lock for long. What this takes of memory is ``READERS`` runs, in
buffers that are used again.
"""

import queue
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from finetune_trainer.checkpoint.manifest import (
    CHUNK_BYTES,
    ITEM_BYTES,
    Interval,
    Manifest,
    Shard,
    chunk_count,
    digest,
)
from finetune_trainer.checkpoint.shard import Owned
from finetune_trainer.object_store import ObjectMissing, ObjectStore, ObjectTooShort

_Buffers: TypeAlias = "queue.SimpleQueue[bytearray]"

CHUNKS_PER_READ = 4
READERS = 4


class Broken(Exception):
    """A checkpoint is torn, truncated, changed or missing in part. The message says which object, and how."""


class Missing(Broken):
    """An object of a checkpoint is not there. The store answered and said so."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of an object that belong into a tensor: a live view of exactly their numbers."""

    offset: int
    view: torch.Tensor

    @property
    def end(self) -> int:
        """The byte behind the last."""
        return self.offset + self.view.numel() * ITEM_BYTES


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring chunks ``[first, last)`` of a shard, and the pieces that some of their bytes belong into."""

    shard: Shard
    first: int
    last: int
    pieces: Sequence[Piece]

    @property
    def start(self) -> int:
        """The first byte of the object."""
        return self.first * CHUNK_BYTES

    @property
    def end(self) -> int:
        """The byte of the object behind the last."""
        return min(self.last * CHUNK_BYTES, self.shard.size_bytes)


def fill(store: ObjectStore, folder_uri: str, manifest: Manifest, owned: Iterable[Owned]) -> None:
    """Read the values of all ``owned`` views from the checkpoint below ``folder_uri`` (which ends with a slash).

    Raises:
        Broken: it cannot be read as it was written; the views are then in no particular state.
    """
    runs = [run for shard, pieces in plan(manifest, owned) for run in plan_runs(shard, pieces)]
    if not runs:
        return
    buffers: _Buffers = queue.SimpleQueue()
    for _ in range(min(READERS, len(runs))):
        buffers.put(bytearray(max(run.end - run.start for run in runs)))
    with ThreadPoolExecutor(READERS, thread_name_prefix="restore") as pool:
        reads = [pool.submit(partial(_fill_run, store, folder_uri, buffers), run) for run in runs]
        try:
            for read in as_completed(reads):
                read.result()
        finally:
            pool.shutdown(cancel_futures=True)


def plan(manifest: Manifest, owned: Iterable[Owned]) -> list[tuple[Shard, list[Piece]]]:
    """Return the pieces to read of each shard that is needed, by their offset.

    Raises:
        Broken: a number that is asked for is in no shard, or in two, or where the shard ends before it.
    """
    stored = _stored(manifest)
    pieces: dict[int, list[Piece]] = defaultdict(list)
    for part in owned:
        found = 0
        for interval, index, first, count in _overlaps(stored[part.name], part.start, part.start + part.count):
            found += count
            for state, view in enumerate(part.views):
                at = interval.offset + (state * interval.count + first - interval.start) * ITEM_BYTES
                pieces[index].append(Piece(at, view.narrow(0, first - part.start, count)))
        if found != part.count:
            raise Broken(f"the manifest has {found} of {part.count} numbers of {part.name} from {part.start}")
    for index, found_in_it in pieces.items():
        found_in_it.sort(key=lambda piece: piece.offset)
        _require_consistent(manifest.shards[index], found_in_it)
    return [(manifest.shards[index], pieces[index]) for index in sorted(pieces)]


def _require_consistent(shard: Shard, pieces: Sequence[Piece]) -> None:
    if len(shard.sha256) != chunk_count(shard) or pieces[-1].end > shard.size_bytes:
        raise Broken(f"the manifest contradicts itself about {shard.name}")


def _stored(manifest: Manifest) -> dict[str, list[tuple[Interval, int]]]:
    """Return the intervals of each parameter in their order, with the number of their shard."""
    stored = defaultdict(list)
    for index, shard in enumerate(manifest.shards):
        for interval in shard.intervals:
            stored[manifest.parameters[interval.parameter].name].append((interval, index))
    for intervals in stored.values():
        intervals.sort(key=_first_number)
    return stored


def _overlaps(
    intervals: Sequence[tuple[Interval, int]], start: int, end: int
) -> Iterator[tuple[Interval, int, int, int]]:
    """Yield what intersects ``[start, end)``: the interval, its shard, the first number in common and how many."""
    for interval, index in intervals[max(0, bisect_right(intervals, start, key=_first_number) - 1) :]:
        if interval.start >= end:
            return
        first = max(start, interval.start)
        count = min(end, interval.start + interval.count) - first
        if count > 0:
            yield interval, index, first, count


def _first_number(stored: tuple[Interval, int]) -> int:
    return stored[0].start


def plan_runs(shard: Shard, pieces: Sequence[Piece]) -> Iterator[Run]:
    """Yield the runs of at most ``CHUNKS_PER_READ`` chunks that hold all pieces, and no chunk that holds none."""
    needed = sorted({c for p in pieces for c in range(p.offset // CHUNK_BYTES, -(-p.end // CHUNK_BYTES))})
    first = last = needed[0]
    for chunk in needed[1:]:
        if chunk != last + 1 or chunk - first == CHUNKS_PER_READ:
            yield clip(shard, pieces, first, last + 1)
            first = chunk
        last = chunk
    yield clip(shard, pieces, first, last + 1)


def clip(shard: Shard, pieces: Sequence[Piece], first: int, last: int) -> Run:
    """Return the run of these chunks with the pieces, of all of the shard's in their order, that lie in it at least in part."""
    start, end = first * CHUNK_BYTES, last * CHUNK_BYTES
    inside = slice(
        bisect_right(pieces, start, key=lambda piece: piece.end),
        bisect_left(pieces, end, key=lambda piece: piece.offset),
    )
    return Run(shard, first, last, pieces[inside])


def _fill_run(store: ObjectStore, folder_uri: str, buffers: _Buffers, run: Run) -> None:
    buffer = buffers.get()
    try:
        body = memoryview(buffer)[: run.end - run.start]
        read_run(store, folder_uri + run.shard.name, run, body)
        scatter(body, run)
    finally:
        buffers.put(buffer)


def read_run(store: ObjectStore, uri: str, run: Run, body: memoryview) -> None:
    """Read a run into a buffer of its size, and check it.

    Raises:
        Broken: its bytes are not there (Missing), or not those that were written.
    """
    try:
        for _ in range(2):
            store.read_into(uri, run.start, body)
            if _hashes(body) == list(run.shard.sha256[run.first : run.last]):
                return
    except ObjectMissing as error:
        raise Missing(f"{uri} is missing") from error
    except ObjectTooShort as error:
        raise Broken(f"{uri} ends before byte {run.end}") from error
    raise Broken(f"{uri} has other bytes than were written, between {run.start} and {run.end}")


def _hashes(body: memoryview) -> list[str]:
    return [digest(body[start : start + CHUNK_BYTES]) for start in range(0, len(body), CHUNK_BYTES)]


@torch.no_grad()
def scatter(body: memoryview, run: Run) -> None:
    """Copy from the bytes of a run what each of its pieces wants of them."""
    values = torch.frombuffer(body, dtype=torch.float32)
    for piece in run.pieces:
        first, end = max(piece.offset, run.start), min(piece.end, run.end)
        count = (end - first) // ITEM_BYTES
        source = values.narrow(0, (first - run.start) // ITEM_BYTES, count)
        piece.view.narrow(0, (first - piece.offset) // ITEM_BYTES, count).copy_(source)
