"""Agents that are not heard any more: which of them are lost, and when the truth is that nobody knows.

An agent says something every 10 s, a report or a question. One that does not is lost when its node is not ready (of which a control plane
that was away may speak too soon: so that counts later while nobody is heard), or when it has been silent for ``silent_seconds`` and nothing
else explains that:

- This process listens. An agent's silence begins when it was heard last, or when this process began to hear agents at all, whichever is
  later. So a new operator, a new leader and one whose network was away give every agent its full time again, and one that they have never
  heard half as long again.
- Some other agent, of any job, is heard. When all are silent it is the operator that hears nothing.
- Its peers' steps do not advance. Ranks that train in step cannot go on without one, so a gang that advances has lost no member. A step
  is overdue after twice the time of the one before. Of a pod that stands behind the gang its steps say nothing.

Until then the truth is Unknown, and training goes on.

A pod whose agent has never said a word is given up too (``NEVER_HEARD``) when it runs and cannot reach the operator from its node, or when
its node cannot set it up, if there is reason to believe that another would do better: another pod of the job is heard, or there is no other
and the job has trained.
"""

from datetime import timedelta

from finetune_api.protocol import AgentState
from finetune_api.status import Gang, Member
from finetune_operator.plan.observation import Observation, Problem, instant, timestamp
from finetune_operator.views import PodView

NODE_LOST, POD_SILENT, NEVER_HEARD = "NodeLost", "PodSilent", "PodNeverHeard"
LATE_SECONDS = 15.0  # an agent says something every 10 s; a later one is not counted on
LONGEST_STEP_SECONDS = 150.0  # two of them without an advance are a gang that stands still
STRANGER_PATIENCE = 1.5  # times silent_seconds
FIRST_WORD_SECONDS = 150.0  # from the start of its container; on an idle node an agent needs less than one
SANDBOX_SECONDS = 300.0  # to give a pod its network and volumes; a claim's may have to be detached elsewhere
GATED_SECONDS = 10.0  # how often one that should be lost by time alone is looked at


def find_loss(observed: Observation, gang: Gang, pod: PodView) -> Problem | None:
    """Return why a pod that should be running is lost, or None."""
    if not pod.usable:
        return None
    silent, patience = silent_seconds(observed, pod.uid), _patience(observed, gang, pod)
    if pod.node_lost and not observed.most_nodes_lost and silent >= patience:
        return Problem(NODE_LOST, f"node {pod.node} is not ready, and the agent of pod {pod.name} on it is silent")
    if not _was_ever_heard(observed, gang, pod):
        return _find_never_heard(observed, pod)
    if silent < max(observed.silent_seconds, patience):
        return None
    if is_deaf(observed) or (_is_member(gang, pod) and _peers_advance(observed, gang, pod.uid)):
        return None
    since = _last_heard(observed, pod.uid)
    return Problem(
        POD_SILENT, f"the agent of pod {pod.name} on node {pod.node} is silent since {since}; others are heard"
    )


def _find_never_heard(observed: Observation, pod: PodView) -> Problem | None:
    left = _first_word_due_in(observed, pod)
    if left is None or left > 0 or is_deaf(observed):
        return None
    others = [other for other in observed.pods if other.usable and other.uid != pod.uid]
    another_is_heard = any(is_at_hand(observed, other) for other in others)
    if not another_is_heard and (others or observed.status.start_time is None):
        return None  # what keeps all of a job's agents from the operator is not this one's node
    where = f"pod {pod.name} on node {pod.node}"
    if pod.trainer_started:
        how = f"{where} runs since {pod.trainer_started}, and its agent was never heard; others are"
    else:
        how = f"{where} has neither network nor volumes since {pod.no_sandbox_since}; its events say why"
    return Problem(NEVER_HEARD, how)


def _first_word_due_in(observed: Observation, pod: PodView) -> float | None:
    """Return in how many seconds the agent of a pod must have been heard; None while it has no node, or its images are being pulled."""
    began, patience = pod.no_sandbox_since, SANDBOX_SECONDS
    if pod.trainer_started:
        began, patience = pod.trainer_started, FIRST_WORD_SECONDS
    if observed.hearing is None or not began:
        return None
    since = max(instant(pod.created), instant(began), observed.hearing.since)
    return (since + timedelta(seconds=patience) - observed.now).total_seconds()


def is_at_hand(observed: Observation, pod: PodView) -> bool:
    """Tell whether a pod's agent has been heard just now, so that a gang can count on it. One that must go may know so before we do."""
    heard = observed.heard.get(pod.uid)
    if heard is None or heard.report.leaving:
        return False
    if observed.hearing is None:
        return True
    return (observed.now - heard.at).total_seconds() <= LATE_SECONDS


def find_doubt(observed: Observation, gang: Gang) -> Problem | None:
    """Return why it is not known how a member is, or None: it has been silent for too long, and that need not be its own fault."""
    for member in _watched(observed, gang):
        if silent_seconds(observed, member.uid) < observed.silent_seconds:
            continue
        if is_deaf(observed):
            assert observed.hearing is not None
            since = timestamp(observed.hearing.at)
            return Problem(
                "NoAgentHeard", f"no agent of any job has been heard since {since}; training needs no operator"
            )
        since = _last_heard(observed, member.uid)
        why = f"the agent of pod {member.pod} (rank {member.rank}) is silent since {since}"
        return Problem("AgentSilent", f"{why}, while its peers' steps advance")
    return None


def is_taking_stock(observed: Observation, gang: Gang) -> bool:
    """Tell whether this process has not heard all members yet, and is not silent for long enough to wonder."""
    return any(
        member.uid not in observed.heard and silent_seconds(observed, member.uid) < observed.silent_seconds
        for member in _watched(observed, gang)
    )


def silence_ends_in(observed: Observation, gang: Gang, pods: list[PodView]) -> float | None:
    """Return in how many seconds the first of these pods may be lost, or doubtful, if nothing is heard of it."""
    if observed.hearing is None:
        return None
    left = []
    for pod in (pod for pod in pods if pod.usable):
        was_heard = _was_ever_heard(observed, gang, pod)
        due = None if was_heard else _first_word_due_in(observed, pod)
        if due is not None:
            left.append(due if due > 0 else GATED_SECONDS)
        if was_heard or pod.node_lost:
            silent, patience = silent_seconds(observed, pod.uid), _patience(observed, gang, pod)
            left.append(patience - silent if silent < patience else GATED_SECONDS)
            if silent < observed.silent_seconds:  # where there is doubt before there is a loss
                left.append(observed.silent_seconds - silent)
    return min(left, default=None)


def silent_seconds(observed: Observation, pod_uid: str) -> float:
    """Return for how long an agent has been silent while this process listened."""
    if observed.hearing is None:
        return 0.0
    heard = observed.heard.get(pod_uid)
    since = observed.hearing.since if heard is None else max(heard.at, observed.hearing.since)
    return (observed.now - since).total_seconds()


def is_deaf(observed: Observation) -> bool:
    """Tell whether this process has not heard any agent lately."""
    return observed.hearing is not None and (observed.now - observed.hearing.at).total_seconds() >= LATE_SECONDS


def _patience(observed: Observation, gang: Gang, pod: PodView) -> float:
    """Return for how many seconds an agent may be silent: less where its node explains it, unless all are silent.

    A member that another process has heard, and this one never, may not know the way to it yet: after an API server was away, a node's proxy
    hears of a new leader as much as half a minute late, and its kubelet's mark may be as late.
    """
    if pod.uid not in observed.heard and _is_member(gang, pod):
        return STRANGER_PATIENCE * observed.silent_seconds
    return LATE_SECONDS if pod.node_lost and not is_deaf(observed) else observed.silent_seconds


def _was_ever_heard(observed: Observation, gang: Gang, pod: PodView) -> bool:
    """A member has been heard, by another process perhaps. Any other pod may still be on its way to its first word."""
    return pod.uid in observed.heard or _is_member(gang, pod)


def _is_member(gang: Gang, pod: PodView) -> bool:
    return any(member.uid == pod.uid for member in gang.members)


def _watched(observed: Observation, gang: Gang) -> list[Member]:
    """Return the members whose silence means something: their pods should be running, and their work is not done."""
    return [member for member in gang.members if _is_watched(observed, gang, member)]


def _is_watched(observed: Observation, gang: Gang, member: Member) -> bool:
    pod, said = observed.pod(member.uid), observed.said(gang, member)
    return pod is not None and pod.usable and (said is None or said.state != AgentState.SUCCEEDED)


def _peers_advance(observed: Observation, gang: Gang, pod_uid: str) -> bool:
    return any(_advances(observed, gang, member) for member in gang.members if member.uid != pod_uid)


def _advances(observed: Observation, gang: Gang, member: Member) -> bool:
    """Tell whether the next step of a member is not overdue."""
    heard = observed.heard.get(member.uid)
    if heard is None or heard.step_at is None or heard.report.generation != gang.generation:
        return False
    age = (observed.now - heard.step_at).total_seconds()
    return age < max(LATE_SECONDS, 2 * min(heard.step_seconds, LONGEST_STEP_SECONDS))


def _last_heard(observed: Observation, pod_uid: str) -> str:
    heard = observed.heard.get(pod_uid)
    assert observed.hearing is not None
    return timestamp(observed.hearing.since if heard is None else heard.at)
