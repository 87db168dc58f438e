"""Pods that are asked to go while their gang trains: a drain, an eviction, a preemption, a deletion by hand.

The kubelet sends SIGTERM, the pod's agent passes it on, and the workers of all pods agree on a step, save it together and leave with
75, those of the pods that stay too. Until then the generation stands: an agent that hears of the next one ends its workers at once, in
the middle of the save. So nothing is ordered, and no state is held for it: the generation ends when all members have, or when it is
clear that no save will come of it.
"""

from datetime import timedelta

from finetune_api.protocol import AgentState
from finetune_api.status import Gang, Member
from finetune_operator.plan.observation import Observation, instant
from finetune_operator.plan.silence import silent_seconds
from finetune_operator.views import PodView

SILENT_SECONDS = 15.0  # an agent reports every 10 s; one that does not is on a node that is gone, and saves nothing
STUCK_SECONDS = 30.0  # after the end of its grace period a kubelet has killed a pod, and said so
SAVE_SECONDS = 60.0  # from the first word of a save to the end of all members: the grace period of a pod


def leaving_members(observed: Observation, gang: Gang) -> list[Member]:
    """Return the members whose pods have been asked to go and may still save."""
    return [member for member in gang.members if may_still_save(observed, gang, member)]


def may_still_save(observed: Observation, gang: Gang, member: Member) -> bool:
    """Tell whether a member's pod has been asked to go and its workers may be saving."""
    return _seconds_left(observed, gang, member) > 0


def look_again_seconds(observed: Observation, gang: Gang) -> float | None:
    """Return in how many seconds the first of them has no more time."""
    left = [_seconds_left(observed, gang, member) for member in gang.members]
    return min((seconds for seconds in left if seconds > 0), default=None)


def _seconds_left(observed: Observation, gang: Gang, member: Member) -> float:
    pod, heard = observed.pod(member.uid), observed.heard.get(member.uid)
    if pod is None or pod.ended or not pod.grace_ends or _has_told_its_end(observed, gang, member):
        return 0.0
    ends = instant(pod.grace_ends)
    if heard is not None:  # one that this process has not heard yet gets the benefit of the doubt
        ends = min(ends, heard.at + timedelta(seconds=SILENT_SECONDS))
    return (ends - observed.now).total_seconds()


def is_stuck(observed: Observation, pod: PodView) -> bool:
    """Tell whether a pod that is being deleted should be gone: its node cannot be reached, or a finalizer holds it."""
    if not pod.deleting:
        return False
    if pod.node_lost and silent_seconds(observed, pod.uid) >= SILENT_SECONDS:
        return True
    killed = instant(pod.grace_ends) + timedelta(seconds=STUCK_SECONDS) if pod.grace_ends else observed.now
    return observed.now > killed


def has_ended(observed: Observation, gang: Gang, member: Member) -> bool:
    """Tell whether nothing of a member runs any more: all its workers have ended, or its pod has."""
    pod, said = observed.pod(member.uid), observed.said(gang, member)
    if pod is None or pod.ended:
        return True
    if said is None or said.state != AgentState.FAILED:
        return _has_told_its_end(observed, gang, member)
    ranks = {end.rank for end in said.exits if end.generation == gang.generation}
    return len(ranks) >= gang.processes_per_node or -1 in ranks


def _has_told_its_end(observed: Observation, gang: Gang, member: Member) -> bool:
    said = observed.said(gang, member)
    return said is not None and said.state in (AgentState.SUCCEEDED, AgentState.FAILED, AgentState.STOPPED)


def describe(observed: Observation, gang: Gang) -> str | None:
    """Return what is being waited for while a gang saves because of others, or None."""
    leaving = leaving_members(observed, gang)
    if not leaving:
        return None
    pod = observed.pod(leaving[0].uid)
    assert pod is not None
    why = f" ({pod.disruption})" if pod.disruption else ""
    more = f" and {len(leaving) - 1} more" if len(leaving) > 1 else ""
    return f"pod {pod.name}{more} must go{why}; the workers save before the gang starts again"
