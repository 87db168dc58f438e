"""Saving beside training: each rank has background threads, and those of all ranks finish a save together.

What a rank owns changes in the optimizer step and nowhere else. So it is copied into a free buffer (see staging) while the passes of the
next step are computed; that step waits for the copy, and this is all that training stands still for. Behind it the buffer is hashed
and sealed at once, though saves before it may still be on their way. One thread uploads it and tells the others through a group
of its own; when all have uploaded, rank 0 creates the manifest and swaps ``HEAD``. Saves finish in the order they began, at most as
many as there are buffers are under way, and the uploads read the buffers directly, so memory is bounded by what was allocated before
the first step.

A save fails on all ranks or on none, with the same error. Whatever is wrong with the store costs that save and nothing else: the
next one that is due tries again. Only a generation that has been replaced ends (``ENDS_TRAINING``).
"""

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from finetune_api.protocol import Checkpoint
from finetune_trainer.checkpoint import deepspeed_state as state
from finetune_trainer.checkpoint import manifest as manifests
from finetune_trainer.checkpoint.commit import CHECKPOINTS_KEY, HeadWriter, create, new_nonce
from finetune_trainer.checkpoint.head import Head, Kept
from finetune_trainer.checkpoint.manifest import MANIFEST_NAME, Json, Manifest, Parameter, Shard
from finetune_trainer.checkpoint.ranks import Ranks
from finetune_trainer.checkpoint.retention import delete_folders, delete_orphans
from finetune_trainer.checkpoint.shard import Copy, Layout, chunk_digests
from finetune_trainer.checkpoint.staging import Seal, Slot, Staging
from finetune_trainer.errors import CheckpointsLost, Stale, TrainingError
from finetune_trainer.object_store import ObjectStore

log = logging.getLogger(__name__)

T = TypeVar("T")

ENDS_TRAINING = (Stale,)
"""Nothing that this generation trains from here on could be committed. Every other failure costs that save and nothing else.

Also a bucket or a ``HEAD`` that somebody deleted, and answers that are no S3 server's: what training holds may then be the only copy
there is, to end it would lose that too, and the next save finds out whether it was mended. Before training the same errors do end it,
and so does a bucket to which its result cannot be written.
"""

NICENESS = 10  # of what hashes and uploads, where training needs the processor too
BEAT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a save ended: with a checkpoint or an error. ``seconds`` counts from when it began.

    The copy took ``copy_seconds``, None where an earlier generation made it, and training stood still for ``stall_seconds`` of them.
    """

    step: int
    seconds: float
    copy_seconds: float | None = None
    stall_seconds: float = 0.0
    checkpoint: Checkpoint | None = None
    error: TrainingError | None = None


@dataclass(slots=True)
class _UnderWay:
    slot: Slot
    copied: Future[float] | Future[None]
    outcome: Future[Outcome]
    stall_seconds: float = 0.0


class Saver:
    """One rank's hand in the saves of a generation, from its fence on. All ranks call all but :meth:`outcomes` together.

    Args:
        engine: the DeepSpeed engine.
        store: where checkpoints go.
        prefix: ``s3://bucket/path`` of this job alone.
        head: ``HEAD`` as this generation's fence left it.
        head_writer: used on rank 0.
        staging: this rank's buffers.
        layout: what goes into them.
        parameters: every trainable parameter.
        bytes_per_second: a bound on what this rank uploads.
    """

    def __init__(
        self,
        *,
        engine: Any,
        store: ObjectStore,
        prefix: str,
        head: Head,
        head_writer: HeadWriter,
        staging: Staging,
        layout: Layout,
        parameters: tuple[Parameter, ...],
        bytes_per_second: int | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._prefix = prefix
        self._head = head
        self._head_writer = head_writer
        self._staging = staging
        self._layout = layout
        self._parameters = parameters
        self._bytes_per_second = bytes_per_second
        self._ranks = Ranks(TrainingError)
        self._attempt = f"g{head.generation}-{self._ranks.first(new_nonce)}"
        self._saves = 0
        self._orphans_deleted = False
        self._failed: list[str] = []
        self._is_lost = False
        self._under_way: deque[_UnderWay] = deque()
        self._ungraded: dict[int, float] = {}  # by step: what HEAD does not have yet; touched by the background alone
        self._grading: Future[None] | None = None
        self._copier = ThreadPoolExecutor(1, "copier")  # training may wait for it, so it is as urgent
        self._sealer = ThreadPoolExecutor(1, "sealer", initializer=_yield_to_training)
        self._thread = ThreadPoolExecutor(1, "saver", initializer=_yield_to_training)

    def has_room(self) -> bool:
        """Tell whether this rank has a buffer for another save."""
        return sum(not save.outcome.done() for save in self._under_way) < len(self._staging.slots)

    def begin(self, seal: Seal) -> None:
        """Save the numbers as they are now, beside training. Until :meth:`wait_for_copy` they must not change.

        ``seal`` says what they are; its shard is filled in here. There must be room on every rank.
        """
        started = time.monotonic()
        slot = self._staging.free({save.slot for save in self._under_way if not save.outcome.done()})
        assert slot is not None, "a save without room"
        slot.break_seal()
        copy = Copy(self._layout, state.owned(self._engine), slot.buffer)
        copied = self._copier.submit(copy.run)
        sealed = self._sealer.submit(self._seal, slot, seal, copied)
        self._submit(slot, seal, copied, sealed)
        self._under_way[-1].stall_seconds = time.monotonic() - started

    def wait_for_copy(self, alive: Callable[[], None]) -> None:
        """Wait until the numbers of every save that was begun are copied and may change; call ``alive`` about once a second.

        Raises:
            Exception: they could not be.
        """
        for save in self._under_way:
            started = time.monotonic()
            _wait(save.copied, alive)
            save.stall_seconds += time.monotonic() - started
            save.copied.result()

    def adopt(self, slot: Slot, seal: Seal) -> None:
        """Finish the save of an earlier generation whose numbers are in a buffer on every rank."""
        self._submit(slot, seal, _done(None), _done(seal.shard))

    def grade(self, step: int, metric: float) -> None:
        """Note beside training, after the saves under way, what the evaluation of a step gave. What is not finite is no grade."""
        if self._ranks.rank == 0 and math.isfinite(metric):
            self._grading = self._thread.submit(self._grade, step, metric)

    def outcomes(self) -> list[Outcome]:
        """Return how saves ended that were not returned before.

        Raises:
            Exception: a bug in the background.
        """
        ended = []
        while self._under_way and self._under_way[0].outcome.done():
            save = self._under_way.popleft()
            outcome, copy_seconds = save.outcome.result(), save.copied.result()
            ended.append(replace(outcome, copy_seconds=copy_seconds, stall_seconds=save.stall_seconds))
        return ended

    def wait(self, alive: Callable[[], None]) -> list[Outcome]:
        """Wait for all that is under way, so that nobody else has a hand on ``HEAD``, and return what :meth:`outcomes` does."""
        for future in (*(save.outcome for save in self._under_way), *([self._grading] if self._grading else ())):
            alive()
            _wait(future, alive)
        return self.outcomes()

    def close(self) -> None:
        """Give up the threads, once what they are at is done, and the group."""
        for thread in (self._thread, self._sealer, self._copier):  # each waits for those behind it
            thread.shutdown(cancel_futures=True)
        self._ranks.close()

    def _submit(self, slot: Slot, seal: Seal, copied: Future[float] | Future[None], sealed: Future[Shard]) -> None:
        self._saves += 1
        folder = f"{CHECKPOINTS_KEY}step-{seal.position.step}/{self._attempt}-{self._saves}/"
        future = self._thread.submit(self._finish, slot, seal, folder, sealed, time.monotonic())
        self._under_way.append(_UnderWay(slot, copied, future))

    def _finish(self, slot: Slot, seal: Seal, folder: str, sealed: Future[Shard], started: float) -> Outcome:
        step, described = seal.position.step, sealed.result()
        try:
            if self._is_lost:
                self._ranks.first(self._head_writer.require_own)
            kept = self._ranks.collect(
                lambda: self._upload(slot, seal, folder, described), partial(self._commit, seal, folder)
            )
        except TrainingError as error:
            self._failed.append(folder)
            self._is_lost = isinstance(
                error, CheckpointsLost
            )  # then nothing more is uploaded that could not be committed
            return Outcome(step, time.monotonic() - started, error=error)
        self._is_lost = False
        return Outcome(step, time.monotonic() - started, checkpoint=as_told(kept, self._prefix))

    def _seal(self, slot: Slot, seal: Seal, copied: Future[float] | Future[None]) -> Shard:
        """Hash the buffer once it is filled, and say what it holds."""
        copied.result()
        name = f"rank-{seal.rank:05}.safetensors"
        shard = Shard(name, self._layout.size_bytes, chunk_digests(slot.buffer), self._layout.intervals)
        try:
            slot.seal(replace(seal, shard=shard))
        except (
            OSError
        ) as error:  # a full disk: it is committed all the same, but the next incarnation cannot use this buffer
            log.warning("Step %d is not kept in memory for the next start: %s", seal.position.step, error)
        return shard

    def _upload(self, slot: Slot, seal: Seal, folder: str, shard: Shard) -> tuple[Any, Json]:
        """Return what rank 0 must find equal on all ranks, and the description of what this rank uploaded."""
        uri = f"{self._prefix}/{folder}{shard.name}"
        self._store.upload(slot.buffer, uri, digests=shard.sha256, bytes_per_second=self._bytes_per_second)
        return (seal.save, seal.position), manifests.shard_to_json(shard)

    def _commit(self, seal: Seal, folder: str, parts: list[tuple[Any, Json]]) -> Kept:
        assert all(same == (seal.save, seal.position) for same, _ in parts), f"ranks save different steps: {parts}"
        manifest = Manifest(
            position=seal.position,
            generation=self._head.generation,
            world_size=seal.world_size,
            zero_stage=seal.zero_stage,
            recipe_digest=seal.recipe_digest,
            sources=seal.sources,
            parameters=self._parameters,
            scalars=seal.scalars,
            shards=tuple(manifests.shard_from_json(shard) for _, shard in parts),
        )
        body = manifests.encode(manifest)
        create(self._store, f"{self._prefix}/{folder}{MANIFEST_NAME}", body)
        kept = Kept(
            step=seal.position.step,
            manifest=folder + MANIFEST_NAME,
            sha256=manifests.digest(body),
            size_bytes=manifest.size_bytes + len(body),
            commit_time=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        )
        self._settled(self._head_writer.commit(kept, grades=tuple(self._ungraded.items())))
        self._ungraded.clear()
        if not self._orphans_deleted:
            delete_orphans(self._store, self._prefix, self._head)
            self._orphans_deleted = True
        return kept

    def _grade(self, step: int, metric: float) -> None:
        self._ungraded[step] = metric
        try:
            self._settled(self._head_writer.grade(step, metric))
        except (
            TrainingError
        ) as error:  # the next commit takes it along, or meets the same error and says so on all ranks
            log.warning("The evaluation of step %d could not be noted in HEAD yet: %s", step, error)
        else:
            del self._ungraded[step]

    def _settled(self, head: Head) -> None:
        """Delete what a swap took off the list, and what saves that failed before it have left."""
        listed = {kept.folder for kept in head.kept}  # a save whose commit nobody confirmed may be in it
        ended = [*(kept.folder for kept in self._head.kept), *self._failed]
        delete_folders(self._store, self._prefix, (folder for folder in ended if folder not in listed))
        self._head, self._failed = head, []


def as_told(kept: Kept, prefix: str) -> Checkpoint:
    """Return a committed checkpoint as status has it."""
    uri = f"{prefix}/{kept.folder.rstrip('/')}"
    return Checkpoint(step=kept.step, uri=uri, size_bytes=kept.size_bytes, commit_time=kept.commit_time)


def _wait(future: Future[Any], alive: Callable[[], None]) -> None:
    while not future.done():
        try:
            future.exception(BEAT_SECONDS)
        except NotYet:
            alive()


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def _yield_to_training() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # on Linux a thread has a niceness of its own
