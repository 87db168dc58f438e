"""An object store in memory, for tests and for local runs without S3."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from finetune_trainer.errors import StorageUnavailable
from finetune_trainer.object_store.protocol import (
    CHUNK_BYTES,
    ObjectInfo,
    ObjectMissing,
    ObjectTooShort,
    PreconditionFailed,
    Stored,
    UploadStopped,
    never,
    nothing,
    split_uri,
)


class MemoryObjectStore:
    """Obeys the protocol exactly; every bucket exists. ``objects`` is open to tests that break things.

    ``unfinished`` names the uploads that neither ended nor were aborted: a process that dies in one leaves it behind.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.unfinished: set[str] = set()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """What to call this store in a message."""
        return "memory"

    def get(self, uri: str, start: int | None = None, length: int | None = None) -> bytes:
        """Return ``body[start:start + length]``."""
        first = start or 0
        return self.read(uri).body[first : None if length is None else first + length]

    def read(self, uri: str) -> Stored:
        """Return the whole object with its ETag."""
        split_uri(uri)
        with self._lock:
            if uri not in self.objects:
                raise ObjectMissing(f"{uri} does not exist in {self.name}")
            body = self.objects[uri]
        return Stored(body, _etag(body))

    def read_into(self, uri: str, start: int, out: memoryview) -> None:
        """Fill ``out`` with the object's bytes from ``start``."""
        found = self.get(uri, start, len(out))
        if len(found) < len(out):
            raise ObjectTooShort(f"{uri} in {self.name} ends before byte {start + len(out)}")
        out[:] = found

    def head(self, uri: str) -> ObjectInfo | None:
        """Return size and ETag, or None when there is no such object."""
        try:
            stored = self.read(uri)
        except ObjectMissing:
            return None
        return ObjectInfo(uri, len(stored.body), stored.etag)

    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """Yield every object whose URI starts with ``prefix_uri``, in the order of their keys."""
        with self._lock:
            found = sorted((uri, body) for uri, body in self.objects.items() if uri.startswith(prefix_uri))
        for uri, body in found:
            yield ObjectInfo(uri, len(body), _etag(body))

    def put(self, uri: str, body: bytes) -> str:
        """Write an object, over any that is there, and return its ETag."""
        split_uri(uri)
        with self._lock:
            self.objects[uri] = bytes(body)
        return _etag(body)

    def put_if_absent(self, uri: str, body: bytes) -> str:
        """Create an object and return its ETag."""
        split_uri(uri)
        with self._lock:
            if uri in self.objects:
                raise PreconditionFailed(uri)
            self.objects[uri] = bytes(body)
        return _etag(body)

    def put_if_match(self, uri: str, body: bytes, etag: str) -> str:
        """Replace the object that has this ETag and return the new one."""
        split_uri(uri)
        with self._lock:
            if uri not in self.objects or _etag(self.objects[uri]) != etag:
                raise PreconditionFailed(uri)
            self.objects[uri] = bytes(body)
        return _etag(body)

    def download_file(self, uri: str, path: Path) -> None:
        """Write the object to a file."""
        path.write_bytes(self.read(uri).body)

    def upload_file(self, path: Path, uri: str) -> None:
        """Write a file as an object."""
        self.put(uri, path.read_bytes())

    def upload(
        self,
        body: memoryview | bytes,
        uri: str,
        *,
        digests: Sequence[str],
        bytes_per_second: int | None = None,  # noqa: ARG002  memory has no rate
        stopped: Callable[[], bool] = never,
    ) -> None:
        """Write a body as an object, through ``put``."""
        split_uri(uri)
        self.unfinished.add(uri)
        try:
            self.put(uri, _checked(memoryview(body).cast("B"), uri, digests, stopped))
        except Exception:  # and no BaseException: what dies aborts nothing
            self.unfinished.discard(uri)
            raise
        self.unfinished.discard(uri)

    def abort_uploads(self, prefix_uri: str, spared: Callable[[str], bool] = nothing) -> int:
        """Forget the unfinished uploads below a prefix."""
        with self._lock:
            found = {uri for uri in self.unfinished if uri.startswith(prefix_uri) and not spared(uri)}
            self.unfinished -= found
        return len(found)

    def delete(self, uris: Iterable[str]) -> None:
        """Delete objects; those that are not there count as deleted."""
        with self._lock:
            for uri in uris:
                self.objects.pop(uri, None)


def _checked(body: memoryview, uri: str, digests: Sequence[str], stopped: Callable[[], bool]) -> bytes:
    starts = range(0, len(body), CHUNK_BYTES)
    assert len(digests) == len(starts), f"{len(digests)} digests for {len(starts)} chunks of {uri}"
    for start, digest in zip(starts, digests, strict=True):
        if stopped():
            raise UploadStopped(uri)
        if hashlib.sha256(body[start : start + CHUNK_BYTES]).hexdigest() != digest:
            raise StorageUnavailable(f"memory refused {uri}: it is not what the digests say, from byte {start}")
    return bytes(body)


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
