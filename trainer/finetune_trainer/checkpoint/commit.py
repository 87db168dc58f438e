"""Carrying out changes of ``HEAD``, and creating manifests, in a store that may refuse, conflict or not answer.

``head.Swap`` decides; this file reads, writes once, pauses with jitter and asks again. The store repeats reads for
minutes by itself; a conditional write leaves exactly once per decision.
"""

import random
import secrets
import time
from collections.abc import Callable

from finetune_trainer.checkpoint.head import (
    Add,
    Change,
    Drop,
    Fence,
    Grade,
    Head,
    Kept,
    Lost,
    Overtaken,
    Retention,
    RollBack,
    Seen,
    Settled,
    Swap,
    Unreadable,
    Write,
    decode,
    encode,
)
from finetune_trainer.errors import BadData, CheckpointsLost, Stale, StorageUnavailable
from finetune_trainer.object_store import Ambiguous, ObjectMissing, ObjectStore, PreconditionFailed

HEAD_KEY = "HEAD"
CHECKPOINTS_KEY = "checkpoints/"
ATTEMPTS = 20
"""How often one change is tried; with the pauses between, about two minutes beyond what the store itself waits."""
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 15.0


def new_nonce() -> str:
    """Return a mark that no other write has."""
    return secrets.token_hex(8)


def pause_after(attempt: int) -> None:
    """Sleep before the next attempt, the longer the more there were, with full jitter."""
    time.sleep(random.uniform(0, min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**attempt)))  # noqa: S311  jitter


class HeadWriter:
    """One incarnation's hand on ``<prefix>/HEAD``. ``has_checkpoint`` says that the job is known to have committed one."""

    def __init__(
        self,
        *,
        store: ObjectStore,
        prefix: str,
        generation: int,
        has_checkpoint: bool = False,
        nonce: Callable[[], str] = new_nonce,
        pause: Callable[[int], None] = pause_after,
        retention: Retention,
    ) -> None:
        self._retention = retention
        self._store = store
        self._prefix = prefix
        self._uri = f"{prefix}/{HEAD_KEY}"
        self._generation = generation
        self._has_checkpoint = has_checkpoint
        self._nonce = nonce
        self._pause = pause
        self._owned: frozenset[str] = frozenset()
        self._last: Head | None = None

    def fence(self) -> Head:
        """Raise ``HEAD`` to this generation and return it.

        Raises:
            Stale: this generation, or a higher one, has been there before.
            CheckpointsLost: there is none, and there were checkpoints.
        """
        return self._settle(Fence())

    def require_own(self) -> None:
        """Read ``HEAD`` and return where a change could be made.

        Raises:
            Stale, CheckpointsLost: it could not.
        """
        self._decide(Swap(self._generation, Fence(), owned=self._owned, last=self._last))

    def commit(self, new: Kept, grades: tuple[tuple[int, float], ...] = ()) -> Head:
        """Put a checkpoint at the front of the list and return the new ``HEAD``; ``grades``: what evaluations of steps gave.

        Raises:
            Stale: a higher generation has taken over.
            CheckpointsLost: somebody deleted ``HEAD``.
            StorageUnavailable: whether it happened could not be found out; it may yet happen.
        """
        return self._settle(Add(new, self._retention, grades))

    def drop(self, lost: tuple[Kept, ...]) -> Head:
        """Take checkpoints that cannot be loaded off the list and return the new ``HEAD``."""
        return self._settle(Drop(lost))

    def grade(self, step: int, metric: float) -> Head:
        """Note what the evaluation of a step gave and return the new ``HEAD``."""
        return self._settle(Grade(step, metric, self._retention))

    def roll_back(self, suspect_from: int, skipped: tuple[int, int]) -> Head:
        """Make the next generation start before a step, without a range of samples; return the new ``HEAD``."""
        return self._settle(RollBack(skipped, suspect_from))

    def kept(self) -> tuple[Kept, ...]:
        """Return the checkpoints that are kept, newest first, as this writer settled it last."""
        return self._last.kept if self._last else ()

    def _settle(self, change: Change) -> Head:
        swap = Swap(self._generation, change, owned=self._owned, last=self._last)
        for attempt in range(ATTEMPTS):
            match self._decide(swap):
                case Settled(head):
                    self._last = head
                    return head
                case Write() as write:
                    self._owned |= {write.head.nonce}
                    swap = swap.sent(write)
                    if self._wrote(write):
                        self._last = write.head
                        return write.head
            self._pause(attempt)
        raise StorageUnavailable(
            f"{self._uri} could not be swapped in {ATTEMPTS} attempts: {self._store.name} neither confirms nor settles "
            "conditional writes; check its health and any proxy in front of it"
        )

    def _decide(self, swap: Swap) -> Settled | Write:
        match swap.decide(self._read(), self._nonce()):
            case Overtaken(head):
                raise self._stale(head)
            case Lost():
                raise self._lost("it is gone")
            case decision:
                return decision

    def _read(self) -> Seen | None:
        try:
            stored = self._store.read(self._uri)
        except ObjectMissing:
            return None if self._last is not None else self._read_again_unless_new()
        return self._decoded(stored.body, stored.etag)

    def _read_again_unless_new(self) -> Seen | None:
        """Return None for a prefix without checkpoints.

        ``HEAD`` is made before any checkpoint, so where there are some it was deleted, or made just now by another generation.
        """
        found = next(self._store.list(f"{self._prefix}/{CHECKPOINTS_KEY}"), None)
        if found is None and not self._has_checkpoint:
            return None
        try:
            stored = self._store.read(self._uri)
        except ObjectMissing:
            raise self._lost(f"it is gone, although there is {found.uri}" if found else "everything is gone") from None
        return self._decoded(stored.body, stored.etag)

    def _decoded(self, body: bytes, etag: str) -> Seen:
        try:
            return Seen(decode(body), etag)
        except Unreadable as error:
            raise BadData(f"{self._uri} is not a HEAD that can be read ({error}): restore it from a backup") from error

    def _wrote(self, write: Write) -> bool:
        body = encode(write.head)
        try:
            if write.etag is None:
                self._store.put_if_absent(self._uri, body)
            else:
                self._store.put_if_match(self._uri, body, write.etag)
        except (PreconditionFailed, Ambiguous):
            return False
        return True

    def _lost(self, what: str) -> CheckpointsLost:
        return CheckpointsLost(
            f"{self._uri}: {what}. Somebody deleted it, and nothing is committed until it is put back, with the checkpoints "
            "that it lists, from the bucket's versions or a backup"
        )

    def _stale(self, head: Head) -> Stale:
        return Stale(
            f"generation {self._generation} has been replaced: {self._uri} belongs to generation {head.generation} "
            f"(write {head.nonce}); nothing was written"
        )


def create(store: ObjectStore, uri: str, body: bytes, *, pause: Callable[[int], None] = pause_after) -> None:
    """Create an object that must not have existed, under a key that only this writer knows.

    Raises:
        Stale: there is another under that key.
        StorageUnavailable: whether it was created could not be found out.
    """
    for attempt in range(ATTEMPTS):
        try:
            store.put_if_absent(uri, body)
        except (PreconditionFailed, Ambiguous):
            pass
        else:
            return
        try:
            if store.read(uri).body == body:
                return
            raise Stale(f"{uri} was written by somebody else: two trainers run as the same generation")
        except ObjectMissing:
            pause(attempt)
    raise StorageUnavailable(f"{uri} could not be created in {ATTEMPTS} attempts: check the health of {store.name}")
