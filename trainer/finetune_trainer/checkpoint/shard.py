"""Writing the numbers that one rank owns as one safetensors file, hashed chunk by chunk while it is written.

The format is written here and not by the safetensors library because that one wants all tensors in memory at once, as
separate copies, and tells neither offsets nor hashes. A test reads every file back with the library.
"""

import errno
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_trainer.checkpoint.manifest import CHUNK_BYTES, ITEM_BYTES, STATES, Interval, Shard
from finetune_trainer.errors import StorageUnavailable

_PIECE = 4 * 2**20  # numbers copied off a device at a time
_LENGTH_BYTES = 8  # of the header's length, in front of it
_ALIGNMENT = 8  # of the first number


@dataclass(frozen=True, slots=True)
class Owned:
    """What a rank holds of a flattened parameter: live one-dimensional FP32 views, one for each of ``STATES``."""

    name: str
    start: int
    views: tuple[torch.Tensor, ...]

    @property
    def count(self) -> int:
        """How many numbers of the parameter these are."""
        return self.views[0].numel()


def write_shard(path: Path, owned: Sequence[Owned], parameter_index: dict[str, int]) -> Shard:
    """Write a shard and return its description, named after the file.

    Raises:
        StorageUnavailable: the file's device is full.
    """
    header = _header(owned)
    chunks = _ChunkHashes()
    try:
        with path.open("wb") as file:
            for piece in _pieces(header, owned):
                file.write(piece)
                chunks.update(piece)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise StorageUnavailable(f"no room left in {path.parent} to stage a checkpoint: give the pods more") from error
    return Shard(path.name, path.stat().st_size, chunks.finish(), _intervals(len(header), owned, parameter_index))


def _header(owned: Sequence[Owned]) -> bytes:
    tensors, offset = {}, 0
    for part in owned:
        for state in STATES:
            end = offset + part.count * ITEM_BYTES
            tensors[f"{part.name}/{state}/{part.start}"] = {
                "dtype": "F32",
                "shape": [part.count],
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _intervals(offset: int, owned: Sequence[Owned], parameter_index: dict[str, int]) -> tuple[Interval, ...]:
    intervals = []
    for part in owned:
        intervals.append(Interval(parameter_index[part.name], part.start, part.count, offset))
        offset += len(STATES) * part.count * ITEM_BYTES
    return tuple(intervals)


def _pieces(header: bytes, owned: Sequence[Owned]) -> Iterator[memoryview]:
    yield memoryview(header)
    for part in owned:
        for view in part.views:
            for start in range(0, part.count, _PIECE):
                yield view[start : start + _PIECE].detach().cpu().numpy().data.cast("B")


class _ChunkHashes:
    """SHA-256 of each ``CHUNK_BYTES`` of what goes by."""

    def __init__(self) -> None:
        self._finished: list[str] = []
        self._hash = hashlib.sha256()
        self._room = CHUNK_BYTES

    def update(self, data: memoryview) -> None:
        while data:
            taken, data = data[: self._room], data[self._room :]
            self._hash.update(taken)
            self._room -= len(taken)
            if self._room == 0:
                self._next()

    def finish(self) -> tuple[str, ...]:
        if self._room < CHUNK_BYTES:
            self._next()
        return tuple(self._finished)

    def _next(self) -> None:
        self._finished.append(self._hash.hexdigest())
        self._hash = hashlib.sha256()
        self._room = CHUNK_BYTES
