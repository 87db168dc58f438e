"""Restoring committed checkpoints: down the list from the newest to the first that every rank can read in whole.

"Forbidden" and "unreachable" say nothing about what is there and end it with their own errors; a list of which nothing can be read
ends it too. Nothing here writes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from finetune_trainer.checkpoint import deepspeed_state as state
from finetune_trainer.checkpoint import manifest as manifests
from finetune_trainer.checkpoint.commit import HEAD_KEY
from finetune_trainer.checkpoint.exchange import Exchange
from finetune_trainer.checkpoint.fetch import Broken, Missing, fill
from finetune_trainer.checkpoint.head import Kept, Unreadable, decode
from finetune_trainer.checkpoint.manifest import Manifest, Position
from finetune_trainer.checkpoint.ranks import Ranks
from finetune_trainer.checkpoint.trained_on import Sources, require_same_base, require_unchanged
from finetune_trainer.errors import BadConfig, BadData, CheckpointsLost
from finetune_trainer.object_store import ObjectMissing, ObjectStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored, and why newer checkpoints of the list could not be."""

    position: Position
    broken: dict[Kept, str]

    @property
    def fallback(self) -> str:
        """The reasons as one sentence; empty where the newest was restored."""
        return "; ".join(f"checkpoint of step {kept.step}: {reason}" for kept, reason in self.broken.items())


class Restorer:
    """Puts an engine into the state of a checkpoint. Called by all ranks together. ``sources`` is what the job reads now."""

    def __init__(self, *, engine: Any, store: ObjectStore, ranks: Ranks, sources: Sources) -> None:
        self._engine = engine
        self._store = store
        self._ranks = ranks
        self._sources = sources

    def newest(self, prefix: str, listed: Sequence[Kept], *, recipe_digest: str | None) -> Restored:
        """Restore the first checkpoint of the list that can be read.

        Args:
            prefix: where the checkpoints lie.
            listed: at least one, newest first.
            recipe_digest: what the checkpoints must belong to; None for those of another job.

        Raises:
            BadConfig: a checkpoint belongs to another recipe or model.
            BadData: none can be read, or the job reads other data, or another model, than it was trained on.
            CheckpointsLost: they are this job's, and of each an object is missing.
            NoPermission, StorageUnavailable: what there is cannot be told.
        """
        broken: dict[Kept, str] = {}
        all_missing = True
        for kept in listed:
            try:
                manifest = self._restore(prefix, kept, recipe_digest)
            except Broken as error:
                log.error("Checkpoint of step %d cannot be loaded: %s", kept.step, error)  # noqa: TRY400  no bug
                broken[kept] = str(error)
                all_missing = all_missing and isinstance(error, Missing)
                continue
            if broken:
                log.warning("Fell back to the checkpoint of step %d; later steps are trained again", kept.step)
            return Restored(manifest.position, broken)
        none = (
            f"none of the {len(broken)} checkpoints below {prefix} can be loaded "
            f"({'; '.join(f'step {kept.step}: {reason}' for kept, reason in broken.items())})"
        )
        if all_missing and recipe_digest is not None:
            raise CheckpointsLost(
                f"{none}: somebody deleted them, or a rule of the bucket did; put what HEAD lists back from the bucket's versions "
                "or a backup"
            )
        raise BadData(f"{none}: restore the objects, or start a new job to train from the start")

    def other_job(self, source: str) -> Restored:
        """Restore the checkpoint ``s3://bucket/path[@step]`` of another job, without writing there.

        Raises:
            BadConfig: there is none, or it has other parameters than this job's model.
        """
        prefix, _, step = source.partition("@")
        prefix = prefix.rstrip("/")
        listed = self._ranks.first(partial(self._listed, prefix))
        wanted = [kept for kept in listed if not step or kept.step == int(step)]
        if not wanted:
            steps = ", ".join(str(kept.step) for kept in listed) or "none"
            raise BadConfig(
                f"spec.checkpoint.resumeFrom: there is no checkpoint {f'of step {step} ' if step else ''}below {prefix}; "
                f"steps there: {steps}"
            )
        try:
            return self.newest(prefix, wanted, recipe_digest=None)
        except BadData:  # a job that still runs has deleted them meanwhile, perhaps, and listed others
            newer = [kept for kept in self._ranks.first(partial(self._listed, prefix)) if kept not in wanted]
            if step or not newer:
                raise
            return self.newest(prefix, newer, recipe_digest=None)

    def _listed(self, prefix: str) -> tuple[Kept, ...]:
        uri = f"{prefix}/{HEAD_KEY}"
        try:
            return decode(self._store.get(uri)).kept
        except ObjectMissing:
            raise BadConfig(
                f"spec.checkpoint.resumeFrom: {uri} does not exist; name the folder of a job, "
                "as its status.checkpoint.uri has it before /checkpoints"
            ) from None
        except Unreadable as error:
            raise BadConfig(f"spec.checkpoint.resumeFrom: {uri} is not a HEAD that can be read ({error})") from error

    def _restore(self, prefix: str, kept: Kept, recipe_digest: str | None) -> Manifest:
        manifest = manifests.decode(self._ranks.first(partial(self._read_manifest, prefix, kept)))
        self._require_same_job(manifest, f"{prefix}/{kept.manifest}", recipe_digest)
        state.begin_restore(self._engine)
        self._read(f"{prefix}/{kept.folder}", manifest)
        state.finish_restore(self._engine, manifest.scalars, own=recipe_digest is not None)
        return manifest

    def _read(self, folder_uri: str, manifest: Manifest) -> None:
        held, ranks = state.held(self._engine), self._ranks
        as_it_was = (manifest.world_size, manifest.zero_stage) == (ranks.size, state.zero_stage(self._engine))
        if ranks.size == 1 or (as_it_was and not state.is_replicated(self._engine)):
            ranks.each(lambda: fill(self._store, folder_uri, manifest, held))
            return
        exchange = Exchange(store=self._store, folder_uri=folder_uri, manifest=manifest, held=held, ranks=ranks)
        if state.is_replicated(self._engine):
            exchange.to_all()
        else:
            exchange.to_holders()

    def _read_manifest(self, prefix: str, kept: Kept) -> bytes:
        uri = f"{prefix}/{kept.manifest}"
        try:
            body = self._store.get(uri)
            if manifests.digest(body) != kept.sha256:
                raise Broken(f"{uri} has other bytes than were committed")
            manifests.decode(body)
        except ObjectMissing as error:
            raise Missing(f"{uri} is missing") from error
        except Unreadable as error:
            raise Broken(f"{uri} cannot be read: {error}") from error
        return body

    def _require_same_job(self, manifest: Manifest, uri: str, recipe_digest: str | None) -> None:
        if recipe_digest is not None and manifest.recipe_digest != recipe_digest:
            raise BadConfig(
                f"checkpoint {uri} belongs to another recipe ({manifest.recipe_digest}, this one is {recipe_digest}): "
                "a recipe cannot change while its checkpoints are continued; start a new job"
            )
        require = require_unchanged if recipe_digest is not None else require_same_base
        require(manifest.sources, self._sources, uri)
        if not manifests.same_parameters(manifest.parameters, state.trainable_parameters(self._engine)):
            raise BadConfig(f"checkpoint {uri} has other trainable parameters than the model: did the source change?")
