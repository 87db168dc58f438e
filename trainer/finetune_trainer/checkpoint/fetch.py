"""Reading a checkpoint back: the bytes that a rank needs, in whole chunks, verified before a number is used.

A rank asks for intervals of parameters; where they were cut differently, at another world size or ZeRO stage, each is
put together from those that intersect it. Bytes that do not hash to what the manifest says are read once more, since
they may have broken on their way, and then the checkpoint counts as broken.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from finetune_trainer.checkpoint.manifest import (
    CHUNK_BYTES,
    ITEM_BYTES,
    Manifest,
    Shard,
    chunk_count,
    digest,
)
from finetune_trainer.checkpoint.shard import Owned
from finetune_trainer.object_store import ObjectMissing, ObjectStore

CHUNKS_PER_READ = 8


class Broken(Exception):
    """A checkpoint is torn, truncated, changed or missing in part. The message says which object, and how."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of an object that belong into a tensor: a live view of exactly their numbers."""

    offset: int
    view: torch.Tensor

    @property
    def end(self) -> int:
        """The byte behind the last."""
        return self.offset + self.view.numel() * ITEM_BYTES


def fill(store: ObjectStore, folder_uri: str, manifest: Manifest, owned: Iterable[Owned]) -> None:
    """Read the values of all ``owned`` views from the checkpoint below ``folder_uri`` (which ends with a slash).

    Raises:
        Broken: it cannot be read as it was written; the views are then in no particular state.
    """
    for shard, pieces in plan(manifest, owned):
        for first, last in _runs(shard, pieces):
            body = _verified(store, folder_uri + shard.name, shard, first, last)
            _scatter(body, first * CHUNK_BYTES, pieces)


def plan(manifest: Manifest, owned: Iterable[Owned]) -> list[tuple[Shard, list[Piece]]]:
    """Return the pieces to read of each shard that is needed, by their offset.

    Raises:
        Broken: a number that is asked for is in no shard, or in two.
    """
    stored = defaultdict(list)
    for index, shard in enumerate(manifest.shards):
        for interval in shard.intervals:
            stored[manifest.parameters[interval.parameter].name].append((interval, index))
    pieces: dict[int, list[Piece]] = defaultdict(list)
    for part in owned:
        found = 0
        for interval, index in stored[part.name]:
            first = max(part.start, interval.start)
            count = min(part.start + part.count, interval.start + interval.count) - first
            if count <= 0:
                continue
            found += count
            for state, view in enumerate(part.views):
                at = interval.offset + (state * interval.count + first - interval.start) * ITEM_BYTES
                pieces[index].append(Piece(at, view.narrow(0, first - part.start, count)))
        if found != part.count:
            raise Broken(f"the manifest has {found} of {part.count} numbers of {part.name} from {part.start}")
    return [(manifest.shards[index], sorted(pieces[index], key=lambda piece: piece.offset)) for index in sorted(pieces)]


def _runs(shard: Shard, pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    """Yield runs of neighbouring chunks that are needed, as half-open intervals of at most ``CHUNKS_PER_READ``."""
    if len(shard.sha256) != chunk_count(shard) or any(piece.end > shard.size_bytes for piece in pieces):
        raise Broken(f"the manifest contradicts itself about {shard.name}")
    needed = sorted({c for p in pieces for c in range(p.offset // CHUNK_BYTES, -(-p.end // CHUNK_BYTES))})
    first = last = needed[0]
    for chunk in needed[1:]:
        if chunk != last + 1 or chunk - first == CHUNKS_PER_READ:
            yield first, last + 1
            first = chunk
        last = chunk
    yield first, last + 1


def _verified(store: ObjectStore, uri: str, shard: Shard, first: int, last: int) -> bytes:
    start = first * CHUNK_BYTES
    length = min(last * CHUNK_BYTES, shard.size_bytes) - start
    try:
        for _ in range(2):
            body = store.get(uri, start, length)
            if _hashes(body) == list(shard.sha256[first:last]):
                return body
    except ObjectMissing as error:
        raise Broken(f"{uri} is missing") from error
    raise Broken(f"{uri} has other bytes than were written, between {start} and {start + length}")


def _hashes(body: bytes) -> list[str]:
    view = memoryview(body)
    return [digest(view[start : start + CHUNK_BYTES]) for start in range(0, len(body), CHUNK_BYTES)]


@torch.no_grad()
def _scatter(body: bytes, start: int, pieces: Sequence[Piece]) -> None:
    """Copy from the bytes, which begin at ``start`` of the object, what each piece wants of them."""
    values = torch.frombuffer(bytearray(body), dtype=torch.float32)
    for piece in pieces:
        first, end = max(piece.offset, start), min(piece.end, start + len(body))
        if first < end:
            count = (end - first) // ITEM_BYTES
            source = values.narrow(0, (first - start) // ITEM_BYTES, count)
            piece.view.narrow(0, (first - piece.offset) // ITEM_BYTES, count).copy_(source)
