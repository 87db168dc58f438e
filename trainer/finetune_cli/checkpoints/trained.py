"""Brings what was trained from a checkpoint's chunks to where it belongs in files, rounded, and holds no tensor whole.

Each chunk that has wanted numbers is read once, verified, and scattered to as many places as it has intervals. So memory does not
depend on the size of a tensor, nor on how many ranks wrote the checkpoint.
"""

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from finetune_cli.checkpoints.chunks import read_chunk, side_by_side
from finetune_cli.checkpoints.layout import Fault
from finetune_cli.errors import Damaged
from finetune_trainer.checkpoint.manifest import CHUNK_BYTES, ITEM_BYTES, Interval, Manifest, Shard
from finetune_trainer.object_store import ObjectStore
from finetune_trainer.rounding import ITEM_BYTES as BYTES_OF
from finetune_trainer.rounding import rounded


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the numbers of a parameter go: a file, the place of the first, and the format."""

    descriptor: int
    begin: int
    dtype: str


def fetch_trained(store: ObjectStore, folder_uri: str, manifest: Manifest, slots: Mapping[str, Slot]) -> None:
    """Write the values of parameters into their slots.

    Args:
        store: where the checkpoint lies.
        folder_uri: below which key; it ends with a slash.
        manifest: the checkpoint, whose layout has no faults.
        slots: for each parameter that is wanted, where it goes.

    Raises:
        Damaged: bytes are not those that were written.
    """
    for shard in manifest.shards:
        wanted: dict[int, list[tuple[Interval, Slot]]] = defaultdict(list)
        for interval in shard.intervals:
            slot = slots.get(manifest.parameters[interval.parameter].name)
            if slot is not None and interval.count:
                for chunk in range(interval.offset // CHUNK_BYTES, (_end(interval) - 1) // CHUNK_BYTES + 1):
                    wanted[chunk].append((interval, slot))
        side_by_side(partial(_scatter_chunk, store, folder_uri + shard.name, shard), sorted(wanted.items()))


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it, in as many writes as the system makes of it."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _scatter_chunk(store: ObjectStore, uri: str, shard: Shard, wanted: tuple[int, list[tuple[Interval, Slot]]]) -> None:
    index, places = wanted
    body = read_chunk(store, uri, shard, index)
    if isinstance(body, Fault):
        where = "" if body.first is None else f", bytes {body.first} to {body.end},"
        raise Damaged(f"{uri}{where} {body.problem}: export another checkpoint, verify --all tells which are whole")
    begin = index * CHUNK_BYTES
    values = np.frombuffer(body, "<f4")
    for interval, slot in places:
        first, end = max(interval.offset, begin), min(_end(interval), begin + len(body))
        numbers = rounded(values[(first - begin) // ITEM_BYTES : (end - begin) // ITEM_BYTES], slot.dtype)
        at = interval.start + (first - interval.offset) // ITEM_BYTES
        write_at(slot.descriptor, numbers.data.cast("B"), slot.begin + at * BYTES_OF[slot.dtype])


def _end(interval: Interval) -> int:
    """Return the byte behind the FP32 values; those of Adam's moments follow."""
    return interval.offset + interval.count * ITEM_BYTES
