"""Taking old checkpoints off ``HEAD`` from outside, beside an incarnation that may be training.

A prune is no incarnation, so it leaves generation and **nonce** as they are: the nonce says which write of which incarnation is
the last that ``HEAD`` contains, and after a prune that is still true. A running writer that reads its own nonce concludes, rightly,
that its change happened, and builds on the shorter list; with a nonce that it never wrote it would take the prune for an incarnation
of its own number and leave as stale. ETags stay unique all the same, because every swap raises the sequence, so a write that arrives
late finds its ETag gone, whoever made it.

A prune needs no mark of its own to learn what became of its write. A checkpoint that is off the list never comes back: every write
builds on the list that stands, and adds only a manifest under a key that is new. So "none of them is listed" is success, whoever
took them off. Until that has been read nothing is deleted.

What is to go is decided once, by whoever asked, and never again from a newer ``HEAD``; and a list is never emptied, since the next
incarnation would take that for a fresh start. ``tests/trainer/checkpoint/test_prune_interleavings.py`` searches every interleaving
with running incarnations.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from finetune_trainer.checkpoint.commit import ATTEMPTS, HEAD_KEY, pause_after
from finetune_trainer.checkpoint.head import Head, Kept, Unreadable, decode, encode
from finetune_trainer.errors import BadData, StorageUnavailable
from finetune_trainer.object_store import Ambiguous, ObjectStore, PreconditionFailed


class NoneWouldStay(BadData):
    """Without these the list would be empty."""


def take_off(head: Head, doomed: Iterable[Kept]) -> Head | None:
    """Return ``HEAD`` without these checkpoints, or None where it lists none of them. Pure.

    Raises:
        NoneWouldStay: it lists nothing else.
    """
    gone = {kept.manifest for kept in doomed}  # not whole entries: a running job may grade one meanwhile
    staying = tuple(kept for kept in head.kept if kept.manifest not in gone)
    if len(staying) == len(head.kept):
        return None
    if not staying:
        raise NoneWouldStay("HEAD lists nothing but the checkpoints to be taken off")
    return replace(head, sequence=head.sequence + 1, kept=staying)


def prune(
    store: ObjectStore, prefix: str, doomed: Iterable[Kept], *, pause: Callable[[int], None] = pause_after
) -> Head:
    """Take checkpoints off ``HEAD`` and return a ``HEAD`` that lists none of them. Their objects may then be deleted.

    Raises:
        NoneWouldStay: what was to stay has been taken off by somebody else.
        StorageUnavailable: whether it happened could not be found out; it may yet happen.
    """
    uri, gone = f"{prefix}/{HEAD_KEY}", tuple(doomed)
    for attempt in range(ATTEMPTS):
        stored = store.read(uri)
        try:
            head = decode(stored.body)
        except Unreadable as error:
            raise BadData(f"{uri} is not a HEAD that can be read ({error}): restore it from a backup") from error
        shorter = take_off(head, gone)
        if shorter is None:
            return head
        try:
            store.put_if_match(uri, encode(shorter), stored.etag)
        except (PreconditionFailed, Ambiguous):
            pause(attempt)
        else:
            return shorter
    raise StorageUnavailable(
        f"{uri} could not be swapped in {ATTEMPTS} attempts: {store.name} neither confirms nor settles conditional "
        "writes, or the job commits without pause; nothing was deleted, try again"
    )
