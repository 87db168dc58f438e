"""A stretch of memory as the file that boto3 wants for a body: sent without a copy, no faster than a rate allows.

The rate is kept piece by piece and not part by part, since a store closes a connection on which nothing comes.
"""

import io
import threading
import time
from collections.abc import Callable

from finetune_trainer.object_store.protocol import UploadStopped
from finetune_trainer.object_store.s3_connection import wait

PACED_PIECE_BYTES = 64 * 2**10


class Pace:
    """A rate that several threads keep together (None: any rate)."""

    def __init__(self, bytes_per_second: int | None) -> None:
        assert bytes_per_second is None or bytes_per_second > 0, f"a rate of {bytes_per_second} bytes per second"
        self._bytes_per_second = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def piece(self, wanted_bytes: int) -> int:
        """Return how many of the bytes to send at once."""
        return wanted_bytes if self._bytes_per_second is None else min(wanted_bytes, PACED_PIECE_BYTES)

    def reserve(self, size_bytes: int, now: float) -> float:
        """Return how many seconds from ``now`` to wait before so many bytes may go; they are counted as gone."""
        if self._bytes_per_second is None:
            return 0.0
        with self._lock:
            starts_at = max(self._free_at, now)
            self._free_at = starts_at + size_bytes / self._bytes_per_second
        return starts_at - now


class PacedBody:
    """Reads as a binary file does, but gives views of the memory instead of copies."""

    def __init__(self, view: memoryview, uri: str, pace: Pace, stopped: Callable[[], bool]) -> None:
        self._view = view
        self._uri = uri
        self._pace = pace
        self._stopped = stopped
        self._position = 0

    def __len__(self) -> int:
        return len(self._view)

    def read(self, amount: int = -1) -> memoryview:
        """Return the next bytes, at most ``amount``, once their time has come.

        Raises:
            UploadStopped: nobody wants them any more.
        """
        left = len(self._view) - self._position
        size = self._pace.piece(left if amount < 0 else min(left, amount))
        wait(self._pace.reserve(size, time.monotonic()), self._stopped)
        if self._stopped():
            raise UploadStopped(self._uri)
        piece = self._view[self._position : self._position + size]
        self._position += size
        return piece

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go back to where a repetition starts."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """Return how far it was read."""
        return self._position
