"""Training, read from top to bottom: prepare, resume, step by step, evaluate, hand over the result.

Every rank runs the same lines in the same order, and whatever decides between branches (a stop, a due checkpoint, a loss that is not a
number) is first summed over all ranks, once per step, before the optimizer step. So all ranks do the same thing at the same step.

A checkpoint is saved before the evaluation of its step: a crash while evaluating costs the evaluation, not training, and the resumed run
evaluates that step first.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from finetune_api.protocol import Evaluation, Metric, Phase, Progress
from finetune_api.recipe import Precision
from finetune_trainer.checkpoint.checkpoints import Checkpoints
from finetune_trainer.checkpoint.manifest import Position
from finetune_trainer.data.batches import deal, random_seed
from finetune_trainer.errors import NumericFailure, SavedOnRequest
from finetune_trainer.evaluation import evaluate
from finetune_trainer.export import gather_weights, upload_model, write_model
from finetune_trainer.export_planning import write_export_plan
from finetune_trainer.job import Job
from finetune_trainer.model_card import render_model_card
from finetune_trainer.optimization import OVERFLOWS_LIMIT, accumulate, learning_rate, require_finite, update
from finetune_trainer.preparation import Prepared, prepare
from finetune_trainer.progress import Reporter
from finetune_trainer.ranks import Ranks
from finetune_trainer.stop import StopRequest

DEFAULT_INTERVAL_SECONDS = 300
"""How often a checkpoint is committed when the job does not say."""

PACE_MEMORY = 0.9
"""Weight of the past in the running mean of seconds per step, from which the remaining time is told."""


def train(job: Job, ranks: Ranks, reporter: Reporter, stop: StopRequest) -> None:
    """Train the job's recipe to its end.

    Raises:
        TrainingError: for every known reason to end earlier, on all ranks the same.
    """
    reporter.phase(Phase.INITIALIZING)
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
        if run.save_agreed or run.stop_agreed or run.is_finished():
            run.save()
    run.export()


@dataclass(frozen=True, slots=True)
class Computed:
    """What all ranks computed in one step: the loss per target of the global batch, and what it took."""

    loss: float
    tokens: int
    started: float


class Run:
    """One generation's way through the steps."""

    def __init__(self, job: Job, ranks: Ranks, reporter: Reporter, stop: StopRequest, prepared: Prepared) -> None:
        self.job, self.ranks, self.reporter, self.stop, self.prepared = job, ranks, reporter, stop, prepared
        self.checkpoints = Checkpoints(
            engine=prepared.engine,
            store=prepared.store,
            prefix=job.storage.prefix,
            generation=job.generation,
            keep=job.file.checkpoint.keep,
            recipe_digest=job.recipe_digest,
        )
        self.position = Position(step=0, samples_consumed=0)
        self.metrics: list[Metric] = []
        self.save_agreed = False
        self.stop_agreed = False
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()
        self._evaluated_step = 0
        self._overflows = 0
        self._pace: float | None = None

    def resume(self) -> None:
        """Take up where the last committed checkpoint left off."""
        found = self.checkpoints.resume()
        if found is not None:
            self.position, self._saved_step = found, found.step
        self._saved_at = time.monotonic()
        total = self.prepared.total_steps
        self.reporter.say(f"generation {self.job.generation}: starting after step {self.position.step} of {total}")
        self.reporter.phase(Phase.TRAINING, self.position.step)
        self.stop_agreed = self.ranks.sum([float(self.stop.requested)])[0] > 0  # preparing may have taken long

    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.position.step >= self.prepared.total_steps

    def step(self) -> None:
        """Train on one global batch."""
        computed = self._compute()
        loss = self._agree(computed.loss)
        step, recipe = self.position.step + 1, self.job.recipe
        if recipe.training.precision != Precision.FP16:  # whose scaler steps over a loss that is not finite
            require_finite("loss", loss, step)
        rate = learning_rate(recipe, self.position.step, self.prepared.total_steps)
        done = update(self.prepared.engine, recipe, rate, step)
        self._count_overflows(done.skipped, step)
        self.position = replace(
            self.position,
            step=step,
            samples_consumed=self.position.samples_consumed + recipe.training.global_batch_size,
        )
        self.reporter.phase(Phase.TRAINING, step)
        self._tell(replace(computed, loss=loss), rate, done.gradient_norm)

    def _compute(self) -> Computed:
        """Make this rank's forward and backward passes; the loss is this rank's share of it."""
        started = time.monotonic()
        prepared, step, seed = self.prepared, self.position.step, self.job.recipe.training.seed
        task, feed, engine = prepared.task, prepared.train, prepared.engine
        micro_batches = prepared.plan.micro_batches(step)
        samples = np.concatenate(micro_batches)
        targets = task.count_targets(feed.data, samples)
        turns = deal(len(micro_batches), ranks=self.ranks.size, rank=self.ranks.rank)
        total = torch.zeros((), device=feed.device)
        engine.train()
        for turn, index in enumerate(turns, start=1):
            torch.manual_seed(random_seed("dropout", seed, step, -1 if index is None else index))
            batch = feed.batch(None if index is None else micro_batches[index])
            loss = task.loss(engine(**batch.inputs).logits, batch.labels)
            accumulate(engine, loss, targets=targets, ranks=self.ranks.size)
            total += loss.detach()
            if turn < len(turns):
                engine.step()  # only counts the round
        return Computed(float(total) / targets, int(feed.data.lengths(samples).sum()), started)

    def _agree(self, loss_share: float) -> float:
        """Sum this step's flags and the loss over the ranks; return the loss."""
        save = self.ranks.rank == 0 and self._save_is_due()
        loss, saves, stops = self.ranks.sum([loss_share, float(save), float(self.stop.requested)])
        self.save_agreed, self.stop_agreed = saves > 0, stops > 0
        return loss

    def _save_is_due(self) -> bool:
        """Whether this step should be saved; only rank 0's clock counts."""
        wish = self.job.file.checkpoint
        if wish.interval_steps is not None:
            return (self.position.step + 1) % wish.interval_steps == 0
        return time.monotonic() - self._saved_at >= (wish.interval_seconds or DEFAULT_INTERVAL_SECONDS)

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

    def save(self) -> None:
        """Commit a checkpoint of this step."""
        self.reporter.phase(Phase.CHECKPOINTING)
        self.reporter.checkpoint(self.checkpoints.save(self.position))
        self._saved_step, self._saved_at = self.position.step, time.monotonic()
        self.reporter.phase(Phase.TRAINING)

    def evaluation_is_due(self) -> bool:
        """Whether this step is to be evaluated and was not yet."""
        wish, step = self.job.recipe.evaluation, self.position.step
        if wish is None or step == self._evaluated_step:
            return False
        return self.is_finished() or (wish.every_steps is not None and step % wish.every_steps == 0)

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
        self.reporter.phase(Phase.TRAINING)

    def leave(self) -> None:
        """Leave because we were asked to, with this step saved.

        Raises:
            SavedOnRequest: always.
        """
        step = self.position.step
        if step == 0:
            raise SavedOnRequest("stopped on request before the first step; there is nothing to save yet")
        if self._saved_step != step:
            self.save()
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
        with tempfile.TemporaryDirectory(dir=self.job.scratch, prefix=".model-") as name:
            folder = Path(name)
            write_model(
                folder,
                weights=weights,
                config=prepared.config,
                task=prepared.task,
                tokenizer=prepared.tokenizer,
                card=card,
            )
            upload_model(folder, uri, prepared.store, self.reporter.alive)
