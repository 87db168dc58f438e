"""Who reads what, and who gets what, when a checkpoint is restored on another number of ranks. Pure."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.checkpoint import manifest as manifests
from finetune_trainer.checkpoint.exchange import Receivers, deal_out, spans_to_send
from finetune_trainer.checkpoint.fetch import CHUNKS_PER_READ, clip, plan
from finetune_trainer.checkpoint.manifest import CHUNK_BYTES, Interval, Manifest, Parameter, Position, Shard
from finetune_trainer.checkpoint.shard import Owned


def shards_of(chunks):
    return [Shard(f"rank-{n}", count * CHUNK_BYTES - 4, ("",) * count, ()) for n, count in enumerate(chunks)]


@given(chunks=st.lists(st.integers(1, 30), min_size=1, max_size=9), ranks=st.integers(1, 12))
def test_every_chunk_is_read_once_evenly_and_never_over_the_end_of_a_shard(chunks, ranks):
    shares = deal_out(shards_of(chunks), ranks)
    read = [(share.shard, chunk) for mine in shares for share in mine for chunk in range(share.first, share.last)]
    assert read == [(shard, chunk) for shard, count in enumerate(chunks) for chunk in range(count)]
    sizes = [sum(share.last - share.first for share in mine) for mine in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(0 < share.last - share.first <= CHUNKS_PER_READ for mine in shares for share in mine)


@pytest.mark.parametrize(("shards", "ranks"), [(1024, 1000), (2, 3), (64, 16)])
def test_requests_are_few(shards, ranks):
    listed = shards_of([103] * shards)
    requests = sum(map(len, deal_out(listed, ranks)))
    assert requests <= sum(shard.size_bytes for shard in listed) / 8 / 2**20 + ranks


def cut(size, ranks):
    """ZeRO's way: equal slices, rounded up; the last may be short or empty."""
    step = -(-size // ranks)
    return [(min(size, rank * step), min(size, (rank + 1) * step)) for rank in range(ranks)]


def checkpoint_of(sizes, ranks):
    """A checkpoint in which each parameter is cut over all ranks, without its bytes."""
    shards = []
    for rank in range(ranks):
        intervals, offset = [], 64
        for number, size in enumerate(sizes):
            start, end = cut(size, ranks)[rank]
            if start < end:
                intervals.append(Interval(number, start, end - start, offset))
                offset += 12 * (end - start)
        shards.append(Shard(f"rank-{rank}", offset, ("",) * -(-offset // manifests.CHUNK_BYTES), tuple(intervals)))
    parameters = tuple(Parameter(str(number), size) for number, size in enumerate(sizes))
    return Manifest(Position(1, 1), 1, ranks, 3, "", parameters, {}, tuple(shards))


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    written=st.integers(1, 5),
    read=st.integers(1, 5),
    chunk=st.sampled_from([64, 100, 256]),
)
def test_what_is_sent_is_what_is_awaited(sizes, written, read, chunk):
    """Sender and receiver compute the spans of a turn apart: same bytes, same order, and together everything once."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("manifest", "fetch"):
            patch.setattr(f"finetune_trainer.checkpoint.{module}.CHUNK_BYTES", chunk)
        manifest = checkpoint_of(sizes, written)
        wants = [[(n, *cut(size, read)[rank]) for n, size in enumerate(sizes)] for rank in range(read)]
        receivers = Receivers(wants)
        sent = [[] for _ in range(read)]
        awaited = [[] for _ in range(read)]
        for share in (share for mine in deal_out(manifest.shards, read) for share in mine):
            shard = manifest.shards[share.shard]
            run = clip(shard, [], share.first, share.last)
            for rank, spans in enumerate(spans_to_send(shard, run, receivers, read)):
                sent[rank] += [(shard.name, *span) for span in spans]
            for rank in range(read):
                owned = [
                    Owned(str(n), start, (torch.empty(end - start),) * 3)
                    for n, start, end in wants[rank]
                    if start < end
                ]
                pieces = {found.name: pieces for found, pieces in plan(manifest, owned)}.get(shard.name, [])
                mine = clip(shard, pieces, share.first, share.last)
                awaited[rank] += [
                    (shard.name, max(piece.offset, mine.start), min(piece.end, mine.end)) for piece in mine.pieces
                ]
        assert sent == awaited
        total = sum(end - start for spans in sent for _, start, end in spans)
        assert total == 12 * sum(sizes)
