"""Training, read from top to bottom: prepare, resume, step by step, evaluate, hand over the result.

Every rank runs the same lines in the same order, and whatever decides between branches (a stop, a due checkpoint, a loss that is not a
number) is first summed over all ranks, once per step, before the optimizer step. So all ranks do the same thing at the same step.

A checkpoint is saved before the evaluation of its step: a crash while evaluating costs the evaluation, not training, and the resumed run
evaluates that step first. Saving goes on beside training (see autosave); only leaving waits for it.

A loss or gradient that is not finite spoils nothing that was committed. The job goes back to its newest checkpoint, as a new generation,
and leaves out the samples of the step, a bounded number of times. So it does when the loss jumps (see spikes), except that there a
checkpoint of the steps right before is not trusted either, and that after the last time it trains on.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch

from finetune_api.protocol import Evaluation, Metric, Phase, Progress, ResumeSource
from finetune_api.recipe import LossSpike, MetricName, Precision
from finetune_trainer import spikes
from finetune_trainer.autosave import Autosave
from finetune_trainer.busy import Busy
from finetune_trainer.checkpoint.checkpoints import Checkpoints
from finetune_trainer.checkpoint.manifest import Position
from finetune_trainer.data.batches import cut, deal, random_seed
from finetune_trainer.errors import BadConfig, NumericFailure, RolledBack, SavedOnRequest
from finetune_trainer.evaluation import evaluate, retention_of, value_of
from finetune_trainer.export import gather_weights, upload_model, write_model
from finetune_trainer.export_planning import write_export_plan
from finetune_trainer.job import Job
from finetune_trainer.model_card import render_model_card
from finetune_trainer.optimization import (
    OVERFLOWS_LIMIT,
    NotFinite,
    accumulate,
    is_emulated,
    learning_rate,
    require_finite,
    update,
)
from finetune_trainer.preparation import Prepared, prepare
from finetune_trainer.progress import Reporter
from finetune_trainer.ranks import Ranks
from finetune_trainer.scratch import unfinished_folder
from finetune_trainer.stop import StopRequest

SOURCES = {
    ResumeSource.START: "nothing was saved yet",
    ResumeSource.MEMORY: "from this pod's memory",
    ResumeSource.STORAGE: "from storage",
    ResumeSource.OTHER_JOB: "from another job's checkpoint",
}

ROLLBACKS_LIMIT = 5
"""How often a job goes back before it counts as one that does not converge."""

PACE_MEMORY = 0.9
"""Weight of the past in the running mean of seconds per step, from which the remaining time is told."""


def train(job: Job, ranks: Ranks, reporter: Reporter, stop: StopRequest) -> None:
    """Train the job's recipe to its end.

    Raises:
        TrainingError: for every known reason to end earlier, on all ranks the same.
    """
    reporter.phase(Phase.INITIALIZING)
    precision = job.recipe.training.precision
    if is_emulated(precision, ranks.device):
        reporter.say(
            f"this pod's processor only emulates {precision.value}: training.precision FP32 is many times faster on it"
        )
    run = Run(job, ranks, reporter, stop, prepare(job, ranks, reporter.alive))
    write_export_plan(job, ranks, run.prepared, reporter.alive)
    run.resume()
    while True:
        if run.evaluation_is_due() and not run.stop_agreed:
            run.evaluate()
        if run.stop_agreed:
            run.leave()
        if run.is_finished():
            break
        run.step()
        if run.save_agreed or run.is_finished():
            run.autosave.begin(run.position)
    run.autosave.finish()  # a generation that was replaced meanwhile ends here, and leaves the result to the other
    run.export()


@dataclass(frozen=True, slots=True)
class Computed:
    """What all ranks computed in one step: the loss per target of the global batch, and what it took, also of this rank alone."""

    loss: float
    tokens: int
    started: float
    busy_seconds: float


class Run:
    """One generation's way through the steps."""

    def __init__(self, job: Job, ranks: Ranks, reporter: Reporter, stop: StopRequest, prepared: Prepared) -> None:
        self.job, self.ranks, self.reporter, self.stop, self.prepared = job, ranks, reporter, stop, prepared
        file = job.file.checkpoint
        self.checkpoints = Checkpoints(
            engine=prepared.engine,
            store=prepared.store,
            prefix=job.storage.prefix,
            generation=job.generation,
            has_checkpoint=job.has_checkpoint,
            retention=retention_of(file),
            recipe_digest=job.recipe_digest,
            sources=prepared.sources.versions(job.recipe),
            staging=(job.staging, job.scratch / "staging"),
            resume_from=file.resume_from,
            upload_bytes_per_second=job.upload_bytes_per_second,
            alive=partial(reporter.phase, Phase.CHECKPOINTING),  # until the step is done
        )
        self.autosave = Autosave(job, self.checkpoints, ranks, reporter)
        self.position = Position(step=0, samples_consumed=0)
        self.metrics: list[Metric] = []
        self.save_agreed = False
        self.stop_agreed = False
        self._evaluated_step = 0
        self._overflows = 0
        self._pace: float | None = None

    def resume(self) -> None:
        """Take up where the newest state that can be had left off."""
        self.position, resumed = self.checkpoints.resume()
        if resumed.source == ResumeSource.OTHER_JOB:
            self._require_same_batches()
            self.position = replace(self.position, recent_losses=())  # of other data, perhaps
        self.autosave.resumed(self.position.step, resumed.source)
        total = self.prepared.total_steps
        if self.checkpoints.newest is not None:  # not what status has, after a fallback or a rollback
            self.reporter.newest_checkpoint(self.checkpoints.newest)
        self.reporter.resumed(resumed)
        self.reporter.say(
            f"generation {self.job.generation}: starting after step {self.position.step} of {total}"
            f" ({SOURCES[resumed.source]})"
        )
        self.reporter.phase(Phase.TRAINING, self.position.step)
        if resumed.source == ResumeSource.OTHER_JOB:
            self.autosave.begin(self.position)  # that job may delete it at any time
        self.stop_agreed = self.ranks.sum([float(self.stop.requested)])[0] > 0  # preparing may have taken long

    def _require_same_batches(self) -> None:
        consumed, size = self.position.samples_consumed, self.job.recipe.training.global_batch_size
        if consumed != self.position.step * size:
            raise BadConfig(
                f"spec.checkpoint.resumeFrom: that job used {consumed} samples in {self.position.step} steps, "
                f"so globalBatchSize must be {consumed // max(1, self.position.step)} here too, not {size}"
            )

    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.position.step >= self.prepared.total_steps

    def step(self) -> None:
        """Train on one global batch.

        Raises:
            RolledBack: its numbers are not finite, or jump; the next generation leaves it out.
        """
        computed = self._compute()
        loss = self._agree(computed.loss)
        step, recipe = self.position.step + 1, self.job.recipe
        rate = learning_rate(recipe, self.position.step, self.prepared.total_steps)
        try:
            if recipe.training.precision != Precision.FP16:  # whose scaler steps over a loss that is not finite
                require_finite("loss", loss, step)
            self._look_for_a_spike(loss, step)
            done = update(self.prepared.engine, recipe, rate, step)
        except NotFinite as what:
            self._roll_back(str(what), suspect_steps=0)
        self._count_overflows(done.skipped, step)
        self.position = replace(
            self.position,
            step=step,
            samples_consumed=self.position.samples_consumed + recipe.training.global_batch_size,
            recent_losses=spikes.remembered(self.position.recent_losses, loss),
        )
        self.reporter.phase(Phase.TRAINING, step, busy_seconds=computed.busy_seconds)
        self._tell(replace(computed, loss=loss), rate, done.gradient_norm)

    def _look_for_a_spike(self, loss: float, step: int) -> None:
        """Go back if the loss jumps, before the weights follow it.

        Raises:
            RolledBack: it did.
        """
        recent = self.position.recent_losses
        if self.job.recipe.training.on_loss_spike == LossSpike.IGNORE or not spikes.is_spike(loss, recent):
            return
        what = (
            f"the loss of step {step} is {loss:.3g}, after at most {max(recent):.3g} in the {len(recent)} steps before"
        )
        if self.checkpoints.rollbacks < ROLLBACKS_LIMIT:
            self._roll_back(what, suspect_steps=spikes.SUSPECT_STEPS)
        self.reporter.say(f"{what}; going back was tried {ROLLBACKS_LIMIT} times: training goes on")

    def _roll_back(self, what: str, *, suspect_steps: int) -> NoReturn:
        """Leave, so that the next generation starts from a checkpoint before this step's samples and those of the steps suspected.

        Raises:
            RolledBack: unless that was tried too often.
            NumericFailure: it was.
        """
        done = self.checkpoints.rollbacks
        if done >= ROLLBACKS_LIMIT:
            raise NumericFailure(
                f"{what}; going back and leaving out the samples was tried {done} times: lower "
                "training.optimizer.learningRate, use BF16 instead of FP16, or look at the data"
            )
        self.reporter.phase(Phase.CHECKPOINTING)  # a store that is slow now is no rank that hangs
        position, plan = self.position, self.prepared.plan
        suspect_from = max(0, position.step - suspect_steps)
        back_to = self.checkpoints.last_good(suspect_from)
        first = plan.numbers(max(back_to, suspect_from), position.skipped_ranges)[0]
        last = plan.numbers(position.step, position.skipped_ranges)[-1]
        count = self.checkpoints.roll_back(suspect_from, (int(first), int(last) + 1))
        raise RolledBack(
            f"{what}; going back to step {back_to} and leaving out samples {first} to {last} "
            f"(time {count} of {ROLLBACKS_LIMIT})"
        )

    def _compute(self) -> Computed:
        """Make this rank's forward and backward passes; the loss is this rank's share of it."""
        started = time.monotonic()
        prepared, step, seed = self.prepared, self.position.step, self.job.recipe.training.seed
        task, feed, engine = prepared.task, prepared.train, prepared.engine
        samples = prepared.plan.chosen(step, self.position.skipped_ranges)
        micro_batches = cut(samples, feed.data.lengths(samples), prepared.plan.micro_batch_size)
        targets = task.count_targets(feed.data, samples)
        turns = deal(len(micro_batches), ranks=self.ranks.size, rank=self.ranks.rank)
        total, busy = torch.zeros((), device=feed.device), Busy(feed.device)
        engine.train()
        for turn, index in enumerate(turns, start=1):
            torch.manual_seed(random_seed("dropout", seed, step, -1 if index is None else index))
            with busy.loading():
                batch = feed.batch(None if index is None else micro_batches[index])
            batch = batch.to(feed.device)  # waits for the backward pass before it, and so for peers
            with busy.computing(alone=self.job.recipe.zero.stage < 3):
                loss = task.loss(engine(**batch.inputs).logits, batch.labels)
            accumulate(engine, loss, targets=targets, ranks=self.ranks.size)
            total += loss.detach()
            if turn < len(turns):
                engine.step()  # only counts the round
        loss_share = self.ranks.read(total) / targets
        return Computed(loss_share, int(feed.data.lengths(samples).sum()), started, busy.seconds())

    def _agree(self, loss_share: float) -> float:
        """Sum this step's flags and the loss over the ranks; return the loss."""
        flags = self.autosave.flags(self.position.step + 1, evaluates=self._evaluates(self.position.step + 1))
        loss, stops, *saves = self.ranks.sum([loss_share, float(self.stop.requested), *flags])
        self.save_agreed, self.stop_agreed = self.autosave.agreed(saves), stops > 0
        return loss

    def _count_overflows(self, skipped: bool, step: int) -> None:
        self._overflows = self._overflows + 1 if skipped else 0
        if self._overflows >= OVERFLOWS_LIMIT:
            raise NumericFailure(
                f"FP16 overflowed in {self._overflows} steps in a row up to step {step}; use training.precision BF16"
                " or lower training.optimizer.learningRate"
            )

    def _tell(self, computed: Computed, rate: float, gradient_norm: float) -> None:
        seconds = time.monotonic() - computed.started
        self._pace = seconds if self._pace is None else PACE_MEMORY * self._pace + (1 - PACE_MEMORY) * seconds
        step, total = self.position.step, self.prepared.total_steps
        self.reporter.progress(
            Progress(
                step=step,
                total_steps=total,
                epoch=self.prepared.plan.epoch(step),
                loss=computed.loss,
                learning_rate=rate,
                gradient_norm=gradient_norm,
                tokens_per_second=computed.tokens / seconds,
                remaining_seconds=self._pace * (total - step),
            )
        )

    def evaluation_is_due(self) -> bool:
        """Whether this step is to be evaluated and was not yet."""
        return self.position.step != self._evaluated_step and self._evaluates(self.position.step)

    def _evaluates(self, step: int) -> bool:
        wish = self.job.recipe.evaluation
        if wish is None:
            return False
        return step >= self.prepared.total_steps or (wish.every_steps is not None and step % wish.every_steps == 0)

    def evaluate(self) -> None:
        """Measure the model as it is; a stop that arrives meanwhile ends it without a result."""
        wish, feed = self.job.recipe.evaluation, self.prepared.evaluation
        assert wish is not None
        assert feed is not None
        self.reporter.phase(Phase.EVALUATING)
        metrics = evaluate(
            self.prepared.engine,
            feed,
            names=wish.metrics,
            vocabulary=self.prepared.config.vocab_size,
            micro_batch_size=self.prepared.plan.micro_batch_size,
            ranks=self.ranks,
            should_stop=lambda: self.stop.requested,
            alive=self.reporter.alive,
        )
        if metrics is None:
            self.stop_agreed = True
            return
        self.metrics, self._evaluated_step = metrics, self.position.step
        self.reporter.evaluation(Evaluation(step=self.position.step, metrics=metrics))
        best_by = self.job.file.checkpoint.keep_best
        if best_by is not None:
            self.checkpoints.grade(self.position.step, value_of(metrics, MetricName(best_by)))
        self.reporter.phase(Phase.TRAINING)

    def leave(self) -> None:
        """Leave because we were asked to, with this step saved.

        Raises:
            SavedOnRequest: always.
        """
        step = self.position.step
        if step == 0:
            raise SavedOnRequest("stopped on request before the first step; there is nothing to save yet")
        self.autosave.commit(self.position)
        raise SavedOnRequest(f"stopped on request; step {step} is saved")

    def export(self) -> None:
        """Write and upload the result."""
        self.reporter.phase(Phase.FINISHING)
        uri = f"{self.job.storage.prefix}/model"
        weights = gather_weights(self.prepared.engine.module, keep=self.ranks.rank == 0, alive=self.reporter.alive)
        self.ranks.once(lambda: self._upload(weights, uri))
        self.reporter.model(uri)

    def _upload(self, weights: dict[str, torch.Tensor], uri: str) -> None:
        prepared = self.prepared
        card = render_model_card(
            self.job,
            model=prepared.sources.model,
            train=prepared.sources.train,
            evaluation=prepared.sources.evaluation,
            metrics=self.metrics,
            step=self.position.step,
            total_steps=prepared.total_steps,
        )
        with unfinished_folder(self.job.scratch) as folder:
            write_model(
                folder,
                source=prepared.model_folder,
                weights=weights,
                config=prepared.config,
                task=prepared.task,
                tokenizer=prepared.tokenizer,
                card=card,
            )
            upload_model(folder, uri, prepared.store, self.reporter.alive)
