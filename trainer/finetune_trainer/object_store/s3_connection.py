"""Requests to one S3 endpoint: who sends them, how long they are repeated, and what a failure is called.

Three clients share one set of credentials. The *patient* one serves what may be repeated: the SDK's adaptive retries
slow down together with a throttling store, and around them a loop of ours goes on for minutes, since the SDK alone
gives up on 503 after seconds and never repeats a broken download (boto3 1.44.5). The one that *sends once* serves
conditional writes. The *bulk* one sends bodies whose SHA-256 the caller knows: that goes into a signed header, so the
body itself is not hashed again for the signature, which over plain HTTP boto3 would do.

Temporary credentials (AWS_WEB_IDENTITY_TOKEN_FILE, AWS_ROLE_ARN; the STS at AWS_ENDPOINT_URL_STS) are renewed by boto3
before they expire, with the token that the file holds by then. Those that the store calls expired or unknown all the same are looked
up anew, from whatever file boto3 took them from, by replacing all three clients, once for however many threads met
it. Only what the environment holds stays as it is while the process lives.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.loaders import create_loader

from finetune_trainer.errors import BadConfig, NoPermission, StorageUnavailable
from finetune_trainer.object_store.protocol import NoBucket, ObjectMissing, UploadStopped, never, split_uri
from finetune_trainer.object_store.s3_errors import S3_ERRORS, Kind, classify, describe

T = TypeVar("T")

RETRY_SECONDS = 300.0
"""How long a request that may be repeated is repeated before the store counts as unavailable."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0
GLANCE_SECONDS = 0.2
"""How often a pause looks up whether it is still wanted."""
SDK_ATTEMPTS = 4
CONNECT_SECONDS = 5
READ_SECONDS = 60

_DESCRIPTIONS = create_loader()
_REPEATED = {Kind.TRANSIENT, Kind.UNRESOLVED}


@dataclass(frozen=True, slots=True)
class Clients:
    """Clients of one set of credentials."""

    patient: Any
    sends_once: Any
    bulk: Any


class OutOfRange(Exception):
    """A range starts behind the object's end."""


class Connection:
    """An endpoint (None: AWS itself), reached with the credentials that boto3 finds by itself."""

    def __init__(self, endpoint: str | None, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self.name = _without_credentials(endpoint) if endpoint else "AWS S3"
        self._endpoint = endpoint
        self._retry_seconds = retry_seconds
        self._renewing = threading.Lock()
        self._clients = self._connect()

    def repeated(self, uri: str, request: Callable[[Clients], T], stopped: Callable[[], bool] = never) -> T:
        """Return what a request returns, repeated with full jitter for ``retry_seconds`` while the store cannot.

        Raises:
            UploadStopped: ``stopped`` is true after a failure.
        """
        deadline = time.monotonic() + self._retry_seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return self.renewed(request)
            except S3_ERRORS as error:
                if stopped():
                    raise UploadStopped(uri) from error
                kind = classify(error)
                if kind not in _REPEATED:
                    raise self.terminal(kind, uri, error) from error
                if time.monotonic() >= deadline:
                    raise self._unavailable(uri, error) from error
            wait(random.uniform(0, pause), stopped)  # noqa: S311  jitter
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def renewed(self, request: Callable[[Clients], T]) -> T:
        """Return what a request returns; one that met expired credentials, and so did nothing, is sent once more."""
        clients = self._clients
        try:
            return request(clients)
        except S3_ERRORS as error:
            if classify(error) is not Kind.EXPIRED:
                raise
        with self._renewing:
            if self._clients is clients:
                self._clients = self._connect()
        return request(self._clients)

    def require_bucket(self, uri: str) -> None:
        """Raise NoBucket when it is the bucket that is missing: the answer to a HEAD does not tell which."""
        bucket, _ = split_uri(uri)
        try:
            self._clients.patient.head_bucket(Bucket=bucket)
        except S3_ERRORS as error:
            if classify(error) is Kind.MISSING:
                raise self.terminal(Kind.NO_BUCKET, uri, error) from error

    def terminal(self, kind: Kind, uri: str, error: BaseException) -> Exception:  # noqa: PLR0911  one for each kind
        """Return what to raise for a failure that asking again will not change."""
        bucket, _ = split_uri(uri)
        match kind:
            case Kind.OUT_OF_RANGE:
                return OutOfRange(uri)
            case Kind.MISSING:
                return ObjectMissing(f"{uri} does not exist in {self.name}")
            case Kind.NO_BUCKET:
                return NoBucket(
                    f"bucket {bucket!r} of {uri} does not exist in {self.name}: create it or correct the URI", bucket
                )
            case Kind.FORBIDDEN | Kind.EXPIRED:
                return NoPermission(
                    f"{self.name} refused access to {uri} ({describe(error)}): check that the credentials are valid "
                    "and allow GetObject, PutObject, DeleteObject and ListBucket there (without it a missing object "
                    "looks forbidden); new ones in a mounted file are found, new ones in the environment need new pods"
                )
            case Kind.TRANSIENT | Kind.UNRESOLVED:
                return self._unavailable(uri, error)
            case Kind.NO_UPLOAD:
                return StorageUnavailable(
                    f"somebody aborted the upload of {uri} in {self.name}: a newer generation of the job, or a rule of "
                    "the bucket that ends unfinished uploads; the next save starts anew"
                )
        return BadConfig(f"{self.name} refused {uri} ({describe(error)}): check endpoint, region and URI")

    def refuse_store(self, uri: str, error: BaseException) -> NoReturn:
        """Raise BadConfig about a store that has no conditional writes."""
        raise BadConfig(
            f"{self.name} does not implement conditional writes ({describe(error)} for {uri}), without which no "
            "checkpoint can be committed safely: use a store that has If-None-Match and If-Match"
        ) from error

    def _unavailable(self, uri: str, error: BaseException) -> StorageUnavailable:
        return StorageUnavailable(
            f"{self.name} did not answer for {uri} within {self._retry_seconds:.0f} s of retries ({describe(error)}): "
            f"check that the store is up and reachable from the training pods"
        )

    def _connect(self) -> Clients:
        session = _session()
        once: dict[str, Any] = {"total_max_attempts": 1, "mode": "standard"}
        return Clients(
            patient=self._client(session, {"total_max_attempts": SDK_ATTEMPTS, "mode": "adaptive"}),
            sends_once=self._client(session, once),
            bulk=self._client(session, once, payload_signing_enabled=False),
        )

    def _client(self, session: Any, retries: dict[str, Any], **s3: Any) -> Any:
        config = Config(
            retries=retries,
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            max_pool_connections=16,
            tcp_keepalive=True,
            s3={"addressing_style": "path" if self._endpoint else "auto", **s3},
            # The default adds CRC trailers that many S3-compatible stores refuse; our own SHA-256 covers what matters.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        region = session.region_name or "us-east-1"  # signatures need one, stores other than AWS mostly ignore it
        try:
            return session.client("s3", endpoint_url=self._endpoint, region_name=region, config=config)
        except ValueError:
            raise BadConfig(f"storage.endpoint {self.name!r} is not a URL: write http(s)://host:port") from None


def preload() -> None:
    """Read boto3's description of S3, once for this process and those forked from it, without looking for credentials."""
    nobody = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
    _session().client("s3", region_name="us-east-1", **nobody)


def _session() -> Any:
    session = botocore.session.get_session()
    session.register_component("data_loader", _DESCRIPTIONS)  # each session would read a megabyte of JSON anew
    return boto3.session.Session(botocore_session=session)


def wait(seconds: float, stopped: Callable[[], bool]) -> None:
    """Let time pass, or less of it once ``stopped`` is true."""
    until = time.monotonic() + seconds
    while not stopped() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, GLANCE_SECONDS))


def _without_credentials(endpoint: str) -> str:
    """Return the endpoint as it may be shown: a URL can carry user and password."""
    parts = urlsplit(endpoint)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
