"""The checkpoints of one generation: resume first, then save beside training.

A resume first fences ``HEAD`` and only then looks for a state to take up, so that no older incarnation can commit behind its back:

1. the newest save that the workers before it left whole in the memory of *all* pods (see staging), unless ``HEAD`` lists a newer one;
   if it was not committed yet, it is now, beside training;
2. the newest checkpoint that ``HEAD`` lists and every rank can read in whole (see restore);
3. another job's checkpoint, where the job continues one;
4. nothing: only a prefix without ``HEAD``, or an empty list in it, is a fresh start, and only while nobody knows of a commit.

Whatever lies in memory and was not taken up is forgotten then, so that no later generation mixes it with what is trained from here on.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from finetune_api.protocol import Checkpoint, Resumed, ResumeSource
from finetune_trainer.checkpoint import deepspeed_state as state
from finetune_trainer.checkpoint.commit import HeadWriter
from finetune_trainer.checkpoint.conditional_writes import require_conditional_writes
from finetune_trainer.checkpoint.fetch import Broken
from finetune_trainer.checkpoint.head import Head, Retention, last_good
from finetune_trainer.checkpoint.lost_bucket import gone_is_lost
from finetune_trainer.checkpoint.manifest import Position, Shard
from finetune_trainer.checkpoint.memory import restore_from_memory
from finetune_trainer.checkpoint.ranks import Ranks
from finetune_trainer.checkpoint.restore import Restored, Restorer
from finetune_trainer.checkpoint.retention import abort_uploads
from finetune_trainer.checkpoint.saving import Outcome, Saver, as_told
from finetune_trainer.checkpoint.shard import Layout, lay_out
from finetune_trainer.checkpoint.staging import SaveId, Seal, Staging
from finetune_trainer.checkpoint.trained_on import Sources
from finetune_trainer.errors import CheckpointsLost, TrainingError
from finetune_trainer.object_store import ObjectStore


class Checkpoints:
    """The checkpoints of one job, as one generation of it sees them. Every method is called by all ranks together.

    Args:
        engine: the DeepSpeed engine.
        store: where checkpoints go.
        prefix: ``s3://bucket/path`` of this job alone.
        generation: this incarnation's number; lower ones can no longer commit once :meth:`resume` has fenced them.
        has_checkpoint: an earlier generation is known to have committed one, so that there must be one.
        retention: which committed checkpoints to keep.
        recipe_digest: what identifies the recipe; a checkpoint of another one is refused.
        sources: the versions of what the job reads; a checkpoint that was trained on others is refused.
        staging: folders for the buffers, the first with room is used.
        resume_from: another job's ``s3://bucket/path``, ``@step`` behind it for a certain one.
        upload_bytes_per_second: a bound on what one rank uploads.
        alive: called about once a second while an update of the engine waits for a copy, or a rollback for saves under way.
    """

    def __init__(
        self,
        *,
        engine: Any,
        store: ObjectStore,
        prefix: str,
        generation: int,
        retention: Retention,
        recipe_digest: str,
        staging: Sequence[Path],
        sources: Sources | None = None,
        has_checkpoint: bool = False,
        resume_from: str | None = None,
        upload_bytes_per_second: int | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._prefix = prefix.rstrip("/")
        self._recipe_digest = recipe_digest
        self._sources = sources or {}
        self._staging_folders = staging
        self._resume_from = resume_from
        self._upload_bytes_per_second = upload_bytes_per_second
        self._alive = alive
        self._generation = generation
        self._ranks = Ranks(TrainingError, Broken)
        self._has_checkpoint = has_checkpoint
        self._head_writer = HeadWriter(
            store=store,
            prefix=self._prefix,
            generation=generation,
            retention=retention,
            has_checkpoint=has_checkpoint,
        )
        self._head = Head(0, generation, "")
        self._steps_ahead = 0
        self._saver: Saver | None = None
        self._hooks: list[Any] = []

    def resume(self) -> tuple[Position, Resumed]:
        """Fence ``HEAD``, restore the newest state there is, and tell which and where from.

        Raises:
            Stale: this or a higher generation has been here before.
            BadConfig: the checkpoints belong to another recipe or model, or the store cannot be used.
            BadData: there are checkpoints, but none of them can be read, or they were trained on what has changed since.
            CheckpointsLost: there were checkpoints, and somebody deleted them.
            NoPermission, StorageUnavailable: what there is cannot be told.
        """
        head = self._ranks.first(self._fence)
        parameters = state.trainable_parameters(self._engine)
        layout = lay_out(state.owned(self._engine), {parameter.name: i for i, parameter in enumerate(parameters)})
        staging = self._open_staging(layout)
        in_memory = restore_from_memory(
            self._engine,
            staging,
            layout,
            head,
            prefix=self._prefix,
            recipe_digest=self._recipe_digest,
            sources=self._sources,
            ranks=self._ranks,
        )
        staging.forget_all_but(in_memory[0] if in_memory else None)
        if in_memory:
            position = in_memory[1].position
            resumed = _resumed(position, ResumeSource.MEMORY, head)
        else:
            head, position, resumed = self._from_storage(head)
        self._head = head
        self._steps_ahead = state.steps_ahead(self._engine)
        self._saver = Saver(
            engine=self._engine,
            store=self._store,
            prefix=self._prefix,
            head=head,
            head_writer=self._head_writer,
            staging=staging,
            layout=layout,
            parameters=parameters,
            bytes_per_second=self._upload_bytes_per_second,
        )
        self._hooks = state.before_each_update(self._engine, self.wait_for_copy)
        if in_memory and not any(kept.step == position.step for kept in head.kept):
            self._saver.adopt(*in_memory)
        return position, resumed

    def save(self, position: Position) -> Checkpoint:
        """Save the engine's state as it is now, wait for it and return the committed checkpoint.

        Raises:
            TrainingError: this save, or one that was under way, failed.
        """
        self.wait()
        self.begin_save(position)
        ended = self.wait()[-1]
        if ended.error is not None:
            raise ended.error
        assert ended.checkpoint is not None
        return ended.checkpoint

    def has_room(self) -> bool:
        """Tell whether this rank could begin a save now. Local."""
        return self._running.has_room()

    def begin_save(self, position: Position) -> None:
        """Save the engine's state as it is now, between two optimizer steps, beside training.

        All ranks must have room. The engine's next optimizer step waits until the state is copied; whoever changes it by other means
        must :meth:`wait_for_copy` first.
        """
        ahead = state.steps_ahead(self._engine)
        assert ahead == self._steps_ahead, f"masters are {ahead - self._steps_ahead} steps ahead"
        self._running.begin(
            Seal(
                prefix=self._prefix,
                save=SaveId(self._head.lineage, position.step, self._generation),
                rank=self._ranks.rank,
                world_size=self._ranks.size,
                zero_stage=state.zero_stage(self._engine),
                recipe_digest=self._recipe_digest,
                position=position,
                scalars=state.scalars(self._engine),
                shard=Shard("", 0, (), ()),
                sources=self._sources,
            )
        )

    def wait_for_copy(self) -> None:
        """Wait until the state of every save that was begun is copied and may change. Local."""
        self._running.wait_for_copy(self._alive)

    def ended(self) -> list[Outcome]:
        """Return the saves that ended since this was asked last. Local."""
        return self._running.outcomes()

    def wait(self, alive: Callable[[], None] = lambda: None) -> list[Outcome]:
        """Wait for the saves under way, call ``alive`` about once a second, and return what :meth:`ended` does."""
        return self._running.wait(alive)

    def grade(self, step: int, metric: float) -> None:
        """Note what the evaluation of a step gave, by which the best is kept. Local: that of rank 0 counts."""
        self._running.grade(step, metric)

    def last_good(self, suspect_from: int) -> int:
        """Return the step to go back to: the newest checkpoint not later than ``suspect_from``, else the oldest; 0 without any."""
        self.wait(self._alive)
        return last_good(self._ranks.first(self._head_writer.kept), suspect_from)

    def roll_back(self, suspect_from: int, skipped: tuple[int, int]) -> int:
        """Void everything later than the last good checkpoint, leave out samples, and return how often that was done.

        The engine's state is of no use any more: the next generation resumes.
        """
        self.wait(self._alive)
        return self._ranks.first(partial(self._head_writer.roll_back, suspect_from, skipped)).rollbacks

    def close(self) -> None:
        """Give up threads and groups; for who makes several in one process."""
        for hook in self._hooks:
            hook.remove()
        if self._saver is not None:
            self._saver.close()
        self._ranks.close()

    @property
    def newest(self) -> Checkpoint | None:
        """The newest committed checkpoint as this generation found it, after what cannot be read was taken off the list."""
        return next((as_told(kept, self._prefix) for kept in self._head.kept), None)

    @property
    def rollbacks(self) -> int:
        """How often the job was rolled back before this generation."""
        return self._head.rollbacks

    @property
    def _running(self) -> Saver:
        assert self._saver is not None, "save before resume"
        return self._saver

    def _fence(self) -> Head:
        with gone_is_lost(self._prefix, has_checkpoint=self._has_checkpoint):
            require_conditional_writes(self._store, self._prefix)
        head = self._head_writer.fence()
        abort_uploads(self._store, self._prefix, self._generation)
        return head

    def _open_staging(self, layout: Layout) -> Staging:
        return self._ranks.each_keeps(
            lambda: Staging(self._staging_folders, rank=self._ranks.rank, size_bytes=layout.size_bytes)
        )

    def _from_storage(self, head: Head) -> tuple[Head, Position, Resumed]:
        restorer = Restorer(engine=self._engine, store=self._store, ranks=self._ranks, sources=self._sources)
        # Of spec, which may have been edited between the making of two pods; what is asked of the store has to be the same on all ranks.
        resume_from = self._ranks.first(lambda: self._resume_from)
        if head.kept:
            restored = restorer.newest(self._prefix, head.kept, recipe_digest=self._recipe_digest)
            if restored.broken:
                head = self._ranks.first(partial(self._head_writer.drop, tuple(restored.broken)))
            source = ResumeSource.STORAGE
        elif self._has_checkpoint:
            raise CheckpointsLost(
                f"{self._prefix} lists no checkpoint, but this job has committed some: somebody deleted them; put HEAD and "
                "what it lists back from the bucket's versions or a backup"
            )
        elif resume_from is not None:
            restored, source = restorer.other_job(resume_from), ResumeSource.OTHER_JOB
        else:
            restored, source = Restored(Position(step=0, samples_consumed=0), {}), ResumeSource.START
        position = _skipping(restored.position, head)
        return head, position, _resumed(position, source, head, restored.fallback)


def _skipping(position: Position, head: Head) -> Position:
    """Return the position with all ranges to leave out: those that were known at the save and those found since."""
    ranges = sorted({*position.skipped_ranges, *head.skipped_ranges})
    return replace(position, skipped_ranges=tuple(ranges))


def _resumed(position: Position, source: ResumeSource, head: Head, fallback: str = "") -> Resumed:
    return Resumed(
        step=position.step,
        source=source,
        fallback=fallback,
        skipped_samples=sum(end - start for start, end in position.skipped_ranges),
        rollbacks=head.rollbacks,
    )
