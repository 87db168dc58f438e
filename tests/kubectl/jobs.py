"""Jobs as an API server has them, at the moments in which somebody looks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from finetune_client import Job
from tests.api.manifests import recipe_job

Json = dict[str, Any]
NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
UID = "0b2a1f6e-0000-4000-8000-000000000001"


def job_body(status: Json | None = None, *, name: str = "sentiment", namespace: str = "team-a", **spec: Any) -> Json:
    """Return a job of two nodes that was made an hour ago."""
    body = copy.deepcopy(recipe_job(name))
    body["spec"] |= {"suspend": False, **spec}
    body["metadata"] |= {
        "namespace": namespace,
        "uid": UID,
        "generation": 1,
        "resourceVersion": "7",
        "creationTimestamp": "2026-01-01T11:00:00Z",
    }
    return body if status is None else body | {"status": status}


def a_job(status: Json | None = None, **rest: Any) -> Job:
    return Job.read(job_body(status, **rest))


def conditions(*told: tuple[str, str, str, str], since: str = "2026-01-01T11:57:00Z") -> Sequence[Json]:
    """Return conditions from (type, status, reason, message)."""
    fields = ("type", "status", "reason", "message")
    return [dict(zip(fields, entry, strict=True)) | {"lastTransitionTime": since} for entry in told]


def a_status(phase: str, *told: tuple[str, str, str, str], **rest: Any) -> Json:
    return {"observedGeneration": 1, "phase": phase, "conditions": conditions(*told), **rest}


def gang(generation: int = 3, *, ready: int = 2, **rest: Any) -> Json:
    return {"generation": generation, "nodes": 2, "ready": ready, "startTime": "2026-01-01T11:40:00Z", **rest}


ATTEMPTS = [
    {
        "generation": 1,
        "startTime": "2026-01-01T11:01:00Z",
        "endTime": "2026-01-01T11:20:00Z",
        "reason": "NodeLost",
        "message": "pod sentiment-0b2a1-1-1 (rank 1) is on node gpu-17, which is not ready",
        "pod": "sentiment-0b2a1-1-1",
        "node": "gpu-17",
        "rank": 1,
        "lastStep": 80,
        "lostSteps": 30,
    },
    {
        "generation": 2,
        "startTime": "2026-01-01T11:21:00Z",
        "endTime": "2026-01-01T11:39:00Z",
        "reason": "WorkerFailed",
        "message": "rank 0 ended with exit code 1: ValueError: \x1b[31mno\x1b[0m",
        "pod": "sentiment-0b2a1-0-1",
        "rank": 0,
        "exitCode": 1,
        "lastStep": 100,
        "lostSteps": 0,
    },
]
PROGRESS = {
    "step": 120,
    "totalSteps": 330,
    "percent": 36,
    "epoch": 0.73,
    "loss": 0.6125,
    "tokensPerSecond": 5120.4,
    "estimatedCompletionTime": "2026-01-01T12:14:00Z",
    "updateTime": "2026-01-01T11:59:58Z",
}
RUNNING = a_status(
    "Running",
    ("Ready", "True", "Running", "generation 3 trains on 2 nodes"),
    ("Reconciling", "False", "Reconciled", "the operator has nothing left to bring about"),
    ("Stalled", "False", "NotStalled", "nobody's help is needed"),
    ("CheckpointsDelayed", "True", "SavePutOff", "saves are due sooner than the store takes them"),
    startTime="2026-01-01T11:01:00Z",
    gang=gang(
        spares=1, avoidNodes=[{"pod": "p", "node": "gpu-17", "reason": "NodeLost", "time": "2026-01-01T11:20:00Z"}]
    ),
    progress=PROGRESS,
    evaluation={"step": 100, "metrics": [{"name": "Accuracy", "value": "0.71"}, {"name": "MacroF1", "value": "0.69"}]},
    checkpoint={
        "step": 110,
        "commitTime": "2026-01-01T11:55:40Z",
        "bytes": 1288490188,
        "uri": "s3://checkpoints/team-a/team-a/sentiment-0b2a1f6e/checkpoints/step-110",
    },
    saves={"savingStep": 120, "savingSince": "2026-01-01T11:59:50Z", "putOff": 1},
    restarts={
        "total": 2,
        "byReason": [
            {"reason": "NodeLost", "count": 1, "used": 1, "windowStart": "2026-01-01T11:20:00Z", "lastStep": 80},
            {"reason": "RolledBack", "count": 1, "lastStep": 100},
        ],
    },
    attempts=ATTEMPTS,
    goodput={
        "percent": 91.234,
        "productiveSeconds": 3200.0,
        "lostSeconds": {"startup": 35.0, "recovery": 62.0, "recomputation": 240.0, "checkpoint": 0.4},
    },
)
STALLED = a_status(
    "Pending",
    ("Ready", "False", "SecretMissing", 'rank 0 of 2: container trainer of pod sentiment-0b2a1-0-1 cannot be configured: secret "s3" not found'),
    ("Reconciling", "False", "Reconciled", "the operator has nothing left to bring about"),
    ("Stalled", "True", "SecretMissing", 'rank 0 of 2: container trainer of pod sentiment-0b2a1-0-1 cannot be configured: secret "s3" not found'),
    gang={"generation": 1, "nodes": 2},
)  # fmt: skip
FAILED = a_status(
    "Failed",
    ("Ready", "False", "BadData", "s3://datasets/reviews.jsonl line 7: label 'good' is not one of negative, positive"),
    ("Stalled", "True", "BadData", "s3://datasets/reviews.jsonl line 7: label 'good' is not one of negative, positive"),
    ("Failed", "True", "BadData", "s3://datasets/reviews.jsonl line 7: label 'good' is not one of negative, positive"),
    startTime="2026-01-01T11:01:00Z",
    completionTime="2026-01-01T11:02:30Z",
    gang=gang(1, ready=0),
)
SUCCEEDED = a_status(
    "Succeeded",
    ("Ready", "True", "Succeeded", "trained 330 steps; the model is at s3://checkpoints/model"),
    ("Complete", "True", "Succeeded", "trained 330 steps; the model is at s3://checkpoints/model"),
    startTime="2026-01-01T11:01:00Z",
    completionTime="2026-01-01T11:57:00Z",
    gang=gang(1, ready=0),
    progress=PROGRESS | {"step": 330, "percent": 100},
    model={"uri": "s3://checkpoints/model"},
)
UNKNOWN = a_status(
    "Running",
    ("Ready", "Unknown", "NoAgentHeard", "no agent of any job has been heard since 11:58; training needs no operator"),
    gang=gang(1),
)
SUSPENDING = a_status(
    "Suspended",
    ("Ready", "False", "Suspending", "2 pods are saving and leaving"),
    ("Suspended", "True", "Suspending", "2 pods are saving and leaving"),
)
SUSPENDED = a_status(
    "Suspended",
    ("Ready", "True", "Suspended", "spec.suspend is true; no pod is kept"),
    ("Suspended", "True", "Suspended", "spec.suspend is true; no pod is kept"),
)
