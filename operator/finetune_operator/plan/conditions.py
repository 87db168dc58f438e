"""Phase and conditions: the same facts said for people and for programs.

``Ready``, ``Reconciling`` and ``Stalled`` mean what kstatus says they mean: Reconciling while the operator still has to bring something
about, Stalled when it cannot without somebody else's doing, Ready when what the spec asks for is so. What checkpoints do, and a slow rank,
is said beside that, by conditions of their own: training goes on meanwhile. All conditions are always there, each with a reason and a
message.
"""

from dataclasses import dataclass
from typing import Literal

from finetune_api.status import Condition, ConditionType, JobPhase, JobStatus
from finetune_operator.plan.checkpoints import Aspect, delay, fallback
from finetune_operator.plan.observation import Observation, timestamp
from finetune_operator.plan.straggler import straggle

_MESSAGE_LIMIT = 2048

# What does not hold is told without the news of the day; Ready says those, whether it holds or not.
_WHEN_FALSE: dict[ConditionType, tuple[str, str]] = {
    ConditionType.RECONCILING: ("Reconciled", "the operator has nothing left to bring about"),
    ConditionType.STALLED: ("NotStalled", "nobody's help is needed"),
    ConditionType.SUSPENDED: ("NotSuspended", "spec.suspend is false"),
    ConditionType.COMPLETE: ("NotComplete", "the job has not succeeded"),
    ConditionType.FAILED: ("NotFailed", "the job has not failed"),
}


@dataclass(frozen=True, slots=True)
class Situation:
    """Where a job is: one phase, one reason, one message.

    ``stalled``: somebody else must act. ``under_way``: the operator still does. ``unknown``: nobody knows, and the phase is what it was.
    """

    phase: JobPhase
    reason: str
    message: str
    stalled: bool = False
    under_way: bool = False
    unknown: bool = False


def with_conditions(observed: Observation, status: JobStatus, situation: Situation) -> JobStatus:
    """Return ``status`` with the phase and all conditions of ``situation``."""
    phase = situation.phase
    done, failed = phase == JobPhase.SUCCEEDED, phase == JobPhase.FAILED
    suspended = phase == JobPhase.SUSPENDED
    stalled = situation.stalled or failed
    at_rest = phase in (JobPhase.SUSPENDED, JobPhase.RUNNING) and not (situation.under_way or stalled)
    ready: bool | None = done or at_rest
    holds = {
        ConditionType.READY: None if situation.unknown else ready,
        ConditionType.RECONCILING: not (ready or stalled or situation.unknown),
        ConditionType.STALLED: stalled,
        ConditionType.SUSPENDED: suspended,
        ConditionType.COMPLETE: done,
        ConditionType.FAILED: failed,
    }
    known = {condition.type: condition for condition in status.conditions}
    aspects = {kind: _aspect(kind, situation, holds=value) for kind, value in holds.items()}
    aspects[ConditionType.CHECKPOINTS_DELAYED] = delay(known.get(ConditionType.CHECKPOINTS_DELAYED), status)
    aspects[ConditionType.CHECKPOINT_FALLBACK] = fallback(
        observed.status, known.get(ConditionType.CHECKPOINT_FALLBACK), status
    )
    running = status.gang if phase == JobPhase.RUNNING else None
    aspects[ConditionType.STRAGGLER] = straggle(observed, running, known.get(ConditionType.STRAGGLER))
    conditions = [_condition(observed, known.get(kind), kind, aspect) for kind, aspect in aspects.items()]
    generation = observed.job.metadata.generation
    return status.model_copy(update={"phase": phase, "conditions": conditions, "observed_generation": generation})


def _aspect(kind: ConditionType, situation: Situation, *, holds: bool | None) -> Aspect:
    told = situation.reason, situation.message
    return Aspect(holds, *(told if holds is not False else _WHEN_FALSE.get(kind, told)))


def _condition(observed: Observation, known: Condition | None, kind: ConditionType, aspect: Aspect) -> Condition:
    value = _word(aspect.holds)
    changed = known is None or known.status != value
    return Condition(
        type=kind,
        status=value,
        reason=aspect.reason,
        message=aspect.message[:_MESSAGE_LIMIT],
        last_transition_time=timestamp(observed.now) if changed or known is None else known.last_transition_time,
        observed_generation=observed.job.metadata.generation,
    )


def _word(holds: bool | None) -> Literal["True", "False", "Unknown"]:
    if holds is None:
        return "Unknown"
    return "True" if holds else "False"
