"""Deleting what no ``HEAD`` lists any more. Never a reason to stop training: what stays behind is garbage, and said so.

Two kinds: checkpoints that our own swap took off the list, whose objects go right after it has settled; and orphans,
the remains of saves that never committed. Our own of them go with our next commit: it builds on whatever became of theirs, and
none of them can happen behind it. Those of lower generations, which the fence keeps from committing, go after our own
first commit, so that an incarnation that never gets anywhere deletes nothing.
"""

import logging
import re
from collections.abc import Iterable

from finetune_trainer.checkpoint.commit import CHECKPOINTS_KEY
from finetune_trainer.checkpoint.head import Head
from finetune_trainer.errors import TrainingError
from finetune_trainer.object_store import ObjectStore

log = logging.getLogger(__name__)

_FOLDER = re.compile(re.escape(CHECKPOINTS_KEY) + r"step-\d+/g(?P<generation>\d+)-[^/]+/")


def delete_folders(store: ObjectStore, prefix: str, folders: Iterable[str]) -> None:
    """Delete the objects of checkpoints that a settled swap took off the list, or of saves that failed before it."""
    for folder in folders:
        _delete_below(store, f"{prefix}/{folder}")


def delete_orphans(store: ObjectStore, prefix: str, head: Head) -> None:
    """Delete what lower generations left below the prefix and ``head``, which is ours, does not list."""
    listed = {kept.folder for kept in head.kept}
    try:
        uris = [info.uri for info in store.list(f"{prefix}/{CHECKPOINTS_KEY}")]
        store.delete(uri for uri in uris if _is_orphan(uri.removeprefix(f"{prefix}/"), head.generation, listed))
    except TrainingError as error:
        log.warning("Remains of earlier generations below %s stay: %s", prefix, error)


def abort_uploads(store: ObjectStore, prefix: str, generation: int) -> None:
    """Abort unfinished multipart uploads below the prefix, between the own fence and the own first upload.

    Not those of higher generations' checkpoints: who was stopped right after its fence finds them when it goes on.
    """

    def is_of_a_higher_one(uri: str) -> bool:
        match = _FOLDER.match(uri.removeprefix(f"{prefix}/"))
        return match is not None and int(match["generation"]) > generation

    try:
        count = store.abort_uploads(f"{prefix}/", is_of_a_higher_one)
    except TrainingError as error:
        log.warning("Unfinished uploads below %s stay: %s", prefix, error)
    else:
        if count:
            log.info("Aborted %d uploads that earlier generations left unfinished", count)


def _is_orphan(key: str, generation: int, listed: set[str]) -> bool:
    match = _FOLDER.match(key)
    return match is not None and int(match["generation"]) < generation and match[0] not in listed


def _delete_below(store: ObjectStore, folder_uri: str) -> None:
    try:
        store.delete([info.uri for info in store.list(folder_uri)])
    except TrainingError as error:
        log.warning("The checkpoint %s is no longer listed, but its objects stay: %s", folder_uri, error)
