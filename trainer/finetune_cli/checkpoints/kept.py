"""Reading ``HEAD`` and the manifests it lists, and saying what is wrong where that fails."""

import json

from finetune_cli.checkpoints.target import Target
from finetune_cli.errors import CannotTell, Damaged
from finetune_trainer.checkpoint import head as heads
from finetune_trainer.checkpoint import manifest as manifests
from finetune_trainer.checkpoint.commit import CHECKPOINTS_KEY, HEAD_KEY
from finetune_trainer.checkpoint.head import Head, Kept, Unreadable
from finetune_trainer.checkpoint.manifest import Manifest
from finetune_trainer.object_store import ObjectMissing, ObjectStore


def read_head(store: ObjectStore, prefix: str) -> Head:
    """Return ``HEAD``.

    Raises:
        Damaged: it is missing although there are checkpoints, or is no HEAD.
        CannotTell: there is nothing below the prefix, or a version to come wrote it.
    """
    uri = f"{prefix}/{HEAD_KEY}"
    try:
        body = store.get(uri)
    except ObjectMissing:
        if next(store.list(f"{prefix}/{CHECKPOINTS_KEY}"), None) is None:
            raise CannotTell(
                f"there are no checkpoints below {prefix}: check the prefix; a job's is the folder of status.checkpoint.uri "
                "above checkpoints/"
            ) from None
        raise Damaged(
            f"{uri} is missing although there are checkpoints: someone deleted it; restore it from a backup, nothing else "
            "says which of them were committed"
        ) from None
    try:
        return heads.decode(body)
    except Unreadable as error:
        if _is_of_a_version_to_come(body):
            raise CannotTell(f"{uri} was written by a newer version ({error}): update this program") from None
        raise Damaged(f"{uri} is not a HEAD that can be read ({error}): restore it from a backup") from None


def read_manifest(store: ObjectStore, prefix: str, kept: Kept) -> Manifest:
    """Return the manifest of a checkpoint that ``HEAD`` lists.

    Raises:
        Damaged: it is missing, or not the one that was committed.
    """
    uri = f"{prefix}/{kept.manifest}"
    try:
        body = store.get(uri)
    except ObjectMissing:
        raise Damaged(f"{uri} is missing") from None
    if manifests.digest(body) != kept.sha256:
        raise Damaged(f"{uri} has other bytes than were committed")
    try:
        return manifests.decode(body)
    except Unreadable as error:
        raise CannotTell(f"{uri} was written by another version ({error}): update this program") from None


def choose(head: Head, target: Target) -> Kept:
    """Return the checkpoint that is meant: that of the step, or the newest.

    Raises:
        CannotTell: ``HEAD`` lists no such checkpoint.
    """
    if not head.kept:
        raise CannotTell(f"{target.prefix}/{HEAD_KEY} lists no checkpoint yet: the job has not committed one")
    if target.step is None:
        return head.kept[0]
    for kept in head.kept:
        if kept.step == target.step:
            return kept
    steps = ", ".join(str(kept.step) for kept in head.kept)
    raise CannotTell(f"{target.prefix}/{HEAD_KEY} lists no checkpoint of step {target.step}: it lists {steps}")


def _is_of_a_version_to_come(body: bytes) -> bool:
    try:
        version = json.loads(body).get("version")
    except (ValueError, AttributeError):
        return False
    return isinstance(version, int) and version > heads.FORMAT_VERSION
