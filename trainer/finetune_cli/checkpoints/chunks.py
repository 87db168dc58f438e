"""Reading objects of a checkpoint in chunks, each held against its hash, several at a time and no more than those in memory."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from finetune_cli.checkpoints.layout import Fault
from finetune_trainer.checkpoint.manifest import CHUNK_BYTES, Shard, digest
from finetune_trainer.object_store import ObjectMissing, ObjectStore

READERS = 4
"""Chunks under way at once. A chunk is in memory up to three times (pieces off the network, joined, converted): about 100 MiB in all."""

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return ``work`` of each item, in their order; the first error ends it."""
    pool = ThreadPoolExecutor(READERS)
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)


def read_chunk(store: ObjectStore, uri: str, shard: Shard, index: int) -> bytes | Fault:
    """Return a chunk of a shard, or what is wrong with it. Bytes that do not match may have broken on their way: once more."""
    first = index * CHUNK_BYTES
    end = min(first + CHUNK_BYTES, shard.size_bytes)
    body = b""
    for _ in range(2):
        try:
            body = store.get(uri, first, end - first)
        except ObjectMissing:
            return Fault(uri, "is missing")
        if digest(body) == shard.sha256[index]:
            return body
    if len(body) < end - first:
        return Fault(uri, f"ends at byte {first + len(body)}", first, end)
    return Fault(uri, "has other bytes than were written", first, end)
