"""What the end of a gang costs, and how long the next one waits.

A failure uses one restart of the budget, and quick ones in a row wait 2, 4, 8 … seconds. What nobody is to blame for is free. So is
going back to before numbers that were not finite, which the trainer bounds itself; it is counted.

Without permission or without the store nothing can be trained, and it is not the gang that can mend it. The gang is *held*: its pods
stay, no worker runs, and another generation tries as long after the last as the trouble has lasted, from 15 seconds to 5 minutes. It
never fails by itself. A gang that cannot be placed as a whole (see ``giving_way``) is held in the same way, but gives its pods back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.status import Attempt, Gang, JobStatus, RestartReason, Restarts
from finetune_operator.plan.checkpoints import last_step
from finetune_operator.plan.failure import Failure
from finetune_operator.plan.observation import Observation, instant, timestamp

ATTEMPTS_KEPT = 10
QUICK_FAILURE_SECONDS = 60.0
LAST_BACKOFF_SECONDS = 300.0
FIRST_HOLD_SECONDS = 15.0

GIVEN_BACK = frozenset({"PendingDeadlineExceeded", "GaveWay"})  # held without pods, for others need their places
HELD = frozenset({"NoPermission", "StorageUnavailable"}) | GIVEN_BACK
NEEDS_SOMEBODY = frozenset({"NoPermission"})  # the store comes back by itself, a permission does not
NOBODYS_FAULT = frozenset({"Preempted", "PortInUse"}) | HELD  # no restart at all: neither used nor counted
COUNTED_ONLY = frozenset({"RolledBack"})


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
    """Tell whether a failure takes one of ``recovery.maxRestarts``."""
    return failure.reason not in NOBODYS_FAULT | COUNTED_ONLY


def with_restart(observed: Observation, status: JobStatus, failure: Failure) -> JobStatus:
    """Return ``status`` with one more restart counted, unless nobody is to blame: in all, for its reason and in the present window."""
    if failure.reason in NOBODYS_FAULT:
        return status
    restarts = status.restarts or Restarts()
    counts = {entry.reason: entry.count for entry in restarts.by_reason}
    counts[failure.reason] = counts.get(failure.reason, 0) + 1
    by_reason = [RestartReason(reason=reason, count=count) for reason, count in sorted(counts.items())][:32]
    restarts = restarts.model_copy(update={"total": restarts.total + 1, "by_reason": by_reason})
    if uses_budget(failure):
        restarts = _with_one_used(observed, restarts)
    return status.model_copy(update={"restarts": restarts})


def _with_one_used(observed: Observation, restarts: Restarts) -> Restarts:
    if restarts.window_start is None or _window_is_over(observed, restarts):
        return restarts.model_copy(update={"used": 1, "window_start": timestamp(observed.now)})
    return restarts.model_copy(update={"used": restarts.used + 1})


def restarts_left(observed: Observation, status: JobStatus) -> int:
    """Return how many restarts the budget still allows in its window."""
    restarts = status.restarts or Restarts()
    used = 0 if restarts.window_start is None or _window_is_over(observed, restarts) else restarts.used
    return observed.job.spec.recovery.max_restarts - used


def _window_is_over(observed: Observation, restarts: Restarts) -> bool:
    assert restarts.window_start is not None
    age = (observed.now - instant(restarts.window_start)).total_seconds()
    return age >= observed.job.spec.recovery.window_seconds


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


def backoff_seconds(observed: Observation, status: JobStatus, gang: Gang) -> float:
    """Return how long the next incarnation still has to wait: 0 after the first quick failure, then 2, 4, 8 … seconds."""
    hold = find_hold(status, gang)
    if hold is not None:
        return max(0.0, (hold.retry_at - observed.now).total_seconds())
    quick = 0
    for attempt in reversed(status.attempts):
        if _lasted(attempt) >= QUICK_FAILURE_SECONDS:
            break
        quick += 1
    if quick < 2:
        return 0.0
    wait = min(LAST_BACKOFF_SECONDS, 2.0 ** (quick - 1))
    return max(0.0, wait - (observed.now - instant(status.attempts[-1].end_time)).total_seconds())


def _lasted(attempt: Attempt) -> float:
    if attempt.start_time is None:  # it never was complete
        return 0.0
    return (instant(attempt.end_time) - instant(attempt.start_time)).total_seconds()
