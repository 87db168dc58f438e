"""Why a gang is not complete yet, read from the pods' own conditions and container states."""

import re
from collections.abc import Iterable

from finetune_operator.plan.observation import Observation, Problem, timestamp
from finetune_operator.plan.silence import is_at_hand
from finetune_operator.views import ContainerView, PodView

# Reasons of a start that goes on: each follows the one before within seconds.
ON_THE_WAY = frozenset({"Creating", "ContainerCreating", "WaitingForAgent", "Starting"})
# Waiting reasons of a kubelet that say no more than "not yet".
_ON_ITS_WAY = {"", "ContainerCreating", "PodInitializing"}
_IMAGE = {"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "RegistryUnavailable", "ImageInspectError"}
_BLOCKED = frozenset(
    {"SecretMissing", "ClaimMissing", "ImagePullFailed", "InvalidImage", "ContainerConfigError", "StartFailed"}
)
_CLAIM_MISSING = re.compile('persistentvolumeclaim "[^"]*" not found')
_TOLD_IN_FULL = 4  # ranks named in a message; the rest is counted


def waiting_for(observed: Observation, chosen: dict[int, PodView], nodes: int) -> Problem:
    """Return why the gang with ``chosen`` pods by rank is not complete: the most telling reason, and all ranks that share it."""
    reasons = [(rank, *_why(observed, chosen.get(rank))) for rank in range(nodes)]
    waiting = [(rank, reason, message) for rank, reason, message in reasons if reason]
    if not waiting:
        return Problem("Starting", f"all {nodes} pods have reported")
    _, reason, message = max(waiting, key=lambda entry: _telling(entry[1]))
    ranks = [rank for rank, other, _ in waiting if other == reason]
    return Problem(reason, f"{_ranks(ranks)} of {nodes}: {message}")


def is_blocked(problem: Problem) -> bool:
    """Tell whether the reason is one that waiting alone does not end."""
    return problem.reason in _BLOCKED


def _telling(reason: str) -> int:
    order = ("Creating", "WaitingForAgent", "ContainerCreating", "Unschedulable")
    return order.index(reason) if reason in order else len(order)


def _why(observed: Observation, pod: PodView | None) -> tuple[str, str]:
    if pod is None:
        obstacle = observed.obstacle or Problem("Creating", "the pod is being created")
        return obstacle.reason, obstacle.message
    if pod.unschedulable:
        return _unschedulable(pod)
    for container in pod.containers:
        told = _container(pod, container)
        if told:
            return told
    return ("", "") if is_at_hand(observed, pod) else _unheard(observed, pod)


def _unheard(observed: Observation, pod: PodView) -> tuple[str, str]:
    if pod.uid in observed.heard:
        said = timestamp(observed.heard[pod.uid].at)
        return "WaitingForAgent", f"the agent of pod {pod.name} on {pod.node} has said nothing since {said}"
    if any(container.running and not container.is_init for container in pod.containers):
        return "WaitingForAgent", f"the agent of pod {pod.name} has not reported yet"
    return "ContainerCreating", f"pod {pod.name} is being started on {pod.node or 'no node yet'}"


def _unschedulable(pod: PodView) -> tuple[str, str]:
    reason = "ClaimMissing" if _CLAIM_MISSING.search(pod.unschedulable) else "Unschedulable"
    return reason, f"pod {pod.name} cannot be scheduled: {pod.unschedulable}"


def _container(pod: PodView, container: ContainerView) -> tuple[str, str] | None:
    reason, message = container.waiting_reason, container.waiting_message
    where = f"container {container.name} of pod {pod.name}"
    if reason in _ON_ITS_WAY:
        return None
    if reason == "CreateContainerConfigError":
        kind = "SecretMissing" if "secret" in message.lower() else "ContainerConfigError"
        return kind, f"{where} cannot be configured: {message}"
    if reason in _IMAGE:
        return "ImagePullFailed", f"the image of {where} cannot be pulled: {message or reason}"
    if reason == "InvalidImageName":
        return "InvalidImage", f"the image name of {where} is invalid: {message}"
    ended = (
        f" (ended with {container.last_exit_code}: {container.last_exit_reason})" if container.last_exit_reason else ""
    )
    return "StartFailed", f"{where} does not start: {reason}{ended} {message}".strip()


def _ranks(ranks: Iterable[int]) -> str:
    ranks = list(ranks)
    named = ", ".join(str(rank) for rank in ranks[:_TOLD_IN_FULL])
    more = f" and {len(ranks) - _TOLD_IN_FULL} more" if len(ranks) > _TOLD_IN_FULL else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"
