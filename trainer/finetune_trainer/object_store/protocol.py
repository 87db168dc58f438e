"""What the trainer asks of an object store, with the rules that any implementation keeps.

Objects are named by full URIs, ``s3://bucket/key``. A write is whole or not at all, and a read that starts after a
write has answered sees it. Everything but the two conditional writes is idempotent and is retried inside the store
for minutes; a conditional write is sent exactly once, because a retry would report the failed condition of its own
success (boto3 1.44.5 does). What went wrong is raised as ``finetune_trainer.errors``: forbidden or expired is
``NoPermission``, a store that stays away is ``StorageUnavailable``, a bucket that is not there is ``NoBucket``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune_trainer.errors import BadConfig

SCHEME = "s3://"
CHUNK_BYTES = 8 * 2**20
"""How many bytes each digest of an upload covers; the last one may cover fewer."""


class ObjectMissing(BadConfig):
    """No object has this URI. The store answered and said so: forbidden and unreachable are other errors."""


class NoBucket(BadConfig):
    """No bucket has this name. The store answered and said so."""

    def __init__(self, message: str, bucket: str = "") -> None:
        super().__init__(
            message
        )  # ``bucket`` stays out of the arguments: they travel between ranks, and are the message
        self.bucket = bucket


class ObjectTooShort(BadConfig):
    """An object ends before the range that was asked for. Its whole answer came: a broken one is repeated."""


class UploadStopped(Exception):
    """An upload ended because its caller asked for it.

    Nothing was written, unless all was and only the answer to the last request was still missing.
    """


class PreconditionFailed(Exception):
    """A conditional write was refused.

    Where something between us and the store repeats requests, what refused it may be our own success.
    """


class Ambiguous(Exception):
    """A conditional write may or may not have happened, and may yet happen. Only reading can tell."""


def never() -> bool:
    """Return False: what is never stopped."""
    return False


def nothing(uri: str) -> bool:  # noqa: ARG001  whatever it is
    """Return False: of uploads of which none is spared."""
    return False


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object without its bytes."""

    uri: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class Stored:
    """An object's bytes and the ETag that they had when they were read."""

    body: bytes
    etag: str


class ObjectStore(Protocol):
    """A bucketful of immutable objects and a few that are swapped."""

    @property
    def name(self) -> str:
        """What to call this store in a message: its endpoint, without credentials."""

    def get(self, uri: str, start: int | None = None, length: int | None = None) -> bytes:
        """Return ``body[start:start + length]``: fewer bytes where the object ends earlier, as in a slice.

        Raises:
            ObjectMissing: no such object.
        """

    def read(self, uri: str) -> Stored:
        """Return the whole object with its ETag.

        Raises:
            ObjectMissing: no such object.
        """

    def read_into(self, uri: str, start: int, out: memoryview) -> None:
        """Fill ``out`` with the object's bytes from ``start``. For ranges of many megabytes, from several threads.

        Raises:
            ObjectMissing: no such object.
            ObjectTooShort: it ends before ``start + len(out)``; ``out`` is then in no particular state.
        """

    def head(self, uri: str) -> ObjectInfo | None:
        """Return size and ETag, or None when there is no such object."""

    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """Yield every object whose URI starts with ``prefix_uri``, in the order of their keys."""

    def put(self, uri: str, body: bytes) -> str:
        """Write an object, over any that is there, and return its ETag."""

    def put_if_absent(self, uri: str, body: bytes) -> str:
        """Create an object and return its ETag.

        Raises:
            PreconditionFailed: there is one already.
            Ambiguous: the store did not say.
        """

    def put_if_match(self, uri: str, body: bytes, etag: str) -> str:
        """Replace the object that has this ETag and return the new one.

        Raises:
            PreconditionFailed: it has another ETag or is gone.
            Ambiguous: the store did not say.
        """

    def download_file(self, uri: str, path: Path) -> None:
        """Write the object to a file, which appears whole or not at all.

        Raises:
            ObjectMissing: no such object.
        """

    def upload_file(self, path: Path, uri: str) -> None:
        """Write a file of any size as an object, over any that is there."""

    def upload(
        self,
        body: memoryview | bytes,
        uri: str,
        *,
        digests: Sequence[str],
        bytes_per_second: int | None = None,
        stopped: Callable[[], bool] = never,
    ) -> None:
        """Write what lies in memory as one object, over any that is there. The memory must not change meanwhile.

        ``digests`` are the SHA-256, in hex, of each ``CHUNK_BYTES`` of the body: the store checks what arrives against
        them, so nothing is hashed twice. ``bytes_per_second`` bounds the rate. ``stopped`` is asked every fraction of a
        second and from several threads.

        Raises:
            UploadStopped: ``stopped`` turned true.
            StorageUnavailable: the store stayed away past every retry, or somebody aborted the upload.
        """

    def abort_uploads(self, prefix_uri: str, spared: Callable[[str], bool] = nothing) -> int:
        """Abort the unfinished uploads of every object whose URI starts with ``prefix_uri`` and is not ``spared``; return how many."""

    def delete(self, uris: Iterable[str]) -> None:
        """Delete objects; those that are not there count as deleted."""


def split_uri(uri: str) -> tuple[str, str]:
    """Return bucket and key (empty for a bare bucket) of ``s3://bucket/key``.

    Raises:
        BadConfig: it is not such a URI.
    """
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not uri.startswith(SCHEME) or not bucket:
        raise BadConfig(f"{uri!r} is not an object's URI: write s3://bucket/key")
    return bucket, key
