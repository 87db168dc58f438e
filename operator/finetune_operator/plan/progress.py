"""What rank 0 tells of training, folded into status."""

import math
from datetime import timedelta

from finetune_api.protocol import Evaluation, Progress, Report
from finetune_api.status import (
    Gang,
    JobCheckpoint,
    JobEvaluation,
    JobProgress,
    JobStatus,
    MetricValue,
    ModelResult,
)
from finetune_operator.plan.checkpoints import fold_resumed, fold_saves
from finetune_operator.plan.goodput import account
from finetune_operator.plan.observation import Observation, instant, timestamp


def fold_reports(observed: Observation, gang: Gang, status: JobStatus) -> JobStatus:
    """Return ``status`` with what the gang's node 0 reports of this generation. Other pods' claims of progress are not believed."""
    report = observed.said_by_first(gang)
    if report is None:
        return status
    updates: dict[str, object] = {}
    if report.progress is not None:
        updates["progress"] = _progress(report.progress, status.progress, observed)
    if report.evaluation is not None:
        updates["evaluation"] = _evaluation(report.evaluation)
    status = status.model_copy(update=updates | _storage(report))
    if report.saves is not None:
        status = status.model_copy(update={"saves": fold_saves(status, report.saves)})
    if report.resumed is not None:
        status = fold_resumed(status, gang, report.resumed)
    return account(observed, status, gang, report)


def _progress(new: Progress, known: JobProgress | None, observed: Observation) -> JobProgress:
    remaining = new.remaining_seconds
    folded = JobProgress(
        step=new.step,
        total_steps=new.total_steps,
        percent=min(100, 100 * new.step // new.total_steps) if new.total_steps else None,
        epoch=_rounded(new.epoch),
        loss=_rounded(new.loss),
        learning_rate=_rounded(new.learning_rate),
        gradient_norm=_rounded(new.gradient_norm),
        tokens_per_second=_rounded(new.tokens_per_second),
        update_time=timestamp(observed.now),
    )
    if known is not None and folded.model_dump(exclude=_TIMES) == known.model_dump(exclude=_TIMES):
        return known
    if remaining is None:
        return folded
    eta = timestamp(observed.now + timedelta(seconds=max(0.0, min(remaining, 315360000))))
    return folded.model_copy(update={"estimated_completion_time": eta})


_TIMES = {"update_time", "estimated_completion_time"}


def _evaluation(new: Evaluation) -> JobEvaluation:
    values = {metric.name[:64]: f"{metric.value:.4g}" for metric in new.metrics[:32]}  # the list is keyed by name
    metrics = [MetricValue(name=name, value=value) for name, value in values.items()]
    return JobEvaluation(step=new.step, metrics=metrics)


def _storage(report: Report) -> dict[str, object]:
    updates: dict[str, object] = {}
    if report.checkpoint is not None:
        updates["checkpoint"] = JobCheckpoint(
            step=report.checkpoint.step,
            commit_time=timestamp(instant(report.checkpoint.commit_time)),
            bytes=report.checkpoint.size_bytes,
            uri=report.checkpoint.uri,
        )
    if report.model is not None:
        updates["model"] = ModelResult(uri=report.model.uri)
    return updates


def _rounded(value: float | None) -> float | None:
    """Five significant digits: what people read, and small enough that noise alone is no change worth a write."""
    if value is None or value == 0:
        return value
    rounded = float(f"{value:.5g}")
    return rounded if math.isfinite(rounded) else value
