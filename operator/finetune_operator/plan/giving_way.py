"""Half-placed gangs: who gives back what it holds, so that jobs that each fit alone and not together never starve one another.

A gang that could be placed in part only holds what another one may need, and the other way round. All jobs stand in one line: those that
have trained before those that have not, then by age. Whoever is half placed while somebody before it in the line cannot be placed gives
all its pods back and comes again later. The first of those who cannot be placed gives way to nobody, so what the others give back comes
together for it; that is why each of them ends, if it fits at all. And if it does not, it must not hold half of itself for ever: after
``PATIENCE_SECONDS`` it gives its pods back to whoever waits behind it. ``pendingDeadlineSeconds`` does so at any time, whoever waits.

Whoever can be placed as a whole is: nobody waits for one that cannot.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_api.status import Gang
from finetune_operator.plan.observation import Observation, instant
from finetune_operator.views import PodView

PATIENCE_SECONDS = 600.0
LINE_SECONDS = 15.0  # how often a half-placed gang looks whether somebody before it waits
QUOTA = "QuotaExceeded"


@dataclass(frozen=True, slots=True, order=True)
class Turn:
    """A job's place in the line; the smallest goes first."""

    never_trained: bool
    created: str
    namespace: str
    name: str


def turn_of(body: Mapping[str, Any]) -> Turn:
    """Return the place in the line of a job as the API server wrote it."""
    metadata = body["metadata"]
    trained = "startTime" in (body.get("status") or {})
    return Turn(not trained, metadata.get("creationTimestamp", ""), metadata["namespace"], metadata["name"])


def is_waiting(body: Mapping[str, Any], pods: Iterable[PodView], *, refused: bool) -> bool:
    """Tell whether a job's gang cannot be placed now: a pod fits nowhere, or the quota refuses one. Its spares do not count."""
    status = body.get("status") or {}
    gang = status.get("gang") or {}
    if gang.get("members") or body["spec"].get("suspend"):
        return False
    if "completionTime" in status or "deletionTimestamp" in body["metadata"]:
        return False
    return refused or any(pod.usable and pod.unschedulable and pod.rank < gang.get("nodes", 0) for pod in pods)


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
