"""What the end of a gang costs, when it is the last, and how long the next one waits.

Every reason has a budget of its own, ``recovery.maxRestarts`` in a window: a job that is moved off bad nodes all day must not run out of
restarts for it just when a program fails. A checkpoint of a later step than the last failure's makes its budget whole: a job that gets
further may fail as often as it likes. ``status.restarts.byReason`` holds all that is needed to know what is left, so a new operator process
knows it too. Failures in a row that come soon and without getting further wait 2, 4, 8 … seconds, whatever the reason. What nobody is to
blame for is free. Two things are counted and free: going back to before numbers that were not finite, which the trainer bounds itself, and
giving up a pod whose agent was never heard, for nothing ran in it.

Some failures come back wherever the gang starts from: a program's error three times in a row at the same step, memory twice. They end
the job before the budget does.

Without permission, the store or what lay in it nothing can be trained, and it is not the gang that can mend it. The gang is *held*: its pods
stay, no worker runs, and another generation tries as long after the last as the trouble has lasted, from 15 seconds to 5 minutes. It
never fails by itself. A gang that cannot be placed as a whole (see ``giving_way``) is held in the same way, but gives its pods back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise, takewhile

from finetune_api.status import Attempt, Gang, JobStatus, RestartReason, Restarts
from finetune_operator.plan.checkpoints import last_step
from finetune_operator.plan.failure import Failure
from finetune_operator.plan.observation import Observation, Problem, instant, timestamp
from finetune_operator.plan.resizing import RESIZED
from finetune_operator.plan.silence import NEVER_HEARD
from finetune_operator.render.names import job_prefix

ATTEMPTS_KEPT = 10
QUICK_FAILURE_SECONDS = 60.0
LAST_BACKOFF_SECONDS = 300.0
FIRST_HOLD_SECONDS = 15.0

GIVEN_BACK = frozenset({"PendingDeadlineExceeded", "GaveWay"})  # held without pods, for others need their places
HELD = frozenset({"NoPermission", "StorageUnavailable", "CheckpointsLost"}) | GIVEN_BACK
NEEDS_SOMEBODY = frozenset({"NoPermission", "CheckpointsLost"})  # the store comes back by itself, these do not
NOBODYS_FAULT = frozenset({"Preempted", "PortInUse", RESIZED}) | HELD  # no restart at all: neither used nor counted
COUNTED_ONLY = frozenset({"RolledBack", NEVER_HEARD})
TIMES_AT_ONE_STEP = {"WorkerFailed": 3, "OutOfMemory": 2}
REASONS_KEPT = 32


@dataclass(frozen=True, slots=True)
class Hold:
    """A gang that is held: why, since when, and when it is tried again."""

    reason: str
    message: str
    since: str
    retry_at: datetime

    @property
    def needs_somebody(self) -> bool:
        """Whether it waits for a person rather than for the store."""
        return self.reason in NEEDS_SOMEBODY

    @property
    def gives_back(self) -> bool:
        """Whether it is held without pods."""
        return self.reason in GIVEN_BACK


def with_attempt(observed: Observation, status: JobStatus, gang: Gang, failure: Failure) -> JobStatus:
    """Return ``status`` with the end of ``gang`` among its attempts."""
    resumed = status.resumed if status.resumed and status.resumed.generation == gang.generation else None
    attempt = Attempt(
        generation=gang.generation,
        start_time=gang.start_time,
        end_time=timestamp(observed.now),
        reason=failure.reason,
        message=failure.message[:2048],
        pod=failure.pod or None,
        node=failure.node or None,
        rank=failure.rank,
        exit_code=failure.exit_code,
        signal=failure.signal,
        last_step=last_step(observed, status, gang),
        fallback=(resumed.fallback or None) if resumed else None,
    )
    return status.model_copy(update={"attempts": _abridged([*status.attempts, attempt])[-ATTEMPTS_KEPT:]})


def _abridged(attempts: list[Attempt]) -> list[Attempt]:
    """Keep the first and the newest of a row that is held, so that days of trying do not push out what happened before."""
    row = _row(attempts)
    if attempts[-1].reason not in HELD or len(row) < 3:
        return attempts
    return [*attempts[: -len(row)], row[0], row[-1]]


def _row(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return the newest attempts that ended for the same reason without getting any further."""
    row = [attempts[-1]]
    for attempt in reversed(attempts[:-1]):
        if attempt.reason != row[0].reason or _step(row[0]) > _step(attempt):
            break
        row.insert(0, attempt)
    return row


def _step(attempt: Attempt) -> int:
    return -1 if attempt.last_step is None else attempt.last_step


def uses_budget(failure: Failure) -> bool:
    """Tell whether a failure takes one of its reason's ``recovery.maxRestarts``."""
    return failure.reason not in NOBODYS_FAULT | COUNTED_ONLY


def with_restart(observed: Observation, status: JobStatus, failure: Failure) -> JobStatus:
    """Return ``status`` with one more restart counted, in all and for its reason, unless nobody is to blame."""
    if failure.reason in NOBODYS_FAULT:
        return status
    restarts = status.restarts or Restarts()
    entries = {entry.reason: entry for entry in restarts.by_reason}
    known = entries.get(failure.reason) or RestartReason(reason=failure.reason, count=0)
    counted = known.model_copy(update={"count": known.count + 1, "last_step": status.attempts[-1].last_step})
    entries[failure.reason] = _with_one_used(observed, status, counted, known) if uses_budget(failure) else counted
    by_reason = [entries[reason] for reason in sorted(entries)][:REASONS_KEPT]
    updated = restarts.model_copy(update={"total": restarts.total + 1, "by_reason": by_reason})
    return status.model_copy(update={"restarts": updated})


def _with_one_used(
    observed: Observation, status: JobStatus, counted: RestartReason, known: RestartReason
) -> RestartReason:
    used = _used(observed, status, known)
    start = known.window_start if used else timestamp(observed.now)
    return counted.model_copy(update={"used": used + 1, "window_start": start})


def _used(observed: Observation, status: JobStatus, entry: RestartReason) -> int:
    """Return how much of a reason's budget is used: nothing after its window, or when the job has got further since."""
    if entry.window_start is None or _age(observed, entry.window_start) >= observed.job.spec.recovery.window_seconds:
        return 0
    got_further = (
        entry.last_step is not None and status.checkpoint is not None and status.checkpoint.step > entry.last_step
    )
    return 0 if got_further else entry.used


def _age(observed: Observation, since: str) -> float:
    return (observed.now - instant(since)).total_seconds()


def last_straw(observed: Observation, status: JobStatus, failure: Failure) -> Problem | None:
    """Return why the failure that ended the newest attempt is the job's last, or None: the gang starts again."""
    return _comes_back(observed, status, failure) or _exhausted(observed, status, failure)


def _exhausted(observed: Observation, status: JobStatus, failure: Failure) -> Problem | None:
    entries = status.restarts.by_reason if status.restarts else []
    used = sum(_used(observed, status, entry) for entry in entries if entry.reason == failure.reason)
    limit = observed.job.spec.recovery.max_restarts
    if not uses_budget(failure) or used < limit:
        return None
    return Problem(
        "RestartsExhausted",
        f"gave up after {limit} restarts for {failure.reason} without getting further (recovery.maxRestarts); "
        f"last: {failure.message}",
    )


def _comes_back(observed: Observation, status: JobStatus, failure: Failure) -> Problem | None:
    """Return the failure, if it has come back as often as it may without the job's getting any further."""
    times = TIMES_AT_ONE_STEP.get(failure.reason)
    if times is None:
        return None
    row = [attempt for attempt in status.attempts if attempt.reason not in NOBODYS_FAULT][-times:]
    if len(row) < times or not all(_is_of_its_own(attempt, failure) for attempt in row) or _got_further(observed, row):
        return None
    first = row[0].last_step
    where = "before the first step" if first is None else f"without getting beyond step {first}"
    said = f"{times} times in a row {where}: {failure.message}"
    return Problem(failure.reason, said + _how_to_continue(observed, status, failure))


def _got_further(observed: Observation, row: Sequence[Attempt]) -> bool:
    """Tell whether an attempt may have got beyond the first of its row.

    One that has told of no step proves nothing: scripts need not, and what fails before the first step may be a network's. But a recipe
    that runs out of memory there will do so again.
    """
    if any(attempt.last_step is None for attempt in row):
        same = all(attempt.last_step is None for attempt in row) and row[0].reason == "OutOfMemory"
        return not same or observed.job.spec.recipe is None
    return any(_step(attempt) > _step(row[0]) for attempt in row)


def _is_of_its_own(attempt: Attempt, failure: Failure) -> bool:
    """Tell whether an attempt failed for this reason by itself: the death of an agent is no error of a program."""
    return attempt.reason == failure.reason and (attempt.exit_code is not None or attempt.reason == "OutOfMemory")


def _how_to_continue(observed: Observation, status: JobStatus, failure: Failure) -> str:
    prefix = job_prefix(observed.job)
    if failure.reason != "OutOfMemory" or status.checkpoint is None or prefix is None:
        return ""
    return f"; a new job with more of it goes on from step {status.checkpoint.step} with checkpoint: {{resumeFrom: {prefix}}}"


def find_hold(status: JobStatus, gang: Gang) -> Hold | None:
    """Return why this gang is held, if the one before it ended for want of permission or of the store."""
    newest = status.attempts[-1] if status.attempts else None
    if newest is None or newest.reason not in HELD or newest.generation < gang.generation - 1:
        return None
    first = _row(status.attempts)[0]
    ended = instant(newest.end_time)
    lasted = (ended - instant(first.end_time)).total_seconds()
    wait = min(LAST_BACKOFF_SECONDS, max(FIRST_HOLD_SECONDS, lasted))
    return Hold(newest.reason, newest.message, since=first.end_time, retry_at=ended + timedelta(seconds=wait))


def may_start_at(status: JobStatus, gang: Gang) -> datetime | None:
    """Return when the next incarnation may start, or None for at once: after the first failure in vain, then 2, 4, 8 … seconds later."""
    hold = find_hold(status, gang)
    if hold is not None:
        return hold.retry_at
    attempts = reversed(list(pairwise([None, *status.attempts])))
    in_vain = sum(1 for _ in takewhile(lambda pair: _was_in_vain(*pair), attempts))
    if in_vain < 2:
        return None
    wait = min(LAST_BACKOFF_SECONDS, 2.0 ** (in_vain - 1))
    return instant(status.attempts[-1].end_time) + timedelta(seconds=wait)


def _was_in_vain(before: Attempt | None, attempt: Attempt | None) -> bool:
    """Tell whether an attempt ended soon, without getting further than the one before it, and not because spec asked for it."""
    assert attempt is not None
    got_further = before is not None and _step(attempt) > _step(before)
    return _lasted(attempt) < QUICK_FAILURE_SECONDS and not got_further and attempt.reason != RESIZED


def _lasted(attempt: Attempt) -> float:
    if attempt.start_time is None:  # it never was complete
        return 0.0
    return (instant(attempt.end_time) - instant(attempt.start_time)).total_seconds()
