"""The label that leads agents to the leader."""

from typing import Any

import pytest

from finetune_operator.kube.api import PODS
from finetune_operator.kube.errors import Conflict, NotFound, Unavailable
from finetune_operator.leader import OwnPod
from finetune_operator.leader_label import show_leader
from tests.operator.fake_api import FakeKubeApi

HOME = "finetune-system"
LEADER = "finetune.dev/leader"


def store(api: FakeKubeApi, name: str, *, instance: str = "ours", namespace: str = HOME, **labels: str) -> None:
    labels |= {"app.kubernetes.io/instance": instance}
    metadata = {"name": name, "namespace": namespace, "uid": f"uid-{name}", "labels": labels}
    api.store(PODS, {"kind": "Pod", "metadata": metadata})


def leaders(api: FakeKubeApi) -> set[str]:
    return {pod["metadata"]["name"] for pod in api.bodies(PODS) if LEADER in pod["metadata"]["labels"]}


@pytest.fixture
def api() -> FakeKubeApi:
    api = FakeKubeApi()
    store(api, "a", **{LEADER: "true"})
    store(api, "b")
    store(api, "c", **{LEADER: "true"})
    store(api, "of-another-release", instance="theirs", **{LEADER: "true"})
    store(api, "elsewhere", namespace="other", **{LEADER: "true"})
    return api


async def test_the_leader_takes_the_label_from_all_others_of_its_release(api: FakeKubeApi) -> None:
    await show_leader(api, HOME, OwnPod("b", "uid-b"))
    assert leaders(api) == {"b", "of-another-release", "elsewhere"}
    assert api.writes == ["labels pods/b", "labels pods/a", "labels pods/c"], "its own first"


async def test_looking_again_writes_nothing(api: FakeKubeApi) -> None:
    await show_leader(api, HOME, OwnPod("b", "uid-b"))
    writes = len(api.writes)
    await show_leader(api, HOME, OwnPod("b", "uid-b"))
    assert len(api.writes) == writes
    api.objects["pods", HOME, "b"]["metadata"]["labels"].pop(LEADER)  # somebody's mistake
    await show_leader(api, HOME, OwnPod("b", "uid-b"))
    assert "b" in leaders(api)


@pytest.mark.parametrize("error", [NotFound("gone"), Conflict("another")], ids=["is gone", "is another by now"])
async def test_a_pod_that_is_gone_meanwhile_is_no_matter(api: FakeKubeApi, error: Exception) -> None:
    patch = api.patch_labels

    async def one_is_gone(resource: Any, namespace: str, name: str, **arguments: Any) -> Any:
        if name == "a":
            raise error
        return await patch(resource, namespace, name, **arguments)

    api.patch_labels = one_is_gone
    await show_leader(api, HOME, OwnPod("b", "uid-b"))
    assert leaders(api) == {"a", "b", "of-another-release", "elsewhere"}


async def test_a_refusal_is_told(api: FakeKubeApi) -> None:
    api.fail_next = "refused"
    with pytest.raises(Unavailable):
        await show_leader(api, HOME, OwnPod("b", "uid-b"))
