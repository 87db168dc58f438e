"""What reconcile sees of pods: the few fields it decides from, as values."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api import contract


@dataclass(frozen=True, slots=True)
class ContainerView:
    """The newest state of one container, and how it ended before."""

    name: str
    is_init: bool
    waiting_reason: str = ""
    waiting_message: str = ""
    running: bool = False
    started: str = ""  # when it began to run, by its node's clock
    exit_code: int | None = None
    exit_reason: str = ""
    exit_message: str = ""
    last_exit_code: int | None = None
    last_exit_reason: str = ""
    restart_count: int = 0


@dataclass(frozen=True, slots=True)
class PodView:
    """One training pod."""

    namespace: str
    name: str
    uid: str
    job: str
    job_uid: str
    rank: int
    generation: int  # that it was created for
    created: str
    node: str = ""
    address: str = ""
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    deleting: bool = False
    grace_ends: str = ""  # when a pod that is being deleted is killed
    scheduled: bool = False
    unschedulable: str = ""
    disruption: str = ""
    memory_limit: str = ""  # of its trainer
    node_lost: bool = False  # its node is not ready
    no_sandbox_since: str = ""  # when its kubelet took it up, while its network and volumes are not there yet
    containers: tuple[ContainerView, ...] = ()
    agent_image: str = ""
    trainer_image: str = ""
    profile: str = ""  # that it was made by, whole (render/profile.py)
    shape: str = ""  # that it was made in (plan/shape.py); an older operator did not say
    resource_version: str = ""

    @property
    def ended(self) -> bool:
        """Whether its containers will never run again."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def usable(self) -> bool:
        """Whether it can hold a place in a gang."""
        return not self.deleting and not self.ended

    @property
    def trains(self) -> bool:
        """Whether its trainer container runs, so that its images are good."""
        return self.usable and any(one.name == contract.TRAINER_CONTAINER and one.running for one in self.containers)

    @property
    def trainer_started(self) -> str:
        """When its trainer container, which is the agent's, began to run; empty while it does not."""
        return next((one.started for one in self.containers if one.name == contract.TRAINER_CONTAINER), "")

    @property
    def has_trained(self) -> bool:
        """Whether its trainer container runs or ever did."""
        return any(
            one.name == contract.TRAINER_CONTAINER
            and (one.running or one.exit_code is not None or one.last_exit_code is not None)
            for one in self.containers
        )


def pod_view(body: Mapping[str, Any]) -> PodView | None:
    """Return the view of a pod, or None when it is no training pod of a job (no labels or owner of ours)."""
    metadata, spec, status = body["metadata"], body.get("spec", {}), body.get("status", {})
    labels = metadata.get("labels", {})
    owners = [o for o in metadata.get("ownerReferences", ()) if o.get("controller") and o["kind"] == contract.KIND]
    numbers = [labels.get(name, "") for name in (contract.RANK_LABEL, contract.GENERATION_LABEL)]
    if not owners or not all(number.isdecimal() for number in numbers):  # labels are anybody's to write
        return None
    conditions = {condition["type"]: condition for condition in status.get("conditions", ())}
    scheduled = conditions.get("PodScheduled", {})
    return PodView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        job=owners[0]["name"],
        job_uid=owners[0]["uid"],
        rank=int(numbers[0]),
        generation=int(numbers[1]),
        created=metadata.get("creationTimestamp", ""),
        node=spec.get("nodeName", ""),
        address=status.get("podIP", ""),
        phase=status.get("phase", "Pending"),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        deleting="deletionTimestamp" in metadata,
        grace_ends=metadata.get("deletionTimestamp", ""),
        scheduled=scheduled.get("status") == "True",
        unschedulable=(scheduled.get("message") or scheduled.get("reason", ""))
        if scheduled.get("status") == "False"
        else "",
        disruption=conditions.get("DisruptionTarget", {}).get("reason", ""),
        memory_limit=_memory_limit(spec),
        node_lost=_is_marked_not_ready(conditions),
        no_sandbox_since=_no_sandbox_since(conditions),
        containers=(
            *(_container(item, is_init=True) for item in status.get("initContainerStatuses", ())),
            *(_container(item, is_init=False) for item in status.get("containerStatuses", ())),
        ),
        agent_image=_image(spec.get("initContainers", ()), contract.AGENT_CONTAINER),
        trainer_image=_image(spec.get("containers", ()), contract.TRAINER_CONTAINER),
        profile=sys.intern(metadata.get("annotations", {}).get(contract.PROFILE_ANNOTATION, "")),
        shape=sys.intern(metadata.get("annotations", {}).get(contract.SHAPE_ANNOTATION, "")),
        resource_version=metadata.get("resourceVersion", ""),
    )


def _memory_limit(spec: Mapping[str, Any]) -> str:
    for item in spec.get("containers", ()):
        if item["name"] == contract.TRAINER_CONTAINER:
            return str(item.get("resources", {}).get("limits", {}).get("memory", ""))
    return ""


def _is_marked_not_ready(conditions: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tell whether the node lifecycle controller has said of a pod that its node is not ready; so nobody has to watch nodes.

    It turns Ready to False and touches nothing else (``MarkPodsNotReady``, pkg/controller/util/node in 1.34), while a kubelet says Ready
    and ContainersReady alike, for a pod without readiness gates, and gives a reason.
    """
    ready, containers = conditions.get("Ready", {}), conditions.get("ContainersReady", {})
    return ready.get("status") == "False" and not ready.get("reason") and containers.get("status") == "True"


def _no_sandbox_since(conditions: Mapping[str, Mapping[str, Any]]) -> str:
    """Images are pulled behind that, so they do not count (``PodReadyToStartContainers``, on by default since 1.29)."""
    sandbox = conditions.get("PodReadyToStartContainers", {})
    return (sandbox.get("lastTransitionTime") or "") if sandbox.get("status") == "False" else ""


def _image(containers: Iterable[Mapping[str, Any]], name: str) -> str:
    """Return a container's image; the same text for all pods, which are many."""
    return sys.intern(next((one.get("image", "") for one in containers if one["name"] == name), ""))


def _container(item: Mapping[str, Any], *, is_init: bool) -> ContainerView:
    state, last = item.get("state", {}), item.get("lastState", {}).get("terminated", {})
    waiting, ended = state.get("waiting", {}), state.get("terminated", {})
    return ContainerView(
        name=item["name"],
        is_init=is_init,
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        running="running" in state,
        started=state.get("running", {}).get("startedAt") or "",
        exit_code=ended.get("exitCode"),
        exit_reason=ended.get("reason", ""),
        exit_message=ended.get("message", ""),
        last_exit_code=last.get("exitCode"),
        last_exit_reason=last.get("reason", ""),
        restart_count=item.get("restartCount", 0),
    )
