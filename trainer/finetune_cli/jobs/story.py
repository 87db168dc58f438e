"""``status``: what a job does or waits for, what is wrong and what follows from that, what was lost, and what ended when.

All of it is said by the object's own status; what a reason means comes from the one table of reasons.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_api.reasons import REASONS
from finetune_api.status import Condition, ConditionType, JobPhase, LostSeconds, RestartReason
from finetune_cli.jobs.listing import summary
from finetune_cli.jobs.times import age, duration, until
from finetune_cli.output import say, show_table, size
from finetune_client import Job

AT_EASE = {"Starting", "Running", "Suspending", "Suspended", "Succeeded"}
STYLES = {JobPhase.SUCCEEDED: "green", JobPhase.RUNNING: "green", JobPhase.FAILED: "red", JobPhase.RECOVERING: "yellow"}
LABEL_WIDTH = 12


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is not as it should be, of a reason that the table may explain."""

    condition: Condition
    then: str
    to_do: str


def troubles(job: Job) -> list[Trouble]:
    """Return what somebody who looks at a job should know of, the gravest first, each cause once."""
    kinds = (ConditionType.FAILED, ConditionType.STALLED, ConditionType.READY)
    gravest = next((found for kind in kinds if (found := _bad(job, kind))), None)
    beside = (ConditionType.CHECKPOINTS_DELAYED, ConditionType.CHECKPOINT_FALLBACK, ConditionType.STRAGGLER)
    conditions = [gravest, *(_bad(job, kind) for kind in beside)]
    return [_trouble(condition) for condition in conditions if condition is not None]


def _bad(job: Job, kind: ConditionType) -> Condition | None:
    condition = job.condition(kind)
    if condition is None:
        return None
    if kind is ConditionType.READY:
        return condition if condition.status != "True" and condition.reason not in AT_EASE else None
    return condition if condition.status == "True" else None


def _trouble(condition: Condition) -> Trouble:
    reason = REASONS.get(condition.reason)
    return Trouble(condition, reason.then if reason else "", reason.to_do if reason else "")


def show_status(job: Job, now: datetime) -> None:
    """Print it for people."""
    phase = job.status.phase
    say(
        f"{job.namespace}/{job.name}: {phase or 'not seen by the operator yet'}",
        style=STYLES.get(phase, "") if phase else "",
    )
    ready, wrong = job.condition(ConditionType.READY), troubles(job)
    if ready is not None and ready.message not in [trouble.condition.message for trouble in wrong]:
        say(ready.message)
    if phase is not None and not job.is_seen:
        say("the operator has not looked at the newest change of its spec yet")
    facts = list(_facts(job, now))
    if facts:
        say("")
    for label, text in facts:
        say(f"{label:<{LABEL_WIDTH}}{text}")
    for trouble in wrong:
        _show_trouble(trouble, now)
    _show_attempts(job, now)


def _facts(job: Job, now: datetime) -> Iterator[tuple[str, str]]:
    status = job.status
    if status.progress is not None:
        yield "Trained", _trained(job)
        if status.progress.estimated_completion_time and not job.is_final:
            yield "Ends", f"in about {until(status.progress.estimated_completion_time, now)}"
    if status.evaluation is not None:
        values = ", ".join(f"{metric.name} {metric.value}" for metric in status.evaluation.metrics)
        yield "Evaluated", f"step {status.evaluation.step}: {values}"
    yield from _saved(job, now)
    if status.gang is not None and not job.is_final:
        yield "Gang", _gang(job)
    yield from _cost(job)
    if status.completion_time is not None:
        yield "Ended", f"{age(status.completion_time, now)} ago{_ran_for(job)}"


def _saved(job: Job, now: datetime) -> Iterator[tuple[str, str]]:
    kept, saves, model = job.status.checkpoint, job.status.saves, job.status.model
    if kept is not None:
        yield "Checkpoint", f"step {kept.step}, {age(kept.commit_time, now)} ago, {size(kept.bytes)}, {kept.uri}"
    if saves is not None and saves.saving_step is not None:
        yield "Saving", f"step {saves.saving_step}, for {age(saves.saving_since, now)}"
    if model is not None:
        yield "Model", model.uri


def _cost(job: Job) -> Iterator[tuple[str, str]]:
    goodput, restarts = job.status.goodput, job.status.restarts
    if goodput is not None:
        yield "Goodput", f"{goodput.percent:.4g} %{_lost(goodput.lost_seconds)}"
    if restarts is not None:
        entries = ", ".join(_restarts(entry, job.max_restarts) for entry in restarts.by_reason)
        yield "Restarts", f"{restarts.total}: {entries}"


def _trained(job: Job) -> str:
    progress = job.status.progress
    assert progress is not None
    of = f" of {progress.total_steps}" if progress.total_steps else ""
    percent = f" ({progress.percent} %)" if progress.percent is not None else ""
    parts = [f"{progress.step}{of} steps{percent}"]
    if progress.epoch is not None:
        parts.append(f"epoch {progress.epoch:.4g}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4g}")
    if progress.tokens_per_second is not None and not job.is_final:
        parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    return ", ".join(parts)


def _gang(job: Job) -> str:
    gang = job.status.gang
    assert gang is not None
    spares = f", spares standing by: {gang.spares}" if gang.spares is not None else ""
    avoided = ", ".join(f"{node.node} ({node.reason})" for node in gang.avoid_nodes)
    return f"attempt {gang.generation}, {gang.ready} of {gang.nodes} nodes run{spares}" + (
        f"; keeps away from {avoided}" if avoided else ""
    )


def _lost(lost: LostSeconds) -> str:
    named = (
        (lost.startup, "starting"),
        (lost.recovery, "recovering"),
        (lost.recomputation, "steps done again"),
        (lost.checkpoint, "saving"),
    )
    parts = [f"{duration(seconds)} {name}" for seconds, name in named if seconds >= 1]
    return f"; lost {', '.join(parts)}" if parts else ""


def _restarts(entry: RestartReason, limit: int) -> str:
    budget = f" ({entry.used} of {limit} used)" if entry.window_start is not None else " (free)"
    return f"{entry.count} {entry.reason}{budget}"


def _ran_for(job: Job) -> str:
    start, end = job.status.start_time, job.status.completion_time
    if start is None or end is None:
        return ""
    return f", after {duration((datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds())}"


def _show_trouble(trouble: Trouble, now: datetime) -> None:
    condition = trouble.condition
    since = age(condition.last_transition_time, now)
    holds = {"True": "", "False": "not ", "Unknown": "perhaps not "}[condition.status]
    say("")
    say(f"{holds}{condition.type}: {condition.reason}, for {since}", style="bold")
    say(f"  {condition.message}")
    if trouble.then:
        say(f"  next:  {trouble.then}")
    if trouble.to_do:
        say(f"  to do: {trouble.to_do}")


def _show_attempts(job: Job, now: datetime) -> None:
    if not job.status.attempts:
        return
    say("")
    rows = [
        (
            str(ended.generation),
            f"{age(ended.end_time, now)} ago",
            ended.reason,
            _text(ended.rank),
            ended.node or "",
            _text(ended.last_step),
            _text(ended.lost_steps),
            ended.message,
        )
        for ended in job.status.attempts
    ]
    show_table(
        ("ATTEMPT", "ENDED", "REASON", "RANK", "NODE", "AT STEP", "LOST STEPS", "MESSAGE"), rows, wraps="MESSAGE"
    )


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


def status_to_json(job: Job) -> dict[str, Any]:
    """Return it as a document; its parts have the form that they have in the object's status."""
    status = job.status
    ready = job.condition(ConditionType.READY)
    return summary(job) | {
        "reason": ready.reason if ready else None,
        "message": ready.message if ready else None,
        "ready": ready.status if ready else "Unknown",
        "observed": job.is_seen,
        "suspend": bool(job.spec.get("suspend")),
        "troubles": [
            {
                "condition": trouble.condition.type,
                "status": trouble.condition.status,
                "reason": trouble.condition.reason,
                "message": trouble.condition.message,
                "since": trouble.condition.last_transition_time,
                "then": trouble.then,
                "toDo": trouble.to_do,
            }
            for trouble in troubles(job)
        ],
        "prefix": job.prefix,
        "maxRestarts": job.max_restarts,
        "restartsByReason": [entry.to_wire() for entry in status.restarts.by_reason] if status.restarts else [],
        "attempts": [attempt.to_wire() for attempt in status.attempts],
        **{
            name: part.to_wire() if part else None
            for name, part in (
                ("gang", status.gang),
                ("evaluation", status.evaluation),
                ("checkpoint", status.checkpoint),
                ("saves", status.saves),
                ("resumed", status.resumed),
                ("goodput", status.goodput),
                ("model", status.model),
            )
        },
    }
