"""Restoring on another number of ranks: each byte is read once, by one rank, and handed to whoever needs it.

Where a checkpoint was cut for other ranks than these, what one rank needs is scattered over many shards, a little in each chunk. If
every rank read the chunks it needs some of, the store would serve the checkpoint many times over: all of it to each rank where
state is not partitioned, and nearly twice where ZeRO-3 cut every parameter into slices smaller than a chunk. So the chunks are
dealt out instead, in contiguous shares; each rank reads its share in turns, checks it, and the numbers go to their places over the
network, in a gloo group of their own.

What is sent in a turn follows from the manifest and from what every rank holds, so sender and receiver agree without asking.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.distributed as dist

from finetune_trainer.checkpoint.fetch import CHUNKS_PER_READ, Run, clip, plan, read_run, scatter
from finetune_trainer.checkpoint.manifest import ITEM_BYTES, STATES, Manifest, Shard, chunk_count
from finetune_trainer.checkpoint.ranks import Ranks
from finetune_trainer.checkpoint.shard import Owned
from finetune_trainer.object_store import ObjectStore

Want: TypeAlias = tuple[int, int, int]
"""Numbers that a rank holds: index of the parameter, first number, number behind the last."""


@dataclass(frozen=True, slots=True)
class Share:
    """Neighbouring chunks ``[first, last)`` of one shard, which one rank reads in one turn."""

    shard: int
    first: int
    last: int


def deal_out(shards: Sequence[Shard], ranks: int) -> list[list[Share]]:
    """Return what each rank reads: together every chunk once, as even as whole chunks can be, in at most ``CHUNKS_PER_READ`` a turn."""
    chunks = [(index, chunk) for index, shard in enumerate(shards) for chunk in range(chunk_count(shard))]
    bounds = [len(chunks) * rank // ranks for rank in range(ranks + 1)]
    return [list(_turns(chunks[first:last])) for first, last in pairwise(bounds)]


def _turns(chunks: Sequence[tuple[int, int]]) -> Iterator[Share]:
    start = 0
    for at in range(1, len(chunks) + 1):
        ends = at == len(chunks) or chunks[at][0] != chunks[start][0] or at - start == CHUNKS_PER_READ
        if ends:
            yield Share(chunks[start][0], chunks[start][1], chunks[at - 1][1] + 1)
            start = at


class Receivers:
    """Who holds which numbers, to be asked for those of an interval."""

    def __init__(self, wants: Sequence[Sequence[Want]]) -> None:
        self._of_parameter: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for rank, parts in enumerate(wants):
            for parameter, start, end in parts:
                self._of_parameter[parameter].append((start, end, rank))
        for found in self._of_parameter.values():
            found.sort()
        self._starts = {parameter: [start for start, _, _ in found] for parameter, found in self._of_parameter.items()}

    def of(self, parameter: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield the rank, first number and number behind the last of each part that lies in ``[start, end)``."""
        found = self._of_parameter[parameter]
        at = max(0, bisect_right(self._starts.get(parameter, []), start) - 1)
        for first, last, rank in found[at:]:
            if first >= end:
                return
            if last > start:
                yield rank, max(first, start), min(last, end)


def spans_to_send(shard: Shard, run: Run, receivers: Receivers, ranks: int) -> list[list[tuple[int, int]]]:
    """Return for each rank the bytes of the run that it needs, as ``[start, end)`` of the object, in their order."""
    spans: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for interval in shard.intervals:
        for state in range(len(STATES)):
            base = interval.offset + state * interval.count * ITEM_BYTES
            if base >= run.end or base + interval.count * ITEM_BYTES <= run.start:
                continue
            for rank, first, last in receivers.of(interval.parameter, interval.start, interval.start + interval.count):
                start, end = base + (first - interval.start) * ITEM_BYTES, base + (last - interval.start) * ITEM_BYTES
                if start < run.end and run.start < end:
                    spans[rank].append((max(start, run.start), min(end, run.end)))
    for found in spans:
        found.sort()
    return spans


class Exchange:
    """One restore by all ranks together."""

    def __init__(
        self, *, store: ObjectStore, folder_uri: str, manifest: Manifest, held: Sequence[Owned], ranks: Ranks
    ) -> None:
        self._store = store
        self._folder_uri = folder_uri
        self._manifest = manifest
        self._ranks = ranks
        pieces = ranks.each_keeps(lambda: plan(manifest, held))
        self._pieces = {shard.name: found for shard, found in pieces}
        self._shares = deal_out(manifest.shards, ranks.size)
        self._index = {parameter.name: number for number, parameter in enumerate(manifest.parameters)}
        self._held = held

    def to_holders(self) -> None:
        """Read the shares and send each number to the rank that holds it. For state that is partitioned.

        Raises:
            Broken: on all ranks, if one could not read its share.
        """
        wants = self._ranks.each(
            lambda: [(self._index[part.name], part.start, part.start + part.count) for part in self._held]
        )
        receivers = Receivers(wants)
        for runs, body in self._turns():
            mine = runs[self._ranks.rank]
            sent = [torch.empty(0)] * self._ranks.size
            if mine is not None:
                numbers = torch.frombuffer(body, dtype=torch.float32)
                spans = spans_to_send(mine.shard, mine, receivers, self._ranks.size)
                sent = [_gathered(numbers, mine, found) for found in spans]
            counts = [0 if run is None else _count(run) for run in runs]
            received = torch.empty(sum(counts))
            dist.all_to_all_single(
                received, torch.cat(sent), counts, [len(numbers) for numbers in sent], group=self._ranks.group
            )
            _set(runs, received)

    def to_all(self) -> None:
        """Read the shares and send each whole to all ranks. For state that every rank holds.

        Raises:
            Broken: on all ranks, if one could not read its share.
        """
        for runs, body in self._turns():
            for source, run in enumerate(runs):
                if run is None:
                    continue
                whole = body if source == self._ranks.rank else memoryview(bytearray(run.end - run.start))
                numbers = torch.frombuffer(whole, dtype=torch.float32)
                dist.broadcast(numbers, src=source, group=self._ranks.group)
                scatter(whole, run)

    def _turns(self) -> Iterator[tuple[list[Run | None], memoryview]]:
        """Yield, turn by turn, what each rank has read with the pieces of this rank in it, and the bytes of this rank's own.

        The next turn is read while the numbers of this one are on their way.
        """
        mine = self._shares[self._ranks.rank]
        with ThreadPoolExecutor(1, "restore") as reader:
            reading = [reader.submit(self._read, share) for share in mine[:1]]
            for turn in range(max(map(len, self._shares))):
                body = self._ranks.each_keeps(lambda: reading.pop().result() if reading else memoryview(b""))
                if turn + 1 < len(mine):
                    reading.append(reader.submit(self._read, mine[turn + 1]))
                yield [self._run(shares, turn) for shares in self._shares], body

    def _read(self, share: Share) -> memoryview:
        run = self._cut(share)
        body = memoryview(bytearray(run.end - run.start))
        read_run(self._store, self._folder_uri + run.shard.name, run, body)
        return body

    def _run(self, shares: Sequence[Share], turn: int) -> Run | None:
        return self._cut(shares[turn]) if turn < len(shares) else None

    def _cut(self, share: Share) -> Run:
        shard = self._manifest.shards[share.shard]
        return clip(shard, self._pieces.get(shard.name, []), share.first, share.last)


def _gathered(numbers: torch.Tensor, run: Run, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    found = [numbers[(start - run.start) // ITEM_BYTES : (end - run.start) // ITEM_BYTES] for start, end in spans]
    return torch.cat(found) if found else numbers[:0]


def _count(run: Run) -> int:
    """Return how many numbers of a run this rank needs."""
    return sum(min(piece.end, run.end) - max(piece.offset, run.start) for piece in run.pieces) // ITEM_BYTES


@torch.no_grad()
def _set(runs: Sequence[Run | None], received: torch.Tensor) -> None:
    """Copy what came, in the order of ranks and then of bytes, to its places."""
    at = 0
    for run in filter(None, runs):
        for piece in run.pieces:
            first, end = max(piece.offset, run.start), min(piece.end, run.end)
            count = (end - first) // ITEM_BYTES
            piece.view.narrow(0, (first - piece.offset) // ITEM_BYTES, count).copy_(received[at : at + count])
            at += count
