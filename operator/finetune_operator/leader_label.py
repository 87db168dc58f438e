"""The label by which the job server's Service finds the leader: on its pod, and on no other pod of the same release."""

from finetune_api.contract import LEADER_LABEL
from finetune_operator.kube.api import PODS, KubeApi
from finetune_operator.kube.errors import Conflict, NotFound
from finetune_operator.leader import OwnPod

INSTANCE_LABEL = "app.kubernetes.io/instance"
LEADS = "true"


async def show_leader(api: KubeApi, namespace: str, leader: OwnPod) -> None:
    """See that this pod has the label and its peers have not. Its own comes first: for a moment there may be two, but hardly none."""
    labels = (await api.get(PODS, namespace, leader.name))["metadata"].get("labels", {})
    if labels.get(LEADER_LABEL) != LEADS:
        await api.patch_labels(PODS, namespace, leader.name, uid=leader.uid, labels={LEADER_LABEL: LEADS})
    selector = f"{LEADER_LABEL},{INSTANCE_LABEL}={labels.get(INSTANCE_LABEL, '')}"
    for pod in await api.list(PODS, namespace, label_selector=selector):
        metadata = pod["metadata"]
        if metadata["uid"] != leader.uid:
            await _take_off(api, namespace, metadata["name"], metadata["uid"])


async def _take_off(api: KubeApi, namespace: str, name: str, uid: str) -> None:
    try:
        await api.patch_labels(PODS, namespace, name, uid=uid, labels={LEADER_LABEL: None})
    except (NotFound, Conflict):
        return  # it is gone, and its label with it
