"""Writing memory as one object: in parts side by side, each checked by the store, repeated alone, and aborted together.

Each part goes with its SHA-256 in a signed header. The store refuses one that arrives broken, and only that one goes
again. A part is a whole number of chunks, since the caller has hashed those: one chunk, but the last takes four. So up to four chunks go
in one request, and more of them in one request less than there are, those that begin and complete the upload included. The last part is
the longest, so it is sent first. Past 78 GiB S3's limit of 10,000 parts makes them larger. A part of several chunks is hashed here, after
each of its chunks was found to be what the caller says.

Completing is the one request that is not idempotent: repeated after a lost answer it fails because of its own success.
So the upload carries a nonce as metadata, and after any failure a look at the object tells whether that one is ours.
"""

import base64
import hashlib
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from finetune_trainer.errors import StorageUnavailable
from finetune_trainer.object_store.paced_body import Pace, PacedBody
from finetune_trainer.object_store.protocol import CHUNK_BYTES, UploadStopped, split_uri
from finetune_trainer.object_store.s3_connection import Clients, Connection
from finetune_trainer.object_store.s3_errors import S3_ERRORS, Kind, classify

T = TypeVar("T")

MOST_PARTS = 10_000
"""Of one upload, in S3."""
LAST_PART_CHUNKS = 4
PARTS_IN_FLIGHT = 4
NONCE_KEY = "upload-nonce"


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes ``[start, end)`` of the object. Numbers count from 1."""

    number: int
    start: int
    end: int


def plan_parts(size_bytes: int) -> tuple[Part, ...]:
    """Cut an object into parts of the fewest whole chunks that keep their number allowed; an empty one has none."""
    chunks = -(-size_bytes // CHUNK_BYTES)
    part_bytes = max(1, -(-chunks // MOST_PARTS)) * CHUNK_BYTES
    starts = [*range(0, size_bytes, part_bytes)]
    starts = starts[: max(1, len(starts) - LAST_PART_CHUNKS + 1)]
    return tuple(Part(i, start, end) for i, (start, end) in enumerate(pairwise([*starts, size_bytes]), start=1))


class Upload:
    """One object on its way."""

    def __init__(
        self,
        connection: Connection,
        uri: str,
        view: memoryview,
        *,
        digests: Sequence[str],
        pace: Pace,
        stopped: Callable[[], bool],
    ) -> None:
        assert len(digests) == -(-len(view) // CHUNK_BYTES), f"{len(digests)} digests for {len(view)} bytes of {uri}"
        bucket, key = split_uri(uri)
        self._connection = connection
        self._uri = uri
        self._object = {"Bucket": bucket, "Key": key}
        self._view = view
        self._digests = digests
        self._pace = pace
        self._stopped = stopped
        self._failed = threading.Event()
        self._nonce = secrets.token_hex(8)

    def run(self) -> None:
        """Write the object, or leave nothing of it."""
        parts = plan_parts(len(self._view))
        if self._stopped():
            raise UploadStopped(self._uri)
        if len(parts) > 1:
            self._multipart(parts)
        else:
            self._put(Part(1, 0, len(self._view)))

    def _put(self, whole: Part) -> None:
        digest = self._digest(whole)
        self._repeated(lambda clients: clients.bulk.put_object(**self._object, **self._payload(whole, digest)))

    def _multipart(self, parts: Sequence[Part]) -> None:
        upload = {**self._object, "UploadId": self._begin()}
        try:
            sent = self._send(upload, parts)
            self._complete(upload, sent)
        except BaseException:
            self._abort(upload)
            raise

    def _begin(self) -> str:
        create = {"ChecksumAlgorithm": "SHA256", "Metadata": {NONCE_KEY: self._nonce}}
        answer = self._repeated(lambda clients: clients.patient.create_multipart_upload(**self._object, **create))
        return str(answer["UploadId"])

    def _send(self, upload: dict[str, str], parts: Sequence[Part]) -> list[dict[str, Any]]:
        """Send all parts, the longest first, and return what completing needs; the first failure ends the others."""
        with ThreadPoolExecutor(PARTS_IN_FLIGHT, thread_name_prefix="upload") as pool:
            last = pool.submit(self._send_part, upload, parts[-1])
            futures = [*(pool.submit(self._send_part, upload, part) for part in parts[:-1]), last]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise _cause(errors)
        return [future.result() for future in futures]

    def _send_part(self, upload: dict[str, str], part: Part) -> dict[str, Any]:
        if self._is_over():
            raise UploadStopped(self._uri)
        digest = self._digest(part)

        def send(clients: Clients) -> dict[str, Any]:
            payload = self._payload(part, digest)
            answer = clients.bulk.upload_part(**upload, PartNumber=part.number, **payload)
            return {"PartNumber": part.number, "ETag": answer["ETag"], "ChecksumSHA256": payload["ChecksumSHA256"]}

        try:
            return self._repeated(send)
        except BaseException:
            self._failed.set()
            raise

    def _digest(self, part: Part) -> str:
        chunks = range(part.start, part.end, CHUNK_BYTES)
        if len(chunks) == 1:
            return self._digests[part.start // CHUNK_BYTES]  # the store itself compares
        for start in chunks:
            if _sha256(self._view[start : min(start + CHUNK_BYTES, part.end)]) != self._digests[start // CHUNK_BYTES]:
                raise StorageUnavailable(
                    f"{self._uri} was not uploaded: it is not what the digests say, from byte {start}"
                )
        return _sha256(self._view[part.start : part.end])

    def _payload(self, part: Part, digest: str) -> dict[str, Any]:
        body = PacedBody(self._view[part.start : part.end], self._uri, self._pace, self._is_over)
        return {"Body": body, "ChecksumSHA256": base64.b64encode(bytes.fromhex(digest)).decode()}

    def _complete(self, upload: dict[str, str], parts: list[dict[str, Any]]) -> None:
        def complete(clients: Clients) -> None:
            try:
                clients.patient.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
            except S3_ERRORS:
                if not self._is_there(clients):
                    raise

        self._repeated(complete)

    def _is_there(self, clients: Clients) -> bool:
        try:
            found = clients.patient.head_object(**self._object)
        except S3_ERRORS as error:
            if classify(error) is Kind.MISSING:
                return False
            raise
        return bool(found["ContentLength"] == len(self._view) and found["Metadata"].get(NONCE_KEY) == self._nonce)

    def _abort(self, upload: dict[str, str]) -> None:
        with suppress(*S3_ERRORS):  # what stays is garbage, and abort_uploads finds it
            self._connection.renewed(lambda clients: clients.sends_once.abort_multipart_upload(**upload))

    def _repeated(self, request: Callable[[Clients], T]) -> T:
        return self._connection.repeated(self._uri, request, self._is_over)

    def _is_over(self) -> bool:
        return self._failed.is_set() or self._stopped()


def _sha256(view: memoryview) -> str:
    return hashlib.sha256(view).hexdigest()


def _cause(errors: Sequence[BaseException]) -> BaseException:
    """Return the error that ended the others: those only say that they were stopped."""
    return next((error for error in errors if not isinstance(error, UploadStopped)), errors[0])


def abort_uploads(connection: Connection, prefix_uri: str, spared: Callable[[str], bool]) -> int:
    """Abort every unfinished upload below a prefix that is not spared and return how many there were."""
    bucket, prefix = split_uri(prefix_uri)
    request = {"Bucket": bucket, "Prefix": prefix}
    aborted = 0
    while True:
        page = connection.repeated(prefix_uri, lambda clients: clients.patient.list_multipart_uploads(**request))
        for upload in page.get("Uploads", ()):
            if upload["Key"].startswith(prefix) and not spared(f"s3://{bucket}/{upload['Key']}"):
                aborted += _abort_listed(connection, bucket, upload)
        if not page.get("IsTruncated"):
            return aborted
        request.update(KeyMarker=page["NextKeyMarker"], UploadIdMarker=page["NextUploadIdMarker"])


def _abort_listed(connection: Connection, bucket: str, upload: dict[str, Any]) -> bool:
    """Abort an upload and return whether there was one: it may have ended since it was listed."""
    key, upload_id = upload["Key"], upload["UploadId"]
    abort = {"Bucket": bucket, "Key": key, "UploadId": upload_id}

    def send(clients: Clients) -> bool:
        try:
            clients.patient.abort_multipart_upload(**abort)
        except S3_ERRORS as error:
            if classify(error) not in {Kind.NO_UPLOAD, Kind.MISSING}:
                raise
            return False
        return True

    return connection.repeated(f"s3://{bucket}/{key}", send)
