"""Credentials that come, expire, are replaced and are taken away: web identity and files, against a real S3 server with its STS."""

import hashlib
import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from finetune_trainer.errors import NoPermission
from finetune_trainer.object_store import CHUNK_BYTES, S3ObjectStore
from tests.storage.faulty_proxy import Fault, Proxy, faulty_proxy
from tests.storage.identity_provider import ROLE, Issuer, running_issuer
from tests.storage.seaweedfs import S3Server, running_seaweedfs

SESSION_SECONDS = 5  # or four: whole seconds are counted
PARTS = 6
BODY = random.Random(3).randbytes((PARTS + 3) * CHUNK_BYTES)
DIGESTS = [hashlib.sha256(BODY[start : start + CHUNK_BYTES]).hexdigest() for start in range(0, len(BODY), CHUNK_BYTES)]


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with running_issuer() as issuer:
        yield issuer


@pytest.fixture(scope="module")
def server(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_seaweedfs(tmp_path_factory.mktemp("sts"), issuer.roles(SESSION_SECONDS)) as server:
        server.create_bucket("credentials")
        yield server


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    with faulty_proxy(server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def uri() -> str:
    return f"s3://credentials/{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def no_other_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def token_file(issuer: Issuer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What a pod with a service account has: a token that the kubelet rotates, a role, and where the STS is."""
    file = tmp_path / "token"
    file.write_text(issuer.token())
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(file))
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", proxy.endpoint)
    return file


def session(server: S3Server, issuer: Issuer) -> dict[str, Any]:
    """Return credentials that are good for ``SESSION_SECONDS``."""
    sts = boto3.client(
        "sts",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        config=Config(signature_version=botocore.UNSIGNED),
    )
    answer = sts.assume_role_with_web_identity(RoleArn=ROLE, RoleSessionName="test", WebIdentityToken=issuer.token())
    return answer["Credentials"]


def write_credentials(file: Path, key: str, secret: str, token: str = "") -> None:
    lines = ["[default]", f"aws_access_key_id = {key}", f"aws_secret_access_key = {secret}"]
    new = file.with_suffix(".new")
    new.write_text("\n".join([*lines, *([f"aws_session_token = {token}"] if token else [])]) + "\n")
    new.replace(file)


def wait_until_expired(server: S3Server, credentials: dict[str, Any]) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=credentials["AccessKeyId"],
        aws_secret_access_key=credentials["SecretAccessKey"],
        aws_session_token=credentials["SessionToken"],
        region_name="us-east-1",
    )
    while True:
        try:
            client.list_objects_v2(Bucket="credentials", MaxKeys=1)
        except ClientError:
            return


def test_a_token_that_is_not_there_is_named(server, token_file, uri):
    token_file.unlink()
    with pytest.raises(NoPermission, match=rf"\(No such file or directory: {token_file}\): check that the credentials"):
        S3ObjectStore(server.endpoint).get(uri)


def test_a_web_identity_is_all_that_a_pod_needs(server, proxy, token_file, uri):
    store = S3ObjectStore(server.endpoint)
    store.put_if_absent(uri, b"body")
    assert store.get(uri) == b"body"
    assert store.head(uri).size == 4
    assert proxy.count("POST /") > 0, "the STS is where AWS_ENDPOINT_URL_STS says"


def test_an_upload_outlives_its_session_and_the_token_it_began_with(server, issuer, proxy, token_file, uri):
    token_file.write_text(issuer.token(seconds=SESSION_SECONDS))
    store = S3ObjectStore(server.endpoint)
    store.head(uri)
    token_file.write_text(issuer.token())
    asked = proxy.count("POST /")
    # At that rate it takes longer than a session, and than the first token is good for.
    store.upload(BODY, uri, digests=DIGESTS, bytes_per_second=len(BODY) // (SESSION_SECONDS + 3))
    assert store.get(uri) == BODY
    assert proxy.count("POST /") > asked, "the STS was asked again"


def test_a_session_that_expires_under_an_upload_is_looked_up_anew(server, issuer, proxy, tmp_path, uri):
    first = session(server, issuer)
    file = tmp_path / "credentials"
    write_credentials(file, first["AccessKeyId"], first["SecretAccessKey"], first["SessionToken"])

    replacing = threading.Lock()

    def expire(request):
        if request.method == "PUT":
            with replacing:  # nobody is refused before there are others
                if request.matches("PUT partNumber=5") and proxy.count("PUT partNumber=5") == 1:
                    wait_until_expired(server, first)
                    write_credentials(file, server.access_key, server.secret_key)

    proxy.before = expire
    store = S3ObjectStore(proxy.endpoint)
    store.upload(BODY, uri, digests=DIGESTS)
    assert store.get(uri) == BODY
    assert proxy.count("POST ?uploads") == 1, "the upload goes on"
    assert proxy.count("PUT partNumber=5") == 2
    assert store.abort_uploads(uri) == 0


def test_credentials_taken_away_are_no_permission_until_they_are_given_back(server, tmp_path, uri):
    file = tmp_path / "credentials"
    write_credentials(file, "unknown", "canary-of-a-secret")
    store = S3ObjectStore(server.endpoint)
    with pytest.raises(NoPermission, match=rf"{uri} \(InvalidAccessKeyId, HTTP 403\)") as caught:
        store.put(uri, b"body")
    assert "canary" not in str(caught.value)
    write_credentials(file, server.access_key, server.secret_key)
    store.put(uri, b"body")
    assert store.get(uri) == b"body"


@pytest.mark.parametrize(
    ("token", "code"),
    [
        pytest.param({"subject": "system:serviceaccount:team-b:other"}, "AccessDenied", id="another service account"),
        pytest.param({"seconds": -60}, "ExpiredTokenException", id="a token that nobody rotated"),
    ],
)
def test_an_identity_that_is_not_trusted_is_no_permission(server, issuer, token_file, uri, token, code):
    token_file.write_text(issuer.token(**token))
    with pytest.raises(NoPermission, match=code):
        S3ObjectStore(server.endpoint).get(uri)


@pytest.mark.parametrize("fault", [Fault.REQUEST_LOST, Fault.ANSWER_LOST, Fault.INTERNAL_ERROR, Fault.SLOW_DOWN])
def test_an_sts_that_is_away_for_a_moment_is_waited_for(server, proxy, token_file, uri, fault):
    proxy.faults += [("POST /", fault)] * 3
    store = S3ObjectStore(server.endpoint)
    store.put(uri, b"body")
    assert proxy.faults == []
