"""When to save, and what is told of it. The loop asks once per step, and all ranks do what rank 0 says.

Rank 0's clock counts, and what the job wished when rank 0 started: an edit may come while the ranks start.

A save that is due while both staging buffers are on their way is put off to the first step that finds room: training never waits for
storage. A save that fails, for whatever reason, is told and tried again when the next is due. Only another generation's having taken
over ends training, on all ranks at the same step.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from finetune_api.protocol import Phase, ResumeSource, Saves
from finetune_trainer import saves
from finetune_trainer.checkpoint.checkpoints import Checkpoints
from finetune_trainer.checkpoint.manifest import Position
from finetune_trainer.checkpoint.saving import ENDS_TRAINING, Outcome
from finetune_trainer.errors import TrainingError
from finetune_trainer.job import Job
from finetune_trainer.progress import Reporter
from finetune_trainer.ranks import Ranks

DEFAULT_INTERVAL_SECONDS = 300
"""How often a checkpoint is committed when the job does not say."""

FIRST_AUTOMATIC_SECONDS = 60
"""When ``auto`` saves first, to learn what a save costs."""


class Autosave:
    """The saves of one generation."""

    def __init__(self, job: Job, checkpoints: Checkpoints, ranks: Ranks, reporter: Reporter) -> None:
        self._wish = job.file.checkpoint
        self._checkpoints = checkpoints
        self._ranks = ranks
        self._reporter = reporter
        self._told = Saves()
        self._interval_seconds = float(self._wish.interval_seconds or DEFAULT_INTERVAL_SECONDS)
        if self._wish.interval_auto:
            self._interval_seconds = FIRST_AUTOMATIC_SECONDS
        self._began_at = time.monotonic()
        self._is_owed = False
        self._fatal: TrainingError | None = None
        self.saved_step: int | None = None
        """The newest step that is committed or on its way."""

    def resumed(self, step: int, source: ResumeSource) -> None:
        """Start counting from here."""
        self._began_at = time.monotonic()
        if source in {ResumeSource.STORAGE, ResumeSource.MEMORY}:
            self.saved_step = step

    def flags(self, step: int, *, evaluates: bool) -> list[float]:
        """Return what this rank says of a save after ``step``: it is due (rank 0), there is no room, saving must end training."""
        self.collect()
        is_due = self._ranks.rank == 0 and self._is_due(step, evaluates=evaluates)
        return [float(is_due), float(not self._checkpoints.has_room()), float(self._fatal is not None)]

    def agreed(self, flags: Sequence[float]) -> bool:
        """Tell from the sums of the flags whether to save after this step.

        Raises:
            TrainingError: saving must end training.
        """
        is_due, is_full, is_over = (flag > 0 for flag in flags)
        if is_over:
            self.finish()
        if is_due and is_full and not self._is_owed:
            self._tell(saves.put_off(self._told))
        self._is_owed = is_due and is_full
        return is_due and not is_full

    def begin(self, position: Position) -> None:
        """Save this step beside training."""
        self._reporter.phase(Phase.CHECKPOINTING)
        while not self._checkpoints.has_room():
            self._settle(self._checkpoints.wait(self._reporter.alive))
        self._checkpoints.begin_save(position)
        self.saved_step, self._began_at, self._is_owed = position.step, time.monotonic(), False
        self._tell(saves.begun(self._told, step=position.step, now=_now()))
        self._reporter.phase(Phase.TRAINING)

    def commit(self, position: Position) -> None:
        """Save this step, unless that was begun, and wait until it is committed.

        Raises:
            TrainingError: it could not be.
        """
        if self.saved_step != position.step:
            self.begin(position)
        self._reporter.phase(Phase.CHECKPOINTING)
        ended = self._checkpoints.wait(self._reporter.alive)
        self._settle(ended)
        if ended and ended[-1].error is not None:
            raise ended[-1].error

    def finish(self) -> None:
        """Wait for the saves under way.

        Raises:
            TrainingError: saving must end training.
        """
        self._settle(self._checkpoints.wait(self._reporter.alive))
        if self._fatal is not None:
            raise self._fatal

    def collect(self) -> None:
        """Tell of the saves that ended meanwhile."""
        self._settle(self._checkpoints.ended())

    def _is_due(self, step: int, *, evaluates: bool) -> bool:
        if self._is_owed or (evaluates and self._wish.keep_best is not None):
            return True
        if self._wish.interval_steps is not None:
            return step % self._wish.interval_steps == 0
        return time.monotonic() - self._began_at >= self._interval_seconds

    def _settle(self, ended: Sequence[Outcome]) -> None:
        for outcome in ended:
            told = saves.ended(self._told, outcome, _now())
            if outcome.checkpoint is not None:
                self._reporter.checkpoint(outcome.checkpoint)
                told = self._recommend(told, outcome)
            elif outcome.error is not None:
                self._reporter.say(f"checkpoint of step {outcome.step} not committed: {outcome.error}")
                if self.saved_step == outcome.step:
                    self.saved_step = None
                if isinstance(outcome.error, ENDS_TRAINING):
                    self._fatal = self._fatal or outcome.error
            self._tell(told)

    def _recommend(self, told: Saves, outcome: Outcome) -> Saves:
        if outcome.copy_seconds is None:  # an earlier generation's
            return told
        best = saves.best_interval_seconds(
            copy_seconds=outcome.copy_seconds, commit_seconds=outcome.seconds, ranks=self._ranks.size
        )
        if self._wish.interval_auto:
            self._interval_seconds = best
        return replace(told, recommended_interval_seconds=round(best, 1))

    def _tell(self, told: Saves) -> None:
        self._told = told
        self._reporter.saves(told)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
