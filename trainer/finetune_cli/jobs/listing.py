"""``get``: one row a job."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from finetune_cli.jobs.times import age, until
from finetune_cli.output import show_table
from finetune_client import Job

COLUMNS = ("NAME", "PHASE", "PROGRESS", "STEP", "LOSS", "NODES", "RESTARTS", "ETA", "AGE")


def show_jobs(jobs: Sequence[Job], now: datetime, *, namespaces: bool) -> None:
    """Print jobs as a table, with their namespaces where there are several."""
    if namespaces:
        rows = ((job.namespace, *_row(job, now)) for job in jobs)
        show_table(("NAMESPACE", *COLUMNS), rows)
    else:
        show_table(COLUMNS, (_row(job, now) for job in jobs))


def _row(job: Job, now: datetime) -> tuple[str, ...]:
    status = job.status
    progress, gang = status.progress, status.gang
    return (
        job.name,
        status.phase or "",
        f"{progress.percent}%" if progress and progress.percent is not None else "",
        str(progress.step) if progress else "",
        f"{progress.loss:.4g}" if progress and progress.loss is not None else "",
        f"{gang.ready}/{gang.nodes}" if gang else "",
        str(status.restarts.total) if status.restarts else "",
        until(progress.estimated_completion_time, now) if progress and not job.is_final else "",
        age(job.metadata.creation_timestamp, now),
    )


def jobs_to_json(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return jobs as a document."""
    return {"jobs": [summary(job) for job in jobs]}


def summary(job: Job) -> dict[str, Any]:
    """Return what is said of a job wherever it is a part of a document."""
    status = job.status
    return {
        "namespace": job.namespace,
        "name": job.name,
        "uid": job.metadata.uid,
        "creationTime": job.metadata.creation_timestamp,
        "phase": status.phase,
        "startTime": status.start_time,
        "completionTime": status.completion_time,
        "nodes": status.gang.nodes if status.gang else None,
        "nodesReady": status.gang.ready if status.gang else None,
        "restarts": status.restarts.total if status.restarts else 0,
        "progress": status.progress.to_wire() if status.progress else None,
    }
