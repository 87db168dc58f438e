"""What rank 0 tells of checkpoints: folded into status, said as conditions, and what the end of a generation has lost.

How saving goes changes with every save, so ``status.saves`` alone is not worth a write of its own (see ``status_writer``), and the
conditions are made to stand still: they turn when something begins or ends, and keep the words they began with meanwhile.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.protocol import Phase, Resumed, Saves
from finetune_api.status import Attempt, Condition, Gang, JobResumed, JobSaves, JobStatus
from finetune_operator.plan.observation import Observation, instant, timestamp

_CAMEL_CASE = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")
PUT_OFF = "SavePutOff"


@dataclass(frozen=True, slots=True)
class Aspect:
    """Whether one condition holds (None: nobody knows), and why."""

    holds: bool | None
    reason: str
    message: str


NOT_DELAYED = Aspect(holds=False, reason="NotDelayed", message="no save fails or has to wait")
NO_FALLBACK = Aspect(
    holds=False,
    reason="NoFallback",
    message="the gang started from the newest checkpoint, or there is a newer one by now",
)


# How saving goes.


def fold_saves(status: JobStatus, saves: Saves) -> JobSaves:
    """Return what node 0 says of saving, as status holds it. ``status`` has the newest commit already."""
    failing = _utc(saves.failing_since)
    interval = saves.recommended_interval_seconds
    return JobSaves(
        saving_step=saves.saving_step,
        saving_since=_utc(saves.saving_since),
        put_off=saves.put_off,
        failing_since=_earliest(status, failing) if failing else None,
        reason=_reason(saves.reason) if failing else "",
        message=saves.message if failing else "",
        stall_seconds=_rounded(saves.stall_seconds),
        commit_seconds=_rounded(saves.commit_seconds),
        recommended_interval_seconds=None if interval is None else round(interval),
    )


def _earliest(status: JobStatus, failing: str) -> str:
    """A new generation finds the store as the one before it left it: unless something was committed meanwhile, it began to fail then."""
    known = status.saves.failing_since if status.saves else None
    if known is None or instant(known) >= instant(failing):
        return failing
    healed = status.checkpoint is not None and instant(status.checkpoint.commit_time) > instant(known)
    return failing if healed else known


def after_a_generation(status: JobStatus, *, at_rest: bool = False) -> JobStatus:
    """Return ``status`` when the generation that saved is over: nothing is on its way.

    That nothing can be committed stays true until another generation says otherwise, or until the job is ``at_rest``.
    """
    if status.saves is None:
        return status
    gone: dict[str, object] = {"saving_step": None, "saving_since": None, "put_off": 0}
    if at_rest:
        gone |= {"failing_since": None, "reason": "", "message": ""}
    return status.model_copy(update={"saves": status.saves.model_copy(update=gone)})


def delay(known: Condition | None, status: JobStatus) -> Aspect:
    """Return whether checkpoints are delayed: nothing can be committed, or a save that was due has to wait."""
    saves = status.saves or JobSaves()
    if saves.failing_since is not None:
        began = f"nothing could be committed since {saves.failing_since}: "
        return _steady(known, Aspect(holds=True, reason=saves.reason, message=began + saves.message), began)
    overloaded = (
        known is not None and known.status == "True" and known.reason == PUT_OFF and saves.saving_step is not None
    )
    if saves.put_off or overloaded:  # a save has its turn while the next one may have to wait again: that is no change
        return _put_off(status)
    return NOT_DELAYED


def _put_off(status: JobStatus) -> Aspect:
    message = (
        "saves are due sooner than the store takes them: one was put off because those before it are still on their way"
    )
    if status.saves is not None and status.saves.recommended_interval_seconds:
        message += "; status.saves.recommendedIntervalSeconds is the interval that would lose least"
    return Aspect(holds=True, reason=PUT_OFF, message=message)


def _steady(known: Condition | None, aspect: Aspect, began: str) -> Aspect:
    """Keep the words of a condition that holds for the same reason since the same time; ``status.saves`` has the newest."""
    same = known is not None and known.status == "True" and known.reason == aspect.reason
    if known is None or not same or not known.message.startswith(began):
        return aspect
    return Aspect(holds=True, reason=aspect.reason, message=known.message)


# Where a generation starts.


def fold_resumed(status: JobStatus, gang: Gang, resumed: Resumed) -> JobStatus:
    """Return ``status`` with where the gang started, and with what the generations before it have lost by that."""
    started = JobResumed(
        generation=gang.generation,
        step=resumed.step,
        source=resumed.source,
        fallback=resumed.fallback,
        rollbacks=resumed.rollbacks,
        skipped_samples=resumed.skipped_samples,
    )
    return status.model_copy(update={"resumed": started, "attempts": with_losses(status.attempts, started)})


def with_losses(attempts: Sequence[Attempt], resumed: JobResumed) -> list[Attempt]:
    """Fill in what had to be done again: the steps of an ended generation beyond where the first one after it to train started."""
    return [_with_loss(attempt, resumed) for attempt in attempts]


def _with_loss(attempt: Attempt, resumed: JobResumed) -> Attempt:
    if attempt.last_step is None or attempt.lost_steps is not None or attempt.generation >= resumed.generation:
        return attempt
    return attempt.model_copy(update={"lost_steps": max(0, attempt.last_step - resumed.step)})


def last_step(observed: Observation, status: JobStatus, gang: Gang) -> int | None:
    """Return how many steps were done when this generation ended, if it ever told of one."""
    said = [observed.said(gang, member) for member in gang.members]  # one that died may not have told of its last steps
    beats = [report.heartbeat for report in said if report is not None and report.heartbeat is not None]
    steps = [beat.step for beat in beats if beat.phase != Phase.INITIALIZING]
    progress = status.progress
    if (
        progress is not None
        and gang.start_time is not None
        and instant(progress.update_time) > instant(gang.start_time)
    ):
        steps.append(progress.step)  # else it is from a generation before
    if status.resumed is not None and status.resumed.generation == gang.generation:
        steps.append(status.resumed.step)
    return max(steps, default=None)


def fallback(before: JobStatus, known: Condition | None, status: JobStatus) -> Aspect:
    """Return whether the gang had to start from an older checkpoint than the newest, and none has been committed since.

    The agent's clock is no measure of "since", so it is taken from what this write of status changes.
    """
    resumed = status.resumed
    if resumed is None:
        return NO_FALLBACK
    if before.resumed is None or before.resumed.generation != resumed.generation:
        message = f"generation {resumed.generation} started after step {resumed.step}: {resumed.fallback}"
        return Aspect(holds=True, reason="CheckpointUnreadable", message=message) if resumed.fallback else NO_FALLBACK
    if known is None or known.status != "True" or before.checkpoint != status.checkpoint:
        return NO_FALLBACK
    return Aspect(holds=True, reason=known.reason, message=known.message)


def _utc(time: str | None) -> str | None:
    return None if time is None else timestamp(instant(time))


def _reason(said: str) -> str:
    return said if _CAMEL_CASE.fullmatch(said) else "SaveFailed"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{seconds:.4g}")
