"""Saving and resuming, all ranks together.

A save has three parts, kept apart so that the last two can run beside training one day: *stage* (a rank writes what
it owns to a file, hashing as it goes), *upload* (to a folder that no other attempt has), *commit* (rank 0 creates the
manifest, then swaps ``HEAD``). A crash anywhere before the swap leaves the older ``HEAD``, and everything it lists,
untouched.

A resume first fences ``HEAD`` and only then looks at what it lists, so that no older incarnation can commit behind
its back. It goes down the list from the newest to the first checkpoint that every rank can read in whole, and says so
where that is not the first. "Forbidden" and "unreachable" end it with an error, since they say nothing about what is
there; a list of which nothing can be read ends it too. Only a prefix without ``HEAD``, or an empty list in it, is a
fresh start.
"""

import logging
import tempfile
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from finetune_api.protocol import Checkpoint
from finetune_trainer.checkpoint import deepspeed_state as state
from finetune_trainer.checkpoint import manifest as manifests
from finetune_trainer.checkpoint.commit import CHECKPOINTS_KEY, HeadWriter, create, new_nonce
from finetune_trainer.checkpoint.conditional_writes import require_conditional_writes
from finetune_trainer.checkpoint.fetch import Broken, fill
from finetune_trainer.checkpoint.head import Head, Kept, Unreadable
from finetune_trainer.checkpoint.manifest import MANIFEST_NAME, Json, Manifest, Position, Shard
from finetune_trainer.checkpoint.ranks import Ranks
from finetune_trainer.checkpoint.retention import delete_checkpoints, delete_orphans
from finetune_trainer.checkpoint.shard import write_shard
from finetune_trainer.errors import BadConfig, BadData, TrainingError
from finetune_trainer.object_store import ObjectMissing, ObjectStore

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one job, as one generation of it sees them. Every method is called by all ranks together.

    Args:
        engine: the DeepSpeed engine.
        store: where checkpoints go.
        prefix: ``s3://bucket/path`` of this job alone.
        generation: this incarnation's number; lower ones can no longer commit once :meth:`resume` has fenced them.
        keep: how many committed checkpoints to keep.
        recipe_digest: what identifies the recipe; a checkpoint of another one is refused.
    """

    def __init__(
        self, *, engine: Any, store: ObjectStore, prefix: str, generation: int, keep: int, recipe_digest: str
    ) -> None:
        assert keep >= 1, keep
        self._engine = engine
        self._store = store
        self._prefix = prefix.rstrip("/")
        self._generation = generation
        self._keep = keep
        self._recipe_digest = recipe_digest
        self._ranks = Ranks(TrainingError, Broken)
        self._head_writer = HeadWriter(store=store, prefix=self._prefix, generation=generation)
        self._head: Head | None = None
        self._steps_ahead = 0
        self._orphans_deleted = False

    def resume(self) -> Position | None:
        """Fence ``HEAD`` and restore the newest checkpoint that can be read; None is a fresh start.

        Raises:
            Stale: this or a higher generation has been here before.
            BadConfig: the checkpoints belong to another recipe or model, or the store cannot be used.
            BadData: there are checkpoints, but none of them can be read.
            NoPermission, StorageUnavailable: what there is cannot be told.
        """
        self._head = self._ranks.first(self._fence)
        position = self._restore_newest(self._head) if self._head.kept else None
        self._steps_ahead = state.steps_ahead(self._engine)
        return position

    def save(self, position: Position) -> Checkpoint:
        """Save the engine's state as it is now, between two optimizer steps, and return the committed checkpoint.

        Raises:
            Stale: a higher generation has taken over.
            NoPermission, StorageUnavailable: it is not committed, nothing older is lost, and training may go on.
        """
        assert self._head is not None, "save before resume"
        nonce = self._ranks.first(new_nonce)
        folder = f"{CHECKPOINTS_KEY}step-{position.step}/g{self._generation}-{nonce}/"
        shards = self._ranks.each(partial(self._stage_and_upload, position, folder))
        kept, self._head = self._ranks.first(partial(self._commit, position, folder, shards))
        uri = f"{self._prefix}/{folder.rstrip('/')}"
        return Checkpoint(step=kept.step, uri=uri, size_bytes=kept.size_bytes, commit_time=kept.commit_time)

    def _fence(self) -> Head:
        require_conditional_writes(self._store, self._prefix)
        return self._head_writer.fence()

    def _stage_and_upload(self, position: Position, folder: str) -> tuple[Position, Json]:
        """Return the position, for rank 0 to compare, and the description of what this rank uploaded."""
        ahead = state.steps_ahead(self._engine)
        assert ahead == self._steps_ahead, f"masters are {ahead - self._steps_ahead} steps ahead"
        index = {parameter.name: i for i, parameter in enumerate(state.trainable_parameters(self._engine))}
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as staging:
            path = Path(staging) / f"rank-{self._ranks.rank:05}.safetensors"
            shard = write_shard(path, state.owned(self._engine), index)
            self._store.upload_file(path, f"{self._prefix}/{folder}{shard.name}")
        return position, manifests.shard_to_json(shard)

    def _commit(self, position: Position, folder: str, parts: list[tuple[Position, Json]]) -> tuple[Kept, Head]:
        assert all(other == position for other, _ in parts), f"ranks disagree about the position: {parts}"
        manifest = self._manifest(position, tuple(manifests.shard_from_json(shard) for _, shard in parts))
        body = manifests.encode(manifest)
        create(self._store, f"{self._prefix}/{folder}{MANIFEST_NAME}", body)
        kept = Kept(
            step=position.step,
            manifest=folder + MANIFEST_NAME,
            sha256=manifests.digest(body),
            size_bytes=manifest.size_bytes + len(body),
            commit_time=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        )
        head = self._head_writer.commit(kept, keep=self._keep)
        self._delete_unlisted(head)
        return kept, head

    def _manifest(self, position: Position, shards: tuple[Shard, ...]) -> Manifest:
        return Manifest(
            position=position,
            generation=self._generation,
            world_size=self._ranks.size,
            zero_stage=state.zero_stage(self._engine),
            recipe_digest=self._recipe_digest,
            parameters=state.trainable_parameters(self._engine),
            scalars=state.scalars(self._engine),
            shards=shards,
        )

    def _delete_unlisted(self, head: Head) -> None:
        assert self._head is not None
        delete_checkpoints(self._store, self._prefix, (kept for kept in self._head.kept if kept not in head.kept))
        if not self._orphans_deleted:
            delete_orphans(self._store, self._prefix, head)
            self._orphans_deleted = True

    def _restore_newest(self, head: Head) -> Position:
        broken: dict[Kept, str] = {}
        for kept in head.kept:
            try:
                manifest = self._restore(kept)
            except Broken as error:
                log.error("Checkpoint of step %d cannot be loaded: %s", kept.step, error)  # noqa: TRY400  no bug
                broken[kept] = str(error)
                continue
            if broken:
                self._head = self._ranks.first(partial(self._head_writer.drop, tuple(broken)))
                log.warning("Fell back to the checkpoint of step %d; later steps are trained again", kept.step)
            return manifest.position
        reasons = "; ".join(f"step {kept.step}: {reason}" for kept, reason in broken.items())
        raise BadData(
            f"none of the {len(broken)} checkpoints below {self._prefix} can be loaded ({reasons}): restore the objects, "
            "or start a new job to train from the start"
        )

    def _restore(self, kept: Kept) -> Manifest:
        manifest = manifests.decode(self._ranks.first(partial(self._read_manifest, kept)))
        self._require_same_job(manifest, kept)
        state.begin_restore(self._engine)
        folder_uri = f"{self._prefix}/{kept.folder}"
        self._ranks.each(lambda: fill(self._store, folder_uri, manifest, state.held(self._engine)))
        state.finish_restore(self._engine, manifest.scalars)
        return manifest

    def _read_manifest(self, kept: Kept) -> bytes:
        uri = f"{self._prefix}/{kept.manifest}"
        try:
            body = self._store.get(uri)
            if manifests.digest(body) != kept.sha256:
                raise Broken(f"{uri} has other bytes than were committed")
            manifests.decode(body)
        except ObjectMissing as error:
            raise Broken(f"{uri} is missing") from error
        except Unreadable as error:
            raise Broken(f"{uri} cannot be read: {error}") from error
        return body

    def _require_same_job(self, manifest: Manifest, kept: Kept) -> None:
        uri = f"{self._prefix}/{kept.manifest}"
        if manifest.recipe_digest != self._recipe_digest:
            raise BadConfig(
                f"checkpoint {uri} belongs to another recipe ({manifest.recipe_digest}, this one is "
                f"{self._recipe_digest}): a recipe cannot change while its checkpoints are continued; start a new job"
            )
        if not manifests.same_parameters(manifest.parameters, state.trainable_parameters(self._engine)):
            raise BadConfig(f"checkpoint {uri} has other trainable parameters than the model: did the source change?")
