"""When a gang hangs, and which rank it is that the others wait for.

An agent says so when all workers of its pod have been silent for longer than what they do may take (``Stalled``). One pod's word is not
enough: while one rank prepares or uploads something alone, the others wait for it in silence, for hours if need be. So a gang hangs when
all its pods are stalled, and by then each of them has the stacks of its ranks in its log. Pods that tell of no heartbeats (scripts need
not) have no say. A pod that is not heard is another matter: until it is, or counts as lost, nobody knows whether its ranks go on.
"""

from finetune_api.protocol import AgentState, Doing, Stalled
from finetune_api.status import Gang, Member
from finetune_operator.plan.failure import Failure, FailureClass
from finetune_operator.plan.leaving import SILENT_SECONDS
from finetune_operator.plan.observation import Observation


def find_hang(observed: Observation, gang: Gang) -> tuple[Failure | None, float | None]:
    """Return the hang of a gang of which nobody failed, or None and, when one may be about to show, in how many seconds to look again."""
    silent, others, unheard = [], 0, 0
    for member in gang.members:
        said = observed.said(gang, member)
        if said is None or not _is_heard(observed, member):
            unheard += 1
        elif said.stalled is not None and said.state == AgentState.RUNNING:
            silent.append((member, said.stalled))
        elif said.state == AgentState.RUNNING and said.heartbeat is not None:
            others += 1
    if not silent or others:
        return None, None
    if unheard:
        return None, SILENT_SECONDS
    return _hang(observed, *min(silent, key=lambda one: one[1].innocence)), None


def _is_heard(observed: Observation, member: Member) -> bool:
    heard = observed.heard[member.uid]
    return (observed.now - heard.at).total_seconds() < SILENT_SECONDS


def _hang(observed: Observation, member: Member, stalled: Stalled) -> Failure:
    pod = observed.pod(member.uid)
    message = (
        f"rank {stalled.rank} stands still ({stalled.phase.value}, after step {stalled.step}): silent for "
        f"{stalled.silent_seconds:.0f} s, {_what_it_does(stalled)}; the stacks of all ranks are in the logs of their pods"
    )
    return Failure(
        failure_class=FailureClass.KNOWN,
        reason="Hang",
        message=message,
        pod=member.pod,
        node=pod.node if pod else "",
        heard_at=observed.heard[member.uid].since,
        rank=stalled.rank,
    )


def _what_it_does(stalled: Stalled) -> str:
    match stalled.doing:
        case Doing.STOPPED:
            return "its process does not run"
        case Doing.WORKING:
            return f"it is at {stalled.place}"
        case Doing.WAITING:
            return f"it waits for the others at {stalled.place}, as they do for it"
        case Doing.UNKNOWN:
            return "it does not show where"
