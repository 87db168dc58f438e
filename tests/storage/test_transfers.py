"""Large objects to and from memory: the same cases for the store in memory and for a real S3 server."""

import hashlib
import itertools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from finetune_trainer.errors import StorageUnavailable
from finetune_trainer.object_store import (
    CHUNK_BYTES,
    MemoryObjectStore,
    ObjectMissing,
    ObjectStore,
    ObjectTooShort,
    S3ObjectStore,
    UploadStopped,
)
from finetune_trainer.object_store.paced_body import PACED_PIECE_BYTES, Pace, PacedBody
from finetune_trainer.object_store.s3_upload import MOST_PARTS, plan_parts
from tests.storage.seaweedfs import S3Server

GIB = 2**30
BODY = random.Random(1).randbytes(5 * CHUNK_BYTES + 5)


def digests(body: bytes | memoryview) -> list[str]:
    starts = range(0, len(body), CHUNK_BYTES)
    return [hashlib.sha256(body[start : start + CHUNK_BYTES]).hexdigest() for start in starts]


@pytest.fixture
def impatient(store: ObjectStore, seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The same store, which gives up at once."""
    if isinstance(store, MemoryObjectStore):
        return store
    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)
    return S3ObjectStore(seaweedfs.endpoint, retry_seconds=0)


@pytest.fixture
def leave_unfinished(store: ObjectStore, seaweedfs: S3Server) -> Callable[[str], None]:
    """Leave behind what a process leaves that dies in an upload."""

    def begin(uri: str) -> None:
        if isinstance(store, MemoryObjectStore):
            store.unfinished.add(uri)
        else:
            bucket, _, key = uri.removeprefix("s3://").partition("/")
            seaweedfs.client().create_multipart_upload(Bucket=bucket, Key=key)

    return begin


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(0, id="nothing"),
        pytest.param(10, id="a few bytes"),
        pytest.param(CHUNK_BYTES, id="exactly one chunk"),
        pytest.param(CHUNK_BYTES + 1, id="one byte more than a chunk"),
        pytest.param(2 * CHUNK_BYTES, id="exactly two chunks"),
        pytest.param(4 * CHUNK_BYTES, id="the most that goes in one request"),
        pytest.param(5 * CHUNK_BYTES + 5, id="parts and a rest"),
    ],
)
def test_memory_becomes_an_object(store, prefix, size):
    body = memoryview(BODY)[:size]
    store.upload(body, f"{prefix}/a", digests=digests(body))
    assert store.get(f"{prefix}/a") == body
    assert store.head(f"{prefix}/a").size == size
    assert store.abort_uploads(prefix) == 0


def test_an_upload_replaces_what_was_there(store, prefix):
    store.put(f"{prefix}/a", b"before")
    store.upload(BODY, f"{prefix}/a", digests=digests(BODY))
    assert store.get(f"{prefix}/a") == BODY


def test_numbers_are_uploaded_as_their_bytes(store, prefix):
    numbers = memoryview(bytearray(BODY[: CHUNK_BYTES + 8])).cast("f")
    store.upload(numbers, f"{prefix}/a", digests=digests(numbers.cast("B")))
    assert store.get(f"{prefix}/a") == numbers.cast("B")


@pytest.mark.parametrize(
    ("size", "broken"),
    [
        pytest.param(10, 0, id="one chunk in one request"),
        pytest.param(2 * CHUNK_BYTES + 5, CHUNK_BYTES, id="several chunks in one request"),
        pytest.param(len(BODY), 0, id="a part of one chunk"),
        pytest.param(len(BODY), len(BODY) - 1, id="a part of several chunks"),
    ],
)
def test_what_is_not_what_its_digests_say_is_refused(impatient, prefix, size, broken):
    body = bytearray(BODY[:size])
    said = digests(body)
    body[broken] ^= 1
    with pytest.raises(StorageUnavailable, match=f"{prefix}/a"):
        impatient.upload(bytes(body), f"{prefix}/a", digests=said)
    assert impatient.head(f"{prefix}/a") is None
    assert impatient.abort_uploads(prefix) == 0, "it was aborted already"


@pytest.mark.parametrize(
    ("size", "asked"),
    [
        pytest.param(10, 0, id="one request, before it began"),
        pytest.param(len(BODY), 0, id="parts, before they began"),
        pytest.param(len(BODY), 2, id="parts, under way"),
    ],
)
def test_an_upload_that_is_stopped_leaves_nothing(store, prefix, size, asked):
    questions = itertools.count()
    with pytest.raises(UploadStopped):
        store.upload(BODY[:size], f"{prefix}/a", digests=digests(BODY[:size]), stopped=lambda: next(questions) >= asked)
    assert store.head(f"{prefix}/a") is None
    assert store.abort_uploads(prefix) == 0


def test_unfinished_uploads_below_a_prefix_are_aborted(store, prefix, leave_unfinished):
    for name in ("g1/a", "g1/b", "g1/b", "g10/a", "g2/a"):
        leave_unfinished(f"{prefix}/{name}")
    assert store.abort_uploads(f"{prefix}/g1/") in {2, 3}, "an object may have several, which memory does not model"
    assert store.abort_uploads(f"{prefix}/g1/") == 0
    assert store.abort_uploads(f"{prefix}/") == 2
    assert store.abort_uploads(f"{prefix}/") == 0


def test_aborting_leaves_objects_alone(store, prefix, leave_unfinished):
    store.put(f"{prefix}/a", b"stays")
    leave_unfinished(f"{prefix}/a")
    assert store.abort_uploads(prefix) == 1
    assert store.get(f"{prefix}/a") == b"stays"


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, 1), (0, len(BODY)), (CHUNK_BYTES - 1, 2), (len(BODY) - 3, 3), (5, 2 * CHUNK_BYTES)],
    ids=["a byte", "the whole", "across a border", "the end", "a long stretch"],
)
def test_a_range_is_read_into_memory(store, prefix, start, length):
    store.upload(BODY, f"{prefix}/a", digests=digests(BODY))
    out = bytearray(length)
    store.read_into(f"{prefix}/a", start, memoryview(out))
    assert out == BODY[start : start + length]


def test_ranges_are_read_side_by_side(store, prefix):
    store.upload(BODY, f"{prefix}/a", digests=digests(BODY))
    out = bytearray(len(BODY))
    step = len(BODY) // 12 + 1
    with ThreadPoolExecutor(6) as pool:
        for start in range(0, len(BODY), step):
            pool.submit(store.read_into, f"{prefix}/a", start, memoryview(out)[start : start + step])
    assert out == BODY


@pytest.mark.parametrize("start", [5, 10, 99], ids=["ends in it", "ends where it begins", "ends before it"])
def test_an_object_that_ends_before_a_range_is_too_short(store, prefix, start):
    store.put(f"{prefix}/a", b"0123456789")
    with pytest.raises(ObjectTooShort, match=f"{prefix}/a in .* ends before byte {start + 8}"):
        store.read_into(f"{prefix}/a", start, memoryview(bytearray(8)))


def test_a_range_of_nothing_is_missing(store, prefix):
    with pytest.raises(ObjectMissing):
        store.read_into(f"{prefix}/nothing", 0, memoryview(bytearray(8)))


@pytest.mark.parametrize(
    ("size", "parts", "part_bytes"),
    [
        pytest.param(0, 0, CHUNK_BYTES, id="nothing has no part"),
        pytest.param(1, 1, CHUNK_BYTES, id="a byte is a part"),
        pytest.param(CHUNK_BYTES + 1, 1, CHUNK_BYTES, id="so are two chunks"),
        pytest.param(4 * CHUNK_BYTES, 1, CHUNK_BYTES, id="and four"),
        pytest.param(4 * CHUNK_BYTES + 1, 2, CHUNK_BYTES, id="the last of five takes four"),
        pytest.param(MOST_PARTS * CHUNK_BYTES, MOST_PARTS - 3, CHUNK_BYTES, id="until there are as many as may be"),
        pytest.param(MOST_PARTS * CHUNK_BYTES + 1, MOST_PARTS // 2 - 2, 2 * CHUNK_BYTES, id="then it is two chunks"),
        pytest.param(5 * 2**40, 9927, 66 * CHUNK_BYTES, id="the largest object of S3 fits"),
    ],
)
def test_parts_are_as_few_chunks_as_their_number_allows_and_the_last_pays_for_the_rest(size, parts, part_bytes):
    plan = plan_parts(size)
    assert len(plan) == parts
    assert [part.number for part in plan] == list(range(1, parts + 1))
    assert all(part.end - part.start == part_bytes for part in plan[:-1])
    assert [part.start for part in plan] == list(range(0, size, part_bytes))[:parts]
    assert not plan or plan[-1].end == size
    assert parts <= 1 or parts + 2 < -(-size // CHUNK_BYTES), "beginning and completing included"


def test_all_threads_together_keep_a_rate():
    pace = Pace(100)
    assert [pace.reserve(50, now=10.0) for _ in range(3)] == [0, 0.5, 1.0]
    assert pace.reserve(50, now=20.0) == 0, "what was not used is not saved up"
    assert pace.reserve(50, now=20.25) == 0.25


def test_what_has_a_rate_goes_in_small_pieces_and_anything_else_in_one():
    view = memoryview(BODY)
    body = PacedBody(view, "s3://b/a", Pace(None), lambda: False)
    assert len(body.read(CHUNK_BYTES)) == CHUNK_BYTES
    assert body.tell() == CHUNK_BYTES
    body.seek(0)
    assert body.read() == view
    slow = PacedBody(view, "s3://b/a", Pace(2**40), lambda: False)
    assert len(slow.read(CHUNK_BYTES)) == PACED_PIECE_BYTES
