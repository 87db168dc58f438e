"""Does this store honour conditional writes? Some accept the headers and ignore them (rclone's S3 server does).

On such a store two incarnations can both commit, and the loser's files are deleted under the winner. So it is asked
before training, with objects of our own, and a store that ignores a condition is refused by name. The answer is kept
under the prefix.
"""

import logging
from collections.abc import Callable

from finetune_trainer.checkpoint.commit import ATTEMPTS, new_nonce, pause_after
from finetune_trainer.errors import BadConfig, StorageUnavailable
from finetune_trainer.object_store import Ambiguous, ObjectStore, PreconditionFailed

log = logging.getLogger(__name__)

PROBES_KEY = "probes/"
HONOURED_KEY = PROBES_KEY + "conditional-writes-honoured"


def require_conditional_writes(store: ObjectStore, prefix: str, *, pause: Callable[[int], None] = pause_after) -> None:
    """Return if the store honours If-None-Match and If-Match.

    Raises:
        BadConfig: it does not.
        StorageUnavailable: it never gave a clear answer.
    """
    if store.head(f"{prefix}/{HONOURED_KEY}") is not None:
        return
    for attempt in range(ATTEMPTS):
        uri = f"{prefix}/{PROBES_KEY}{new_nonce()}"
        try:
            _probe(store, uri)
        except Ambiguous as error:
            log.warning("%s gives no clear answer to a conditional write, trying again: %s", store.name, error)
            pause(attempt)
            continue
        finally:
            store.delete([uri])
        store.put(f"{prefix}/{HONOURED_KEY}", b"{}")
        return
    raise StorageUnavailable(f"{store.name} never answered a conditional write to {prefix} clearly: check its health")


def _probe(store: ObjectStore, uri: str) -> None:
    etag = _answered(store, uri, "a first If-None-Match: *", lambda: store.put_if_absent(uri, b"1"))
    _refused(store, uri, "If-None-Match: *", lambda: store.put_if_absent(uri, b"2"))
    newer = _answered(store, uri, "a matching If-Match", lambda: store.put_if_match(uri, b"3", etag))
    _refused(store, uri, "If-Match", lambda: store.put_if_match(uri, b"4", etag))
    if newer == etag:
        raise BadConfig(
            f"{store.name} gives two contents of {uri} the same ETag {etag}: checkpoints need another store"
        )


def _refused(store: ObjectStore, uri: str, condition: str, write: Callable[[], str]) -> None:
    try:
        write()
    except PreconditionFailed:
        return
    raise BadConfig(
        f"{store.name} ignores {condition} (found with {uri}): two writers could both commit a checkpoint; "
        "use a store with conditional writes"
    )


def _answered(store: ObjectStore, uri: str, condition: str, write: Callable[[], str]) -> str:
    """Return the new ETag. To refuse a condition that holds is as good as no answer: a proxy may repeat requests."""
    try:
        return write()
    except PreconditionFailed as error:
        raise Ambiguous(f"{store.name} refused {condition} on {uri}") from error
