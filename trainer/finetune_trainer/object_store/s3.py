"""The object store behind boto3: S3 and what speaks its protocol.

Two clients share one set of credentials. The patient one serves everything that may be repeated: the SDK's adaptive
retries slow down together with a throttling store, and around them a loop of ours goes on for ``RETRY_SECONDS``,
since the SDK alone gives up on 503 after seconds and never repeats a broken download (boto3 1.44.5). The other one
serves conditional writes and sends each exactly once.

Messages carry the URI, the error's code and what to do, never the store's own text: it may quote keys and signatures.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError

from finetune_trainer.errors import BadConfig, NoPermission, StorageUnavailable
from finetune_trainer.object_store.protocol import (
    Ambiguous,
    ObjectInfo,
    ObjectMissing,
    PreconditionFailed,
    Stored,
    split_uri,
)
from finetune_trainer.object_store.s3_errors import S3_ERRORS, Kind, classify, describe

T = TypeVar("T")

RETRY_SECONDS = 300.0
"""How long a request that may be repeated is repeated before the store counts as unavailable."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0
SDK_ATTEMPTS = 4
CONNECT_SECONDS = 5
READ_SECONDS = 60
DELETE_BATCH = 1000  # of DeleteObjects
TRANSFER = TransferConfig(multipart_threshold=16 * 2**20, multipart_chunksize=16 * 2**20, max_concurrency=4)


class S3ObjectStore:
    """Objects at one endpoint (None: AWS itself), with the credentials that boto3 finds by itself."""

    def __init__(self, endpoint: str | None, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self.name = _without_credentials(endpoint) if endpoint else "AWS S3"
        self._retry_seconds = retry_seconds
        session = boto3.session.Session()
        patient = {"total_max_attempts": SDK_ATTEMPTS, "mode": "adaptive"}
        self._client = self._connect(session, endpoint, patient)
        self._client_that_sends_once = self._connect(session, endpoint, {"total_max_attempts": 1, "mode": "standard"})

    def get(self, uri: str, start: int | None = None, length: int | None = None) -> bytes:
        """Return ``body[start:start + length]``."""
        assert length != 0, "a request for no bytes"
        try:
            return self._repeated(uri, lambda: self._get(uri, start or 0, length).body)
        except _OutOfRange:
            return b""

    def read(self, uri: str) -> Stored:
        """Return the whole object with its ETag."""
        return self._repeated(uri, lambda: self._get(uri, 0, None))

    def head(self, uri: str) -> ObjectInfo | None:
        """Return size and ETag, or None when there is no such object."""
        bucket, key = split_uri(uri)
        try:
            answer = self._repeated(uri, lambda: self._client.head_object(Bucket=bucket, Key=key))
        except ObjectMissing:
            self._require_bucket(uri)
            return None
        return ObjectInfo(uri, answer["ContentLength"], answer["ETag"])

    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """Yield every object whose URI starts with ``prefix_uri``, in the order of their keys."""
        bucket, prefix = split_uri(prefix_uri)
        request = {"Bucket": bucket, "Prefix": prefix}
        while True:
            page = self._repeated(prefix_uri, lambda: self._client.list_objects_v2(**request))
            for item in page.get("Contents", ()):
                yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"])
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def put(self, uri: str, body: bytes) -> str:
        """Write an object, over any that is there, and return its ETag."""
        bucket, key = split_uri(uri)
        answer = self._repeated(uri, lambda: self._client.put_object(Bucket=bucket, Key=key, Body=body))
        return str(answer["ETag"])

    def put_if_absent(self, uri: str, body: bytes) -> str:
        """Create an object and return its ETag."""
        return self._put_once(uri, body, IfNoneMatch="*")

    def put_if_match(self, uri: str, body: bytes, etag: str) -> str:
        """Replace the object that has this ETag and return the new one."""
        return self._put_once(uri, body, IfMatch=etag)

    def download_file(self, uri: str, path: Path) -> None:
        """Write the object to a file, which appears whole or not at all (boto3 downloads beside it and renames)."""
        bucket, key = split_uri(uri)
        try:
            self._repeated(uri, lambda: self._client.download_file(bucket, key, str(path), Config=TRANSFER))
        except ObjectMissing:
            self._require_bucket(uri)
            raise

    def upload_file(self, path: Path, uri: str) -> None:
        """Write a file of any size as an object, over any that is there."""
        bucket, key = split_uri(uri)
        self._repeated(uri, lambda: self._client.upload_file(str(path), bucket, key, Config=TRANSFER))

    def delete(self, uris: Iterable[str]) -> None:
        """Delete objects; those that are not there count as deleted."""
        keys_by_bucket: dict[str, list[str]] = {}
        for uri in uris:
            bucket, key = split_uri(uri)
            keys_by_bucket.setdefault(bucket, []).append(key)
        for bucket, keys in keys_by_bucket.items():
            for start in range(0, len(keys), DELETE_BATCH):
                self._delete(bucket, keys[start : start + DELETE_BATCH])

    def _connect(self, session: Any, endpoint: str | None, retries: dict[str, Any]) -> Any:
        config = Config(
            retries=retries,
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            max_pool_connections=16,
            tcp_keepalive=True,
            s3={"addressing_style": "path" if endpoint else "auto"},
            # The default adds CRC trailers that many S3-compatible stores refuse; our own SHA-256 covers what matters.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        region = session.region_name or "us-east-1"  # signatures need one, stores other than AWS mostly ignore it
        try:
            return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
        except ValueError:
            raise BadConfig(f"storage.endpoint {self.name!r} is not a URL: write http(s)://host:port") from None

    def _get(self, uri: str, start: int, length: int | None) -> Stored:
        bucket, key = split_uri(uri)
        request: dict[str, str] = {"Bucket": bucket, "Key": key}
        if start or length is not None:
            request["Range"] = f"bytes={start}-" + ("" if length is None else str(start + length - 1))
        answer = self._client.get_object(**request)
        # Not ``with answer["Body"]``: entering it gives urllib3's stream, whose errors are not boto3's.
        with closing(answer["Body"]) as stream:
            return Stored(stream.read(), answer["ETag"])

    def _put_once(self, uri: str, body: bytes, **condition: str) -> str:
        bucket, key = split_uri(uri)
        try:
            answer = self._client_that_sends_once.put_object(Bucket=bucket, Key=key, Body=body, **condition)
        except S3_ERRORS as error:
            match classify(error):
                case Kind.CONDITION_FAILED:
                    raise PreconditionFailed(uri) from error
                case Kind.MISSING if "IfMatch" in condition:
                    raise PreconditionFailed(uri) from error  # how S3 says that there is nothing to match
                case Kind.TRANSIENT | Kind.UNRESOLVED:
                    raise Ambiguous(f"{uri}: {describe(error)}") from error
                case Kind.NOT_IMPLEMENTED:
                    self._refuse_store(uri, error)
                case kind:
                    raise self._terminal(kind, uri, error) from error
        return str(answer["ETag"])

    def _delete(self, bucket: str, keys: Sequence[str]) -> None:
        request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        uri = f"s3://{bucket}/{keys[0]}"
        answer = self._repeated(uri, lambda: self._client.delete_objects(Bucket=bucket, Delete=request))
        for failed in answer.get("Errors", ()):
            error = ClientError({"Error": failed}, "DeleteObjects")
            raise self._terminal(classify(error), f"s3://{bucket}/{failed.get('Key', '')}", error)

    def _repeated(self, uri: str, request: Callable[[], T]) -> T:
        """Return what a request returns, repeated with full jitter for ``retry_seconds`` while the store cannot."""
        deadline = time.monotonic() + self._retry_seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return request()
            except S3_ERRORS as error:
                kind = classify(error)
                if kind not in {Kind.TRANSIENT, Kind.UNRESOLVED}:
                    raise self._terminal(kind, uri, error) from error
                if time.monotonic() >= deadline:
                    raise self._unavailable(uri, error) from error
            time.sleep(random.uniform(0, pause))  # noqa: S311  jitter
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _require_bucket(self, uri: str) -> None:
        """Raise BadConfig when it is the bucket that is missing: the answer to a HEAD does not tell which."""
        bucket, _ = split_uri(uri)
        try:
            self._client.head_bucket(Bucket=bucket)
        except S3_ERRORS as error:
            if classify(error) is Kind.MISSING:
                raise self._terminal(Kind.NO_BUCKET, uri, error) from error

    def _terminal(self, kind: Kind, uri: str, error: BaseException) -> Exception:
        """Return what to raise for a failure that asking again will not change."""
        bucket, _ = split_uri(uri)
        match kind:
            case Kind.OUT_OF_RANGE:
                return _OutOfRange(uri)
            case Kind.MISSING:
                return ObjectMissing(f"{uri} does not exist in {self.name}")
            case Kind.NO_BUCKET:
                return BadConfig(
                    f"bucket {bucket!r} of {uri} does not exist in {self.name}: create it or correct the URI"
                )
            case Kind.FORBIDDEN:
                return NoPermission(
                    f"{self.name} refused access to {uri} ({describe(error)}): check that the credentials are valid "
                    "and allow GetObject, PutObject, DeleteObject and ListBucket there (without it a missing object "
                    "looks forbidden)"
                )
            case Kind.TRANSIENT | Kind.UNRESOLVED:
                return self._unavailable(uri, error)
        return BadConfig(f"{self.name} refused {uri} ({describe(error)}): check endpoint, region and URI")

    def _unavailable(self, uri: str, error: BaseException) -> StorageUnavailable:
        return StorageUnavailable(
            f"{self.name} did not answer for {uri} within {self._retry_seconds:.0f} s of retries ({describe(error)}): "
            f"check that the store is up and reachable from the training pods"
        )

    def _refuse_store(self, uri: str, error: BaseException) -> NoReturn:
        raise BadConfig(
            f"{self.name} does not implement conditional writes ({describe(error)} for {uri}), without which no "
            "checkpoint can be committed safely: use a store that has If-None-Match and If-Match"
        ) from error


class _OutOfRange(Exception):
    """A range starts behind the object's end."""


def _without_credentials(endpoint: str) -> str:
    """Return the endpoint as it may be shown: a URL can carry user and password."""
    parts = urlsplit(endpoint)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
