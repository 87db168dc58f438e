"""The object store behind boto3: S3 and what speaks its protocol.

Messages carry the URI, the error's code and what to do, never the store's own text: it may quote keys and signatures.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError, IncompleteReadError

from finetune_trainer.object_store.paced_body import Pace
from finetune_trainer.object_store.protocol import (
    Ambiguous,
    ObjectInfo,
    ObjectMissing,
    ObjectTooShort,
    PreconditionFailed,
    Stored,
    never,
    nothing,
    split_uri,
)
from finetune_trainer.object_store.s3_connection import RETRY_SECONDS, Clients, Connection, OutOfRange
from finetune_trainer.object_store.s3_errors import S3_ERRORS, Kind, classify, describe
from finetune_trainer.object_store.s3_upload import Upload, abort_uploads

DELETE_BATCH = 1000  # of DeleteObjects
READ_PIECE_BYTES = 2**20
"""Read at once into memory that is given: boto3 goes through a buffer of that size."""
TRANSFER = TransferConfig(multipart_threshold=16 * 2**20, multipart_chunksize=16 * 2**20, max_concurrency=4)


class S3ObjectStore:
    """Objects at one endpoint (None: AWS itself), with the credentials that boto3 finds by itself."""

    def __init__(self, endpoint: str | None, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._connection = Connection(endpoint, retry_seconds=retry_seconds)
        self.name = self._connection.name

    def get(self, uri: str, start: int | None = None, length: int | None = None) -> bytes:
        """Return ``body[start:start + length]``."""
        assert length != 0, "a request for no bytes"
        try:
            return self._connection.repeated(uri, lambda clients: _get(clients, uri, start or 0, length).body)
        except OutOfRange:
            return b""

    def read(self, uri: str) -> Stored:
        """Return the whole object with its ETag."""
        return self._connection.repeated(uri, lambda clients: _get(clients, uri, 0, None))

    def read_into(self, uri: str, start: int, out: memoryview) -> None:
        """Fill ``out`` with the object's bytes from ``start``."""
        assert len(out) > 0, "a request for no bytes"
        try:
            is_whole = self._connection.repeated(uri, lambda clients: _get_into(clients, uri, start, out))
        except OutOfRange:
            is_whole = False
        if not is_whole:
            raise ObjectTooShort(f"{uri} in {self.name} ends before byte {start + len(out)}")

    def head(self, uri: str) -> ObjectInfo | None:
        """Return size and ETag, or None when there is no such object."""
        bucket, key = split_uri(uri)
        try:
            answer = self._connection.repeated(uri, lambda clients: clients.patient.head_object(Bucket=bucket, Key=key))
        except ObjectMissing:
            self._connection.require_bucket(uri)
            return None
        return ObjectInfo(uri, answer["ContentLength"], answer["ETag"])

    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """Yield every object whose URI starts with ``prefix_uri``, in the order of their keys."""
        bucket, prefix = split_uri(prefix_uri)
        request = {"Bucket": bucket, "Prefix": prefix}
        while True:
            page = self._connection.repeated(prefix_uri, lambda clients: clients.patient.list_objects_v2(**request))
            for item in page.get("Contents", ()):
                yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"])
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def put(self, uri: str, body: bytes) -> str:
        """Write an object, over any that is there, and return its ETag."""
        bucket, key = split_uri(uri)
        answer = self._connection.repeated(
            uri, lambda clients: clients.patient.put_object(Bucket=bucket, Key=key, Body=body)
        )
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
            self._connection.repeated(
                uri, lambda clients: clients.patient.download_file(bucket, key, str(path), Config=TRANSFER)
            )
        except ObjectMissing:
            self._connection.require_bucket(uri)
            raise

    def upload_file(self, path: Path, uri: str) -> None:
        """Write a file of any size as an object, over any that is there."""
        bucket, key = split_uri(uri)
        self._connection.repeated(
            uri, lambda clients: clients.patient.upload_file(str(path), bucket, key, Config=TRANSFER)
        )

    def upload(
        self,
        body: memoryview | bytes,
        uri: str,
        *,
        digests: Sequence[str],
        bytes_per_second: int | None = None,
        stopped: Callable[[], bool] = never,
    ) -> None:
        """Write what lies in memory as one object, in parts side by side."""
        view = memoryview(body).cast("B")
        pace = Pace(bytes_per_second)
        Upload(self._connection, uri, view, digests=digests, pace=pace, stopped=stopped).run()

    def abort_uploads(self, prefix_uri: str, spared: Callable[[str], bool] = nothing) -> int:
        """Abort the unfinished uploads of every object below a prefix."""
        return abort_uploads(self._connection, prefix_uri, spared)

    def delete(self, uris: Iterable[str]) -> None:
        """Delete objects; those that are not there count as deleted."""
        keys_by_bucket: dict[str, list[str]] = {}
        for uri in uris:
            bucket, key = split_uri(uri)
            keys_by_bucket.setdefault(bucket, []).append(key)
        for bucket, keys in keys_by_bucket.items():
            for start in range(0, len(keys), DELETE_BATCH):
                self._delete(bucket, keys[start : start + DELETE_BATCH])

    def _put_once(self, uri: str, body: bytes, **condition: str) -> str:
        bucket, key = split_uri(uri)
        request = {"Bucket": bucket, "Key": key, "Body": body, **condition}
        try:
            answer = self._connection.renewed(lambda clients: clients.sends_once.put_object(**request))
        except S3_ERRORS as error:
            match classify(error):
                case Kind.CONDITION_FAILED:
                    raise PreconditionFailed(uri) from error
                case Kind.MISSING if "IfMatch" in condition:
                    raise PreconditionFailed(uri) from error  # how S3 says that there is nothing to match
                case Kind.TRANSIENT | Kind.UNRESOLVED:
                    raise Ambiguous(f"{uri}: {describe(error)}") from error
                case Kind.NOT_IMPLEMENTED:
                    self._connection.refuse_store(uri, error)
                case kind:
                    raise self._connection.terminal(kind, uri, error) from error
        return str(answer["ETag"])

    def _delete(self, bucket: str, keys: Sequence[str]) -> None:
        request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        uri = f"s3://{bucket}/{keys[0]}"
        answer = self._connection.repeated(
            uri, lambda clients: clients.patient.delete_objects(Bucket=bucket, Delete=request)
        )
        for failed in answer.get("Errors", ()):
            error = ClientError({"Error": failed}, "DeleteObjects")
            raise self._connection.terminal(classify(error), f"s3://{bucket}/{failed.get('Key', '')}", error)


def _get(clients: Clients, uri: str, start: int, length: int | None) -> Stored:
    bucket, key = split_uri(uri)
    request: dict[str, str] = {"Bucket": bucket, "Key": key}
    if start or length is not None:
        request["Range"] = f"bytes={start}-" + ("" if length is None else str(start + length - 1))
    answer = clients.patient.get_object(**request)
    # Not ``with answer["Body"]``: entering it gives urllib3's stream, whose errors are not boto3's.
    with closing(answer["Body"]) as stream:
        return Stored(stream.read(), answer["ETag"])


def _get_into(clients: Clients, uri: str, start: int, out: memoryview) -> bool:
    """Read a range and return whether the object has all of it."""
    bucket, key = split_uri(uri)
    answer = clients.patient.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + len(out) - 1}")
    with closing(answer["Body"]) as stream:
        if answer["ContentLength"] < len(out):
            return False
        if answer["ContentLength"] > len(
            out
        ):  # something between us and the store knows no ranges: nothing is wrong with the object
            raise IncompleteReadError(actual_bytes=answer["ContentLength"], expected_bytes=len(out))
        filled = 0
        while filled < len(out):
            read = stream.readinto(out[filled : filled + READ_PIECE_BYTES])
            if read == 0:
                raise IncompleteReadError(actual_bytes=filled, expected_bytes=len(out))
            filled += read
    return True
