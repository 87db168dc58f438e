"""Half-placed gangs: who gives back what it holds, so that jobs that each fit alone and not together never starve one another.

A gang that could be placed in part only holds what another one may need, and the other way round. All jobs stand in one line: those that
have trained before those that have not, then by age. Whoever is half placed while somebody before it in the line cannot be placed gives
all its pods back and comes again later. The first of those who cannot be placed gives way to nobody, so what the others give back comes
together for it; that is why each of them ends, if it fits at all. And if it does not, it must not hold half of itself for ever: after
``PATIENCE_SECONDS`` it gives its pods back to whoever waits behind it. ``pendingDeadlineSeconds`` does so at any time, whoever waits.

Whoever can be placed as a whole is: nobody waits for one that cannot.

Gangs that train and are to grow stand last in the line. Half of a growth is given back likewise, while the gang trains on, and comes again
after ``GROWTH_HOLD_SECONDS``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from finetune_api.status import Gang
from finetune_operator.plan.gang import growth, idle_pods, wanted_behind
from finetune_operator.plan.observation import Observation, instant, timestamp
from finetune_operator.views import PodView

PATIENCE_SECONDS = 600.0
GROWTH_HOLD_SECONDS = 120.0
LINE_SECONDS = 15.0  # how often a half-placed gang looks whether somebody before it waits
QUOTA = "QuotaExceeded"


@dataclass(frozen=True, slots=True, order=True)
class Turn:
    """A job's place in the line; the smallest goes first."""

    order: int  # 0: it trained and cannot go on, 1: it has never trained, 2: it trains and is to grow
    created: str
    namespace: str
    name: str


def turn_of(body: Mapping[str, Any]) -> Turn:
    """Return the place in the line of a job as the API server wrote it."""
    metadata, status = body["metadata"], body.get("status") or {}
    trains, trained = bool((status.get("gang") or {}).get("members")), "startTime" in status
    return Turn(
        2 if trains else 0 if trained else 1,
        metadata.get("creationTimestamp", ""),
        metadata["namespace"],
        metadata["name"],
    )


def is_waiting(body: Mapping[str, Any], pods: Iterable[PodView], *, refused: bool) -> bool:
    """Tell whether a job's gang, or its growth, cannot be placed now: a pod fits nowhere, or the quota refuses one. Spares do not count."""
    status, spec = body.get("status") or {}, body["spec"]
    gang = status.get("gang") or {}
    if spec.get("suspend") or "completionTime" in status or "deletionTimestamp" in body["metadata"]:
        return False
    nodes, usable = gang.get("nodes", 0), [pod for pod in pods if pod.usable]
    members = {member["uid"] for member in gang.get("members", ())}
    if not members:
        return refused or any(pod.unschedulable and pod.rank < nodes for pod in usable)
    lacks = spec["workers"]["nodes"] - nodes > sum(pod.uid not in members for pod in _placed(usable))
    return lacks and not gang.get("growthHeldUntil") and (refused or any(pod.unschedulable for pod in usable))


def find_reason_to_give_back(
    observed: Observation, gang: Gang, chosen: Mapping[int, PodView], not_before: datetime | None
) -> tuple[str, str] | None:
    """Return why a gang that is not complete gives its pods back, as reason and message, or None."""
    deadline, waited = observed.job.spec.pending_deadline_seconds, pending_seconds(observed, gang, not_before)
    if deadline is not None and waited >= deadline:
        return "PendingDeadlineExceeded", f"not complete after pendingDeadlineSeconds ({deadline} s)"
    if not is_half_placed(observed, gang, chosen):
        return None
    if observed.senior_waits:
        return "GaveWay", "placed in part only, while a job that goes first cannot be placed either"
    if observed.junior_waits and waited >= PATIENCE_SECONDS:
        return "GaveWay", f"placed in part only for {PATIENCE_SECONDS:.0f} s, while other jobs cannot be placed"
    return None


def with_growth_held(observed: Observation, gang: Gang) -> Gang:
    """Return a gang that has its members with the time until which it gives back what it has to grow by, or without."""
    held = gang.growth_held_until
    if held is not None:
        still = growth(observed, gang) > 0 and instant(held) > observed.now
        return gang if still else gang.model_copy(update={"growth_held_until": None})
    if gang.stop_time is not None or not is_half_grown(observed, gang) or not _must_give_growth_back(observed, gang):
        return gang
    return gang.model_copy(
        update={"growth_held_until": timestamp(observed.now + timedelta(seconds=GROWTH_HOLD_SECONDS))}
    )


def is_half_grown(observed: Observation, gang: Gang) -> bool:
    """Tell whether beyond the spares some pods have what others wait for, too few to grow by, and the rest cannot be placed."""
    behind = idle_pods(observed, gang)
    refused = observed.obstacle is not None and observed.obstacle.reason == QUOTA
    lacks = any(pod.unschedulable for pod in behind) or (refused and len(behind) < wanted_behind(observed, gang))
    return lacks and observed.job.spec.workers.spares < len(_placed(behind)) < growth(observed, gang)


def _must_give_growth_back(observed: Observation, gang: Gang) -> bool:
    created = sorted(pod.created for pod in _placed(idle_pods(observed, gang)))
    since = instant(created[observed.job.spec.workers.spares])  # those before it may have stood by for days
    is_impatient = (observed.now - since).total_seconds() >= PATIENCE_SECONDS
    return observed.senior_waits or (observed.junior_waits and is_impatient)


def _placed(pods: Iterable[PodView]) -> list[PodView]:
    return [pod for pod in pods if pod.node]


def growth_look_again_seconds(observed: Observation, gang: Gang) -> float | None:
    """Return in how many seconds a gang that is to grow may have to give pods back, or tries again."""
    if gang.growth_held_until is not None:
        return (instant(gang.growth_held_until) - observed.now).total_seconds()
    return LINE_SECONDS if is_half_grown(observed, gang) else None


def is_half_placed(observed: Observation, gang: Gang, chosen: Mapping[int, PodView]) -> bool:
    """Tell whether some ranks have what others wait for."""
    if observed.obstacle is not None and observed.obstacle.reason == QUOTA and len(chosen) < gang.nodes:
        return bool(chosen)  # a pod uses up quota wherever it is
    return any(pod.unschedulable for pod in chosen.values()) and any(pod.node for pod in chosen.values())


def pending_seconds(observed: Observation, gang: Gang, not_before: datetime | None) -> float:
    """Return for how long a gang has been assembled, negative before it may start: until then it waits for nobody's places."""
    since = instant(gang.mint_time) if gang.mint_time else observed.now
    if not_before is not None:
        since = max(since, not_before)
    return (observed.now - since).total_seconds()


def look_again_seconds(
    observed: Observation, gang: Gang, chosen: Mapping[int, PodView], not_before: datetime | None
) -> float | None:
    """Return in how many seconds a gang that is not complete may have to give its pods back."""
    deadline = observed.job.spec.pending_deadline_seconds
    left = [] if deadline is None else [deadline - pending_seconds(observed, gang, not_before)]
    if is_half_placed(observed, gang, chosen):
        left.append(LINE_SECONDS)
    return min(left, default=None)
