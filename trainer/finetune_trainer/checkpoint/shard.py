"""The bytes of one rank's shard: a safetensors file of the numbers that the rank owns, laid out once and filled at each save.

Which numbers a rank owns does not change while its engine lives, so header, offsets and size are known before the first save, and a
save is nothing but copies into a buffer that is already there. The format is written here and not by the safetensors library because
that one makes separate copies of all tensors, and tells neither offsets nor hashes. A test reads every shard back with the library.
"""

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from finetune_trainer.checkpoint.manifest import CHUNK_BYTES, ITEM_BYTES, STATES, Interval

_LENGTH_BYTES = 8  # of the header's length, in front of it
_ALIGNMENT = 8  # of the first number
_HASHING_THREADS = 4


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


@dataclass(frozen=True, slots=True)
class Layout:
    """Where in the shard's bytes each number lies. The header comes first; what follows is in the order of the intervals."""

    header: bytes
    intervals: tuple[Interval, ...]
    size_bytes: int


def lay_out(owned: Sequence[Owned], parameter_index: dict[str, int]) -> Layout:
    """Return the layout of a shard of these numbers."""
    header = _header(owned)
    intervals, offset = [], len(header)
    for part in owned:
        intervals.append(Interval(parameter_index[part.name], part.start, part.count, offset))
        offset += len(STATES) * part.count * ITEM_BYTES
    return Layout(header, tuple(intervals), offset)


class Copy:
    """A copy, to be made by another thread, of the numbers as they are now into a buffer of the layout's size.

    Until it was made they must not change. From a device it is made on a stream of its own, so that what is computed next does not queue
    behind it; what was queued before comes first.
    """

    def __init__(self, layout: Layout, owned: Sequence[Owned], buffer: memoryview) -> None:
        self._layout, self._owned, self._buffer = layout, owned, buffer
        self._device = owned[0].views[0].device if owned else torch.device("cpu")
        self._queued = None if self._device.type == "cpu" else torch.cuda.current_stream(self._device).record_event()

    def run(self) -> float:
        """Make it, and return how many seconds that took."""
        if self._queued is None:
            return self._copy_in()
        self._queued.synchronize()
        stream = _side_stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):  # a thread starts with the first device
            return self._copy_in()

    def _copy_in(self) -> float:
        started = time.monotonic()
        copy_in(self._layout, self._owned, self._buffer)  # into memory that is not pinned: it is there on return
        return time.monotonic() - started


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for copies: PyTorch has a few dozen of them for all that ask, and would share them out anew."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@torch.no_grad()
def copy_in(layout: Layout, owned: Sequence[Owned], buffer: memoryview) -> None:
    """Fill a buffer of the layout's size with the numbers as they are now."""
    buffer[: len(layout.header)] = layout.header
    numbers, at = numbers_of(layout, buffer), 0
    for part in owned:
        for view in part.views:
            numbers[at : at + part.count].copy_(view)
            at += part.count


@torch.no_grad()
def copy_out(layout: Layout, buffer: memoryview, owned: Sequence[Owned]) -> None:
    """Set the numbers to what a buffer of the same layout holds."""
    numbers, at = numbers_of(layout, buffer), 0
    for part in owned:
        for view in part.views:
            view.copy_(numbers[at : at + part.count])
            at += part.count


def chunk_digests(buffer: memoryview) -> tuple[str, ...]:
    """Return the SHA-256 of each ``CHUNK_BYTES``; hashing lets go of the interpreter's lock, so several threads help."""
    chunks = (buffer[start : start + CHUNK_BYTES] for start in range(0, len(buffer), CHUNK_BYTES))
    if len(buffer) <= CHUNK_BYTES:
        return tuple(map(_digest, chunks))
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        return tuple(threads.map(_digest, chunks))


def _digest(chunk: memoryview) -> str:
    return hashlib.sha256(chunk).hexdigest()


def numbers_of(layout: Layout, buffer: memoryview) -> torch.Tensor:
    """Return the buffer's numbers without its header: a tensor of shape ``[count]`` over the same memory."""
    assert len(buffer) == layout.size_bytes, (len(buffer), layout.size_bytes)
    count = (layout.size_bytes - len(layout.header)) // ITEM_BYTES
    if count == 0:
        return torch.empty(0)
    return torch.frombuffer(buffer, dtype=torch.float32, count=count, offset=len(layout.header))


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
