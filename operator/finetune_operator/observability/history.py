"""What the statuses that this process writes tell of restarts, recoveries and lost time: counted, and logged a line each.

A status is written at once when any of this changes, so the difference between two of them is what happened. What is counted is lost with
the process, as with every counter of Prometheus; status keeps its own sums. Log lines say what happened and never in a worker's words: those
are the tenant's, and stay in the tenant's status.
"""

import logging
from collections.abc import Mapping
from datetime import datetime

from finetune_api.job import FineTuneJob
from finetune_api.status import Goodput, JobPhase, JobStatus
from finetune_operator.observability.metrics import Metrics

logger = logging.getLogger(__name__)

OVER = frozenset({JobPhase.RUNNING, JobPhase.SUCCEEDED})


class History:
    """Takes in every status as it is written."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._recovering_since: dict[str, datetime] = {}  # by job uid

    def take(self, job: FineTuneJob, after: JobStatus, now: datetime) -> None:
        """Take in that ``after`` was written in place of the job's status."""
        before = job.status or JobStatus()
        for reason, count in _restarts(after).items():
            self._metrics.restarts.labels(reason).inc(max(0, count - _restarts(before).get(reason, 0)))
        for kind, seconds in _lost(after.goodput).items():
            self._metrics.lost_seconds.labels(kind).inc(max(0.0, seconds - _lost(before.goodput).get(kind, 0.0)))
        self._time_recovery(job.metadata.uid, before.phase, after.phase, now)
        _log(job, before, after)

    def forget(self, job_uid: str) -> None:
        """Drop what is remembered of a job that is gone."""
        self._recovering_since.pop(job_uid, None)

    def _time_recovery(self, uid: str, before: JobPhase | None, after: JobPhase | None, now: datetime) -> None:
        """Measure from when status said Recovering until it says Running, unless that began under another process."""
        if after == JobPhase.RECOVERING:
            if before != JobPhase.RECOVERING:
                self._recovering_since[uid] = now
            return
        since = self._recovering_since.pop(uid, None)
        if since is not None and after in OVER:
            self._metrics.recovery_seconds.observe((now - since).total_seconds())


def _restarts(status: JobStatus) -> Mapping[str, int]:
    return {entry.reason: entry.count for entry in status.restarts.by_reason} if status.restarts else {}


def _lost(goodput: Goodput | None) -> Mapping[str, float]:
    return goodput.lost_seconds.model_dump() if goodput else {}


def _log(job: FineTuneJob, before: JobStatus, after: JobStatus) -> None:
    name = f"{job.metadata.namespace}/{job.metadata.name}"
    known = {attempt.generation for attempt in before.attempts}
    for attempt in after.attempts:
        if attempt.generation not in known:
            details = {"generation": attempt.generation, "rank": attempt.rank}
            logger.info("%s: generation %d ended: %s", name, attempt.generation, attempt.reason, extra=details)
    if after.phase != before.phase:
        logger.info("%s: %s, was %s", name, after.phase, before.phase or "new")
