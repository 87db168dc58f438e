"""What an upload in parts, and a read into memory, make of a store that fails, lies and loses answers. Against a real server."""

import hashlib
import itertools
import random
import threading
import uuid
from collections.abc import Iterator

import pytest

from finetune_trainer.errors import NoPermission, StorageUnavailable
from finetune_trainer.object_store import CHUNK_BYTES, ObjectStore, S3ObjectStore, UploadStopped
from finetune_trainer.object_store.s3_upload import PARTS_IN_FLIGHT
from tests.storage.faulty_proxy import Fault, Proxy, faulty_proxy
from tests.storage.seaweedfs import S3Server

PARTS = 7
BODY = random.Random(2).randbytes((PARTS + 2) * CHUNK_BYTES + 5)
CREATE, COMPLETE = "POST ?uploads", "POST ?uploadId="
ANYWHERE = [
    Fault.ANSWER_LOST,
    Fault.REQUEST_LOST,
    Fault.RESET,
    Fault.SLOW_DOWN,
    Fault.UNAVAILABLE,
    Fault.INTERNAL_ERROR,
    Fault.CONFLICT,
    Fault.EXPIRED,
]


def digests(body: bytes) -> list[str]:
    return [hashlib.sha256(body[start : start + CHUNK_BYTES]).hexdigest() for start in range(0, len(body), CHUNK_BYTES)]


DIGESTS = digests(BODY)


@pytest.fixture(autouse=True)
def credentials(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def bucket(seaweedfs: S3Server) -> str:
    return seaweedfs.create_bucket("upload-faults")


@pytest.fixture
def uri(bucket: str) -> str:
    return f"{bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(seaweedfs: S3Server) -> Iterator[Proxy]:
    with faulty_proxy(seaweedfs.endpoint) as proxy:
        yield proxy


@pytest.fixture
def store(proxy: Proxy) -> ObjectStore:
    return S3ObjectStore(proxy.endpoint)


@pytest.fixture
def direct(seaweedfs: S3Server) -> ObjectStore:
    return S3ObjectStore(seaweedfs.endpoint)


def assert_written_and_nothing_left(direct: ObjectStore, uri: str) -> None:
    assert direct.get(uri) == BODY
    assert direct.abort_uploads(uri) == 0


@pytest.mark.parametrize(("chunks", "requests"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 4), (6, 5), (10, 9)])
def test_an_object_takes_one_request_or_fewer_than_it_has_chunks(store, direct, proxy, uri, chunks, requests):
    body = BODY[: (chunks - 1) * CHUNK_BYTES + 5]
    store.upload(body, uri, digests=digests(body))
    assert len(proxy.requests) == requests
    assert direct.get(uri) == body


@pytest.mark.parametrize("fault", [*ANYWHERE, Fault.CORRUPTED])
def test_a_part_that_fails_goes_again_alone(store, direct, proxy, uri, fault):
    proxy.faults.append(("PUT partNumber=3", fault))
    store.upload(BODY, uri, digests=DIGESTS)
    assert proxy.count("PUT partNumber=3") == 2
    assert proxy.count("PUT") == PARTS + 1
    assert proxy.count(CREATE) == proxy.count(COMPLETE) == 1
    assert_written_and_nothing_left(direct, uri)


@pytest.mark.parametrize("fault", [*ANYWHERE, Fault.CORRUPTED])
def test_an_object_of_one_part_goes_again(store, direct, proxy, uri, fault):
    proxy.faults.append(("PUT", fault))
    store.upload(BODY[:10], uri, digests=digests(BODY[:10]))
    assert proxy.methods == ["PUT", "PUT"]
    assert direct.get(uri) == BODY[:10]


@pytest.mark.parametrize("request_", [CREATE, COMPLETE], ids=["create", "complete"])
@pytest.mark.parametrize("fault", [*ANYWHERE, Fault.ERROR_IN_OK])
def test_no_part_goes_again_when_the_beginning_or_the_end_fails(store, direct, proxy, uri, fault, request_):
    proxy.faults.append((request_, fault))
    store.upload(BODY, uri, digests=DIGESTS)
    assert proxy.count("PUT") == PARTS
    assert direct.get(uri) == BODY


def test_the_end_may_get_no_answer_ever_and_is_found_out(store, direct, proxy, uri):
    proxy.before = lambda request: Fault.ANSWER_LOST if request.matches(COMPLETE) else None
    store.upload(BODY, uri, digests=DIGESTS)
    assert_written_and_nothing_left(direct, uri)


def test_an_older_object_of_the_same_size_is_not_taken_for_ours(store, direct, proxy, uri):
    older = bytes(len(BODY))
    direct.upload(older, uri, digests=digests(older))
    proxy.faults += [(COMPLETE, Fault.REQUEST_LOST)] * 5
    store.upload(BODY, uri, digests=DIGESTS)
    assert_written_and_nothing_left(direct, uri)


def test_a_store_that_slows_down_for_a_while_is_waited_for(store, direct, proxy, uri):
    first = itertools.count()
    proxy.before = lambda request: Fault.SLOW_DOWN if request.method == "PUT" and next(first) < 2 * PARTS else None
    store.upload(BODY, uri, digests=DIGESTS)
    assert_written_and_nothing_left(direct, uri)


def test_a_store_that_stays_away_is_unavailable_and_the_upload_aborted(direct, proxy, uri):
    proxy.before = lambda request: Fault.UNAVAILABLE if request.method == "PUT" else None
    with pytest.raises(StorageUnavailable, match=f"did not answer for {uri}"):
        S3ObjectStore(proxy.endpoint, retry_seconds=0.1).upload(BODY, uri, digests=DIGESTS)
    assert proxy.methods[-1] == "DELETE"
    assert direct.head(uri) is None
    assert direct.abort_uploads(uri) == 0


def test_an_upload_that_somebody_aborts_says_so(store, direct, proxy, uri):
    def abort(request):
        if request.matches("PUT partNumber=4"):
            direct.abort_uploads(uri)

    proxy.before = abort
    with pytest.raises(StorageUnavailable, match=f"somebody aborted the upload of {uri}"):
        store.upload(BODY, uri, digests=DIGESTS)
    assert direct.head(uri) is None


def test_an_upload_can_be_stopped_while_the_store_is_away(store, direct, proxy, uri):
    is_over = threading.Event()

    def fail(request):
        if request.method != "PUT":
            return None
        if request.number > PARTS:
            is_over.set()
        return Fault.SLOW_DOWN

    proxy.before = fail
    with pytest.raises(UploadStopped):
        store.upload(BODY, uri, digests=DIGESTS, stopped=is_over.is_set)
    assert "DELETE" in proxy.methods  # a part that had been sent whole may arrive later
    assert direct.abort_uploads(uri) == 0


def test_so_many_parts_are_under_way_and_no_more(store, proxy, uri):
    lock, together, under_way, most = threading.Lock(), threading.Event(), 0, 0

    def enter(request):
        nonlocal under_way, most
        if request.method == "PUT":
            with lock:
                under_way += 1
                most = max(most, under_way)
            if most == PARTS_IN_FLIGHT:
                together.set()
            together.wait(30)

    def leave(request):
        nonlocal under_way
        if request.method == "PUT":
            with lock:
                under_way -= 1

    proxy.before, proxy.after = enter, leave
    store.upload(BODY, uri, digests=DIGESTS)
    assert most == PARTS_IN_FLIGHT


def test_credentials_that_stay_expired_are_no_permission(store, direct, proxy, uri):
    proxy.before = lambda request: Fault.EXPIRED if request.method == "PUT" else None
    with pytest.raises(NoPermission, match="ExpiredToken"):
        store.upload(BODY, uri, digests=DIGESTS)
    assert direct.abort_uploads(uri) == 0


@pytest.mark.parametrize("fault", [*ANYWHERE, Fault.TRUNCATED])
def test_a_read_into_memory_is_repeated(store, direct, proxy, uri, fault):
    direct.put(uri, BODY[:1000])
    proxy.faults += [("GET", fault)]
    out = bytearray(500)
    store.read_into(uri, 100, memoryview(out))
    assert out == BODY[100:600]
    assert proxy.faults == []


@pytest.mark.parametrize("attempt", ["head", "put_if_absent", "put"])
def test_expired_credentials_are_looked_up_anew_and_the_request_sent_once_more(store, direct, proxy, uri, attempt):
    proxy.outage = Fault.EXPIRED
    proxy.before = lambda request: setattr(proxy, "outage", None) if request.number > 1 else None
    if attempt == "head":
        assert store.head(uri) is None
    else:
        getattr(store, attempt)(uri, b"body")
        assert direct.get(uri) == b"body"
        assert proxy.methods == ["PUT", "PUT"]
