"""What S3ObjectStore makes of a store that is away, overloaded, forbidden or lying about what it did. Against a real server."""

import socket
import uuid
from collections.abc import Iterator

import pytest

from finetune_trainer.errors import BadConfig, NoPermission, StorageUnavailable
from finetune_trainer.object_store import Ambiguous, ObjectStore, PreconditionFailed, S3ObjectStore
from tests.storage.faulty_proxy import Fault, Proxy, faulty_proxy
from tests.storage.seaweedfs import S3Server


@pytest.fixture(autouse=True)
def credentials(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def bucket(seaweedfs: S3Server) -> str:
    return seaweedfs.create_bucket("faults")


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


@pytest.mark.parametrize("fault", [Fault.ANSWER_LOST, Fault.REQUEST_LOST, Fault.SLOW_DOWN, Fault.CONFLICT])
def test_what_can_be_repeated_is_repeated(store, proxy, uri, fault):
    proxy.faults += [("PUT", fault), ("GET", fault), ("HEAD", fault), ("POST", fault)]
    store.put(uri, b"body")
    assert store.get(uri) == b"body"
    assert store.head(uri).size == 4
    store.delete([uri])
    assert proxy.faults == []
    assert store.head(uri) is None


def test_a_download_that_breaks_off_is_repeated(store, proxy, uri, tmp_path):
    body = bytes(1000)
    store.put(uri, body)
    proxy.faults += [("GET", Fault.TRUNCATED)] * 3
    assert store.get(uri) == body
    assert proxy.faults == []
    proxy.faults += [("GET", Fault.TRUNCATED)] * 3
    store.download_file(uri, tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == body


@pytest.mark.parametrize("fault", [Fault.ANSWER_LOST, Fault.REQUEST_LOST, Fault.SLOW_DOWN, Fault.CONFLICT])
@pytest.mark.parametrize("condition", ["absent", "match"])
def test_a_conditional_write_without_an_answer_is_sent_once_and_ambiguous(store, direct, proxy, uri, fault, condition):
    etag = direct.put(uri, b"before") if condition == "match" else ""
    proxy.faults.append(("PUT", fault))
    with pytest.raises(Ambiguous):
        store.put_if_absent(uri, b"after") if condition == "absent" else store.put_if_match(uri, b"after", etag)
    assert proxy.methods == ["PUT"]
    happened = direct.head(uri) is not None and direct.get(uri) == b"after"
    assert happened == (fault is Fault.ANSWER_LOST)


def test_a_refusal_may_be_the_echo_of_our_own_success(store, direct, proxy, uri):
    proxy.faults.append(("PUT", Fault.REPEATED))
    with pytest.raises(PreconditionFailed):
        store.put_if_absent(uri, b"ours")
    assert direct.get(uri) == b"ours"


def test_a_store_that_stays_away_is_unavailable_and_named(uri):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    store = S3ObjectStore(endpoint.replace("://", "://user:hidden@"), retry_seconds=0.1)
    with pytest.raises(StorageUnavailable) as caught:
        store.get(uri)
    assert endpoint in str(caught.value)
    assert uri in str(caught.value)
    assert "hidden" not in str(caught.value)
    with pytest.raises(Ambiguous):
        store.put_if_absent(uri, b"")


@pytest.mark.parametrize(
    "variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"], ids=["an unknown key", "a wrong signature"]
)
def test_what_is_forbidden_is_no_permission_and_never_missing(seaweedfs, monkeypatch, uri, tmp_path, variable):
    monkeypatch.setenv(variable, "canary-of-a-secret")
    store = S3ObjectStore(seaweedfs.endpoint)
    (tmp_path / "file").write_bytes(b"x")
    requests = [
        lambda: store.get(uri),
        lambda: store.read(uri),
        lambda: store.head(uri),
        lambda: list(store.list(uri)),
        lambda: store.put(uri, b"x"),
        lambda: store.put_if_absent(uri, b"x"),
        lambda: store.put_if_match(uri, b"x", '"etag"'),
        lambda: store.download_file(uri, tmp_path / "down"),
        lambda: store.upload_file(tmp_path / "file", uri),
        lambda: store.delete([uri]),
    ]
    for request in requests:
        with pytest.raises(NoPermission, match=uri) as caught:
            request()
        assert "canary" not in str(caught.value)


def test_no_credentials_at_all_is_no_permission(seaweedfs, monkeypatch, uri, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(NoPermission, match="NoCredentialsError"):
        S3ObjectStore(seaweedfs.endpoint).get(uri)


def test_a_bucket_that_is_not_there_is_named(direct, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    uri = "s3://no-such-bucket/key"
    requests = [
        lambda: direct.get(uri),
        lambda: direct.head(uri),
        lambda: list(direct.list(uri)),
        lambda: direct.put(uri, b"x"),
        lambda: direct.put_if_absent(uri, b"x"),
        lambda: direct.download_file(uri, tmp_path / "down"),
        lambda: direct.upload_file(tmp_path / "file", uri),
    ]
    for request in requests:
        with pytest.raises(BadConfig, match="'no-such-bucket'"):
            request()


@pytest.mark.parametrize("endpoint", ["not a url", "://", "ftp//x"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint):
    with pytest.raises(BadConfig, match="is not a URL"):
        S3ObjectStore(endpoint)
