"""The format on disk is frozen: what is written today must be read for ever. See docs/checkpoint-format.md."""

import gzip
import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors import safe_open

from finetune_trainer.checkpoint import fetch, head, manifest
from finetune_trainer.checkpoint.fetch import Broken, fill, plan
from finetune_trainer.checkpoint.manifest import CHUNK_BYTES, Interval, Manifest, Parameter, Position, Shard
from finetune_trainer.checkpoint.shard import Owned
from finetune_trainer.object_store import MemoryObjectStore
from tests.trainer.checkpoint.shards import write_shard

HEAD = head.Head(
    sequence=12,
    generation=3,
    nonce="6b1f",
    kept=(head.Kept(100, "checkpoints/step-100/g3-a1/manifest.json", "ab" * 32, 4096, "2026-01-02T03:04:05Z", 0.75),),
    lineage=2,
    skipped_ranges=((640, 704), (128, 192)),
    rollbacks=2,
    graded_by="MacroF1",
)
HEAD_DOCUMENT = {
    "version": 1,
    "sequence": 12,
    "generation": 3,
    "nonce": "6b1f",
    "kept": [
        {
            "step": 100,
            "manifest": "checkpoints/step-100/g3-a1/manifest.json",
            "sha256": "ab" * 32,
            "sizeBytes": 4096,
            "commitTime": "2026-01-02T03:04:05Z",
            "metric": 0.75,
        }
    ],
    "lineage": 2,
    "skippedRanges": [[640, 704], [128, 192]],
    "rollbacks": 2,
    "gradedBy": "MacroF1",
}
MANIFEST = Manifest(
    position=Position(100, 6400, ((128, 192),), (2.5, 0.25)),
    generation=3,
    world_size=2,
    zero_stage=2,
    recipe_digest="cd" * 32,
    sources={"model": {"s3://m/bert/config.json": "5c"}, "train": {"s3://d/train.jsonl": "7f-2"}},
    parameters=(Parameter("a.weight", 6), Parameter("a.bias", 2)),
    scalars={"adamStep": 100, "lossScale": {"cur_scale": 65536.0}},
    shards=(
        Shard("rank-00000.safetensors", 264, ("ef" * 32,), (Interval(0, 0, 5, 192),)),
        Shard("rank-00001.safetensors", 300, ("01" * 32,), (Interval(0, 5, 1, 256), Interval(1, 0, 2, 268))),
    ),
)
MANIFEST_DOCUMENT = {
    "version": 1,
    "step": 100,
    "samplesConsumed": 6400,
    "skippedRanges": [[128, 192]],
    "recentLosses": [2.5, 0.25],
    "generation": 3,
    "worldSize": 2,
    "zeroStage": 2,
    "recipe": "cd" * 32,
    "sources": {"model": {"s3://m/bert/config.json": "5c"}, "train": {"s3://d/train.jsonl": "7f-2"}},
    "chunkBytes": 8388608,
    "states": ["fp32", "exp_avg", "exp_avg_sq"],
    "scalars": {"adamStep": 100, "lossScale": {"cur_scale": 65536.0}},
    "parameters": [["a.weight", 6], ["a.bias", 2]],
    "shards": [
        {"name": "rank-00000.safetensors", "sizeBytes": 264, "sha256": ["ef" * 32], "intervals": [[0, 0, 5, 192]]},
        {
            "name": "rank-00001.safetensors",
            "sizeBytes": 300,
            "sha256": ["01" * 32],
            "intervals": [[0, 5, 1, 256], [1, 0, 2, 268]],
        },
    ],
}


def test_a_head_without_what_came_later_is_read():
    """The first HEADs knew neither rollbacks nor evaluations."""
    (entry,) = HEAD_DOCUMENT["kept"]
    later = ("lineage", "skippedRanges", "rollbacks", "metric")
    kept = [{name: value for name, value in entry.items() if name not in later}]
    document = {name: value for name, value in HEAD_DOCUMENT.items() if name not in later} | {"kept": kept}
    expected = replace(HEAD, kept=(replace(HEAD.kept[0], metric=None),), lineage=0, skipped_ranges=(), rollbacks=0)
    assert head.decode(json.dumps(document).encode()) == expected


def test_head_is_this_document():
    assert json.loads(head.encode(HEAD)) == HEAD_DOCUMENT
    assert head.decode(json.dumps(HEAD_DOCUMENT).encode()) == HEAD


def test_a_manifest_is_this_document():
    assert json.loads(manifest.encode(MANIFEST)) == MANIFEST_DOCUMENT
    assert manifest.decode(json.dumps(MANIFEST_DOCUMENT).encode()) == MANIFEST


def test_a_manifest_without_sources_is_read_and_says_nothing_of_them():
    """The first manifests had none."""
    document = {name: value for name, value in MANIFEST_DOCUMENT.items() if name != "sources"}
    silent = replace(MANIFEST, sources={})
    assert manifest.decode(json.dumps(document).encode()) == silent
    assert json.loads(manifest.encode(silent)) == document


@pytest.mark.parametrize("decode", [head.decode, manifest.decode])
@pytest.mark.parametrize("body", [b"", b"\xff", b"null", b"[]", b"{}", b'{"version": 2}', b'"text"'])
def test_what_is_no_document_is_unreadable_and_nothing_worse(decode, body):
    with pytest.raises(head.Unreadable):
        decode(body)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_any_other_json_in_a_field_is_unreadable_and_nothing_worse(value):
    for document, decode in ((HEAD_DOCUMENT, head.decode), (MANIFEST_DOCUMENT, manifest.decode)):
        for name in document:
            with suppress(head.Unreadable):
                decode(json.dumps({**document, name: value}).encode())


def test_a_large_manifest_is_compressed_and_reads_the_same():
    intervals = tuple(Interval(0, 7 * number, 7, 192 + 84 * number) for number in range(60_000))
    large = replace(MANIFEST, shards=(Shard("rank-00000.safetensors", 1, (), intervals),))
    body = manifest.encode(large)
    assert gzip.decompress(body).startswith(b'{"version":1,"step":100,')
    assert len(body) < len(gzip.decompress(body)) / 3
    assert manifest.decode(body) == large
    assert manifest.encode(large) == body, "the same bytes each time: they are hashed"
    for torn in (body[:-9], body[:100], body[:2]):
        with pytest.raises(head.Unreadable):
            manifest.decode(torn)


def owned(name, start, values):
    views = tuple(torch.tensor(values, dtype=torch.float32) + state for state in range(3))
    return Owned(name, start, views)


def test_a_shard_is_a_safetensors_file(tmp_path):
    parts = [owned("a.weight", 2, [1.0, 2.0, 3.0]), owned("a.bias", 0, [7.0])]
    shard = write_shard(tmp_path / "rank-00000.safetensors", parts, {"a.weight": 0, "a.bias": 1})
    body = (tmp_path / "rank-00000.safetensors").read_bytes()
    with safe_open(tmp_path / "rank-00000.safetensors", "numpy") as file:
        assert {key: file.get_tensor(key).tolist() for key in file.keys()} == {  # noqa: SIM118  not a dict
            "a.weight/fp32/2": [1, 2, 3],
            "a.weight/exp_avg/2": [2, 3, 4],
            "a.weight/exp_avg_sq/2": [3, 4, 5],
            "a.bias/fp32/0": [7],
            "a.bias/exp_avg/0": [8],
            "a.bias/exp_avg_sq/0": [9],
        }
    assert (shard.name, shard.size_bytes) == ("rank-00000.safetensors", len(body))
    assert shard.sha256 == (hashlib.sha256(body).hexdigest(),)
    for interval, values in zip(shard.intervals, ([1, 2, 3, 2, 3, 4, 3, 4, 5], [7, 8, 9]), strict=True):
        assert np.frombuffer(body, np.float32, len(values), interval.offset).tolist() == values


def test_a_rank_that_owns_nothing_writes_a_shard_all_the_same(tmp_path):
    shard = write_shard(tmp_path / "empty", [], {})
    assert shard.intervals == ()
    with safe_open(tmp_path / "empty", "numpy") as file:
        assert list(file.keys()) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A shard of several chunks: 7.3 million numbers in three states, 87 MB."""
    path = tmp_path_factory.mktemp("large") / "rank-00000.safetensors"
    part = Owned("w", 0, tuple(torch.arange(7_300_001, dtype=torch.float32) + 0.5 * state for state in range(3)))
    shard = write_shard(path, [part], {"w": 0})
    store = MemoryObjectStore()
    store.upload_file(path, "s3://b/rank-00000.safetensors")
    description = Manifest(Position(1, 1), 1, 1, 1, "", (Parameter("w", 7_300_001),), {}, (shard,))
    return store, description, part


def test_chunks_are_hashed_each(large):
    store, description, _ = large
    body = store.get("s3://b/rank-00000.safetensors")
    chunks = [body[start : start + CHUNK_BYTES] for start in range(0, len(body), CHUNK_BYTES)]
    assert description.shards[0].sha256 == tuple(hashlib.sha256(chunk).hexdigest() for chunk in chunks)
    assert len(chunks) == 11


@pytest.mark.parametrize(
    ("start", "count"), [(0, 7_300_001), (0, 1), (7_300_000, 1), (2_097_100, 200), (3_000_000, 2_500_000)]
)
def test_any_interval_of_many_chunks_is_read_right(large, start, count):
    store, description, part = large
    target = Owned("w", start, tuple(torch.full((count,), -1.0) for _ in range(3)))
    fill(store, "s3://b/", description, [target])
    for view, whole in zip(target.views, part.views, strict=True):
        assert torch.equal(view, whole[start : start + count])


class Watched(MemoryObjectStore):
    """Notes every read, as chunks, and lets a test look on while several are under way."""

    def __init__(self, store, during=lambda read: None):
        super().__init__()
        self.objects = dict(store.objects)
        self.reads = []
        self.during = during

    def read_into(self, uri, start, out):
        self.reads.append((start // CHUNK_BYTES, -(-len(out) // CHUNK_BYTES)))
        super().read_into(uri, start, out)
        self.during(out)


def targets(count):
    return Owned("w", 0, tuple(torch.zeros(count) for _ in range(3)))


def test_only_the_chunks_that_are_needed_are_read(large):
    store, description, _ = large
    watched = Watched(store)
    fill(watched, "s3://b/", description, [Owned("w", 100, tuple(torch.zeros(10) for _ in range(3)))])
    assert sorted(watched.reads) == [(0, 1), (3, 1), (6, 1)], "one chunk for each of the three states"


def test_neighbouring_chunks_are_read_together(large):
    store, description, part = large
    watched = Watched(store)
    fill(watched, "s3://b/", description, [targets(part.count)])
    assert sorted(watched.reads) == [(0, 4), (4, 4), (8, 3)]


def test_so_many_runs_are_read_side_by_side_and_no_more(large, monkeypatch):
    store, description, part = large
    monkeypatch.setattr(fetch, "CHUNKS_PER_READ", 1)
    lock, together, under_way, most = threading.Lock(), threading.Event(), 0, 0

    def look(_):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        if most == fetch.READERS:
            together.set()
        together.wait(30)
        with lock:
            under_way -= 1

    fill(Watched(store, look), "s3://b/", description, [targets(part.count)])
    assert most == fetch.READERS


def test_a_chunk_that_breaks_on_its_way_is_read_once_more(large):
    store, description, part = large
    faults = iter([1])

    def damage(out):
        out[-1] ^= next(faults, 0)

    watched = Watched(store, damage)
    target = Owned("w", 100, tuple(torch.zeros(10) for _ in range(3)))
    fill(watched, "s3://b/", description, [target])
    assert len(watched.reads) == 4
    assert all(torch.equal(view, whole[100:110]) for view, whole in zip(target.views, part.views, strict=True))


def flip(body):
    return body[:-1] + bytes([body[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(flip, r"rank-00000\.safetensors has other bytes than were written, between 67108864", id="a bit"),
        pytest.param(lambda body: body[:-1], r"rank-00000\.safetensors ends before byte 87600", id="the last byte"),
        pytest.param(lambda body: None, r"rank-00000\.safetensors is missing", id="the object"),
    ],
)
def test_what_is_damaged_in_the_store_is_broken_and_named(large, change, message):
    store, description, part = large
    damaged = Watched(store)
    damaged.objects = {u: changed for u, body in store.objects.items() if (changed := change(body)) is not None}
    with pytest.raises(Broken, match=message):
        fill(damaged, "s3://b/", description, [targets(part.count)])


cuts = st.lists(st.integers(1, 39), max_size=6, unique=True).map(sorted)


def cut(size, points):
    edges = [0, *(point for point in points if point < size), size]
    return list(pairwise(edges))


@given(written=cuts, read=cuts, other=st.integers(1, 20))
def test_parameters_cut_one_way_are_read_cut_any_other_way(tmp_path_factory, written, read, other):
    folder, store, shards = tmp_path_factory.mktemp("cut"), MemoryObjectStore(), []
    sizes = {"a": 40, "b": other}
    truth = {name: torch.rand(3, size) for name, size in sizes.items()}
    for rank, (first, end) in enumerate(cut(40, written)):
        parts = [Owned("a", first, tuple(truth["a"][:, first:end]))]
        parts += [Owned("b", 0, tuple(truth["b"]))] if rank == 0 else []
        shards.append(write_shard(folder / f"rank-{rank}", parts, {"a": 1, "b": 0}))
        store.upload_file(folder / f"rank-{rank}", f"s3://b/rank-{rank}")
    parameters = (Parameter("b", other), Parameter("a", 40))
    description = Manifest(Position(1, 1), 1, len(shards), 2, "", parameters, {}, tuple(shards))
    description = manifest.decode(manifest.encode(description))
    targets = [Owned("a", first, tuple(torch.zeros(3, end - first))) for first, end in cut(40, read)]
    targets.append(Owned("b", 0, tuple(torch.zeros(3, other))))
    fill(store, "s3://b/", description, targets)
    for target in targets:
        for state, view in enumerate(target.views):
            assert torch.equal(view, truth[target.name][state][target.start : target.start + target.count])


def test_numbers_that_no_shard_has_are_damage():
    target = Owned("a.weight", 4, tuple(torch.zeros(4) for _ in range(3)))
    with pytest.raises(Broken, match=r"the manifest has 2 of 4 numbers of a\.weight from 4"):
        plan(MANIFEST, [target])


@pytest.mark.parametrize(
    "shard",
    [
        Shard("x", 264, (), (Interval(0, 0, 6, 192),)),
        Shard("x", 200, ("ef" * 32,), (Interval(0, 0, 6, 192),)),
    ],
    ids=["no hashes", "an interval behind the end"],
)
def test_a_manifest_that_contradicts_itself_is_damage(shard):
    description = Manifest(Position(1, 1), 1, 1, 1, "", (Parameter("a", 6),), {}, (shard,))
    with pytest.raises(Broken, match="contradicts itself"):
        fill(MemoryObjectStore(), "s3://b/", description, [Owned("a", 0, tuple(torch.zeros(6) for _ in range(3)))])
