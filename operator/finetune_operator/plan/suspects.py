"""Nodes that are not trusted for a while: a pod of the gang was lost or wedged there, or its devices failed.

The list is committed with the generation that replaces the pod. It says two things: this pod is not used again, whatever it claims later
and whichever operator process looks; and new pods are kept away from its node. The scheduler is asked, not ordered: where the node is the
only one that fits, training there again is better than not at all.
"""

from collections.abc import Iterable
from datetime import timedelta

from finetune_api.status import AvoidedNode, Gang
from finetune_operator.plan.observation import Observation, instant, timestamp
from finetune_operator.views import PodView

AVOID_SECONDS = 3600.0
AVOIDED_AT_MOST = 16


def is_suspect(gang: Gang, pod: PodView) -> bool:
    """Tell whether a pod was lost once, or its devices failed."""
    return any(entry.pod == pod.name for entry in gang.avoid_nodes)


def with_suspects(observed: Observation, gang: Gang, found: Iterable[tuple[PodView, str]]) -> Gang:
    """Return the gang with more nodes to avoid, each for the first reason that its pod is given: the list has one entry for each pod."""
    known = {entry.pod for entry in gang.avoid_nodes}
    now = timestamp(observed.now)
    firsts = {pod.name: (pod, reason) for pod, reason in reversed(list(found)) if pod.node and pod.name not in known}
    new = [AvoidedNode(pod=pod.name, node=pod.node, reason=reason, time=now) for pod, reason in firsts.values()]
    return gang.model_copy(update={"avoid_nodes": [*gang.avoid_nodes, *new][-AVOIDED_AT_MOST:]}) if new else gang


def still_avoided(observed: Observation, gang: Gang) -> list[AvoidedNode]:
    """Return what the next generation still has to avoid."""
    oldest = observed.now - timedelta(seconds=AVOID_SECONDS)
    return [entry for entry in gang.avoid_nodes if instant(entry.time) > oldest]


def nodes_to_avoid(gang: Gang) -> tuple[str, ...]:
    """Return the names of the nodes, each once."""
    return tuple(sorted({entry.node for entry in gang.avoid_nodes}))
