"""An operator of another version takes over while a job trains: the gang stays what it is until nothing of it is left."""

from dataclasses import replace
from typing import Any

import pytest

from finetune_agent.reporting import fit
from finetune_api import protocol
from finetune_api.contract import PROFILE_ANNOTATION
from finetune_api.protocol import AgentState, Order, Report, from_wire, to_wire
from finetune_operator.jobserver.plausible import check_plausible
from finetune_operator.kube.api import CONFIG_MAPS, PODS
from finetune_operator.kube_object import KubeObject
from finetune_operator.render.profile import find_example
from finetune_operator.settings import Settings
from finetune_operator.views import ContainerView, PodView
from tests.operator.documents import settings
from tests.operator.simulation import Cluster
from tests.operator.story import idle_report

SILENT_SECONDS = Settings.model_fields["silent_seconds"].default
NEXT = """
operatorImage: registry.example/finetune-operator:0.2.0
service: renamed
profiles: {default: {image: "registry.example/finetune-trainer:0.2.0"}}
"""


def images(cluster: Cluster) -> set[tuple[str, str]]:
    """What the pods run: the tags of agent and trainer."""
    return {
        tuple(
            container["image"].partition(":")[2]
            for container in (*pod["spec"]["initContainers"], *pod["spec"]["containers"])
        )
        for pod in cluster.pods()
    }


async def test_taking_over_changes_nothing_of_what_trains() -> None:
    cluster = Cluster()
    await cluster.settle()
    before, writes, status = cluster.pods(), len(cluster.api.writes), cluster.status
    cluster.restart_operator(NEXT)
    await cluster.settle()
    assert (cluster.pods(), cluster.status, cluster.api.writes[writes:]) == (before, status, [])


async def test_a_new_leader_that_has_heard_nobody_yet_writes_nothing_of_it() -> None:
    cluster = Cluster()
    await cluster.settle()
    writes, status = len(cluster.api.writes), cluster.status
    cluster.restart_operator()
    assert await cluster.reconcile() == SILENT_SECONDS, "to look again"
    cluster.wait(SILENT_SECONDS - 1)
    assert await cluster.reconcile() == 1
    assert (cluster.phase, cluster.api.writes[writes:]) == ("Running", [])
    cluster.wait(1)
    await cluster.reconcile()
    assert cluster.status != status, "who says nothing for so long is not known to train"
    await cluster.settle()
    assert cluster.phase == "Running"


async def test_a_new_leader_that_has_heard_nobody_yet_sees_that_a_pod_is_gone() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.restart_operator()
    cluster.remove_pod(cluster.status["gang"]["members"][1]["uid"])
    cluster.watch()
    await cluster.reconcile()
    assert cluster.generation == 2


async def test_a_pod_that_is_replaced_runs_what_its_peers_run() -> None:
    cluster = Cluster(nodes=3)
    await cluster.settle()
    (config,) = cluster.api.bodies(CONFIG_MAPS)
    cluster.restart_operator(NEXT)
    for _ in range(2):
        cluster.wait(100)  # no back-off after quick failures
        cluster.remove_pod(cluster.status["gang"]["members"][1]["uid"])
        await cluster.settle()
        assert (cluster.phase, len(cluster.pods())) == ("Running", 3)
        assert images(cluster) == {("0.1.0", "0.1.0")}
    assert cluster.api.bodies(CONFIG_MAPS) == [config], "nor do they read anything else"


OTHER_PROFILE = """
profiles:
  default:
    image: registry.example/finetune-trainer:0.1.0
    nodeSelector: {pool: new}
    sharedMemory: 2Gi
    environment: {NCCL_DEBUG: WARN}
  fabric: {image: "registry.example/finetune-trainer:0.1.0", runtimeClassName: nvidia}
"""
ONLY_ANOTHER = """
profiles: {other: {image: "registry.example/finetune-trainer:0.1.0"}}
allowedEndpoints: ["http://store.example:8333"]
"""


def made_alike(pod: KubeObject) -> KubeObject:
    """What a profile decides of a pod, and all else that is the same for every rank."""
    spec = {name: value for name, value in pod["spec"].items() if name != "nodeName"}
    return {"profile": pod["metadata"]["annotations"][PROFILE_ANNOTATION], "spec": spec}


@pytest.mark.parametrize("changes", [OTHER_PROFILE, ONLY_ANOTHER], ids=["changed", "removed"])
async def test_a_pod_that_is_replaced_is_made_by_the_profile_of_its_peers(changes: str) -> None:
    cluster = Cluster(nodes=3)
    await cluster.settle()
    (before, *others) = [made_alike(pod) for pod in cluster.pods()]
    assert all(other == before for other in others)
    cluster.restart_operator(changes)
    for _ in range(3):  # until none is left that the first operator has made
        cluster.wait(100)
        cluster.remove_pod(cluster.status["gang"]["members"][0]["uid"])
        await cluster.settle()
        assert (cluster.phase, len(cluster.pods())) == ("Running", 3)
        assert [made_alike(pod) for pod in cluster.pods()] == [before] * 3


RAN = ContainerView("trainer", is_init=False, last_exit_code=1)
RUNS = ContainerView("trainer", is_init=False, running=True)
LEAVING = PodView(namespace="team-a", name="x", uid="x", job="j", job_uid="u", rank=0, generation=1, created="", deleting=True, containers=(RUNS,), agent_image=settings().operator_image)  # fmt: skip
EXAMPLES = {
    "one that trains": (replace(LEAVING, deleting=False, agent_image="older"), True),
    "one that is drained": (LEAVING, True),
    "one that was evicted": (replace(LEAVING, phase="Failed", deleting=False, containers=(RAN,)), True),
    "one that is between two starts": (replace(LEAVING, deleting=False, containers=(RAN,)), True),
    "one that never ran": (replace(LEAVING, containers=()), False),
    "one whose agent only was put there": (replace(LEAVING, containers=(replace(RUNS, name="agent", is_init=True),)), False),
    "one on a node that is gone": (replace(LEAVING, node_lost=True), False),
    "one that another version made": (replace(LEAVING, agent_image="older"), False),
}  # fmt: skip


@pytest.mark.parametrize(("pod", "is_one"), EXAMPLES.values(), ids=EXAMPLES.keys())
def test_which_pod_is_an_example(pod: PodView, is_one: bool) -> None:
    assert (find_example([pod], settings()) is pod) == is_one


def test_one_that_trains_is_the_better_example() -> None:
    trains = replace(LEAVING, deleting=False, agent_image="older")
    assert find_example([LEAVING, trains], settings()) is trains


def ask_to_go(cluster: Cluster, uid: str) -> None:
    (body,) = (pod for pod in cluster.pods() if pod["metadata"]["uid"] == uid)
    body["metadata"]["deletionTimestamp"] = "2026-01-01T12:01:00Z"
    cluster.api.store(PODS, body)


@pytest.mark.parametrize("changes", [OTHER_PROFILE, ONLY_ANOTHER], ids=["changed", "removed"])
async def test_the_only_pod_that_is_drained_is_replaced_by_its_like(changes: str) -> None:
    cluster = Cluster(nodes=1)
    await cluster.settle()
    (before,) = map(made_alike, cluster.pods())
    cluster.restart_operator(changes)
    for _ in range(2):
        ask_to_go(cluster, cluster.status["gang"]["members"][0]["uid"])
        await cluster.settle()
        assert (cluster.phase, list(map(made_alike, cluster.pods()))) == ("Running", [before])


@pytest.mark.parametrize(
    "changes", [NEXT, OTHER_PROFILE], ids=["another version of the operator", "a pod that never ran"]
)
async def test_an_only_pod_that_is_no_example(changes: str) -> None:
    cluster = Cluster(nodes=1)
    if changes == NEXT:
        await cluster.settle()
    else:
        await cluster.reconcile()
        cluster.watch()
    cluster.restart_operator(changes)
    (first,) = cluster.pods()
    ask_to_go(cluster, first["metadata"]["uid"])
    await cluster.settle()
    (pod,) = cluster.pods()
    assert cluster.phase == "Running"
    assert pod["metadata"]["annotations"] != first["metadata"]["annotations"]


async def test_a_job_that_starts_anew_is_made_by_the_profile_as_it_is() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.restart_operator(OTHER_PROFILE)
    for suspend in (True, False):
        cluster.edit(suspend=suspend)
        await cluster.settle()
    assert [pod["spec"].get("nodeSelector") for pod in cluster.pods()] == [{"pool": "new"}] * 2


@pytest.mark.parametrize(
    "spoilt", ["", "{", "[]", "1", '{"default": {"image": 1}}', '{"default": {"hostNetwork": true}}']
)
async def test_a_profile_on_a_pod_that_cannot_be_read_is_as_good_as_none(spoilt: str) -> None:
    cluster = Cluster()
    await cluster.settle()
    for pod in cluster.pods():
        pod["metadata"]["annotations"][PROFILE_ANNOTATION] = spoilt
        cluster.api.store(PODS, pod)
    cluster.restart_operator(OTHER_PROFILE)
    cluster.remove_pod(cluster.status["gang"]["members"][1]["uid"])
    await cluster.settle()
    assert [pod["spec"].get("nodeSelector") for pod in cluster.pods()] == [None, {"pool": "new"}]


async def test_a_gang_of_which_nothing_is_left_is_made_anew() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.restart_operator(NEXT)
    for pod in list(cluster.pods()):
        cluster.remove_pod(pod["metadata"]["uid"])
    await cluster.settle()
    assert (cluster.phase, images(cluster)) == ("Running", {("0.2.0", "0.2.0")})
    (config,) = cluster.api.bodies(CONFIG_MAPS)
    assert "renamed.finetune-system" in config["data"]["job.json"]


async def test_a_suspended_job_comes_back_with_the_newest() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.restart_operator(NEXT)
    cluster.edit(suspend=True)
    await cluster.settle()
    cluster.edit(suspend=False)
    await cluster.settle()
    assert (cluster.phase, images(cluster)) == ("Running", {("0.2.0", "0.2.0")})


async def test_what_never_ran_is_no_example() -> None:
    """A pod whose image cannot be pulled: another one beside it gets what the administrator has mended."""
    cluster = Cluster()
    await cluster.reconcile()
    cluster.watch()
    cluster.restart_operator(NEXT)
    cluster.remove_pod(cluster.pods()[0]["metadata"]["uid"])
    cluster.watch()
    await cluster.reconcile()
    assert images(cluster) == {("0.1.0", "0.1.0"), ("0.2.0", "0.2.0")}


# What agents of other versions say.


def test_a_report_of_the_first_agents_is_understood() -> None:
    """It has none of the fields that came later. Frozen: agents like this run in pods that the operator does not touch."""
    oldest = {
        "podUid": "pod-1",
        "instance": "a",
        "agentVersion": "0.1.0",
        "generation": 3,
        "state": "Running",
        "address": "10.0.0.1",
        "port": 29500,
        "protocol": 1,
        "heartbeat": {"phase": "Training", "step": 7},
        "exits": [{"generation": 2, "rank": 0, "exitCode": 1}],
    }
    report = from_wire(Report, oldest)
    check_plausible(report)
    assert report.protocol in protocol.SERVED_VERSIONS
    assert (report.state, report.generation, report.exits[0].exit_code) == (AgentState.RUNNING, 3, 1)


def test_an_order_of_the_first_operators_is_understood() -> None:
    """After a rollback a new agent hears an old operator."""
    oldest = {"action": "Run", "generation": 3, "rank": 1, "nodes": 2, "processesPerNode": 1, "masterAddress": "10.0.0.1", "masterPort": 29500, "graceSeconds": 0, "protocol": 1}  # fmt: skip
    order = from_wire(Order, oldest)
    assert (order.rank, order.nodes, order.master_address, order.master_port) == (1, 2, "10.0.0.1", 29500)
    assert order.checkpoint is None, "so its workers save as the mounted file says"


def add_unknown(value: Any) -> Any:
    """Put a field that nobody knows into every object."""
    if isinstance(value, dict):
        return {name: add_unknown(member) for name, member in value.items()} | {"fromTheFuture": {"a": [1]}}
    return [add_unknown(member) for member in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", [Report, Order])
def test_fields_from_the_future_are_passed_over_at_any_depth(kind: Any) -> None:
    message = (
        replace(
            idle_report("pod-1", 0),
            heartbeat=protocol.Heartbeat(protocol.Phase.TRAINING, 3),
            exits=[protocol.Exit(1, 0, 1)],
        )
        if kind is Report
        else Order(protocol.Action.RUN, 3, 1, 2, checkpoint=protocol.CheckpointWish(interval_steps=50))
    )
    assert from_wire(kind, add_unknown(to_wire(message))) == message


def test_this_version_serves_itself() -> None:
    assert max(protocol.SERVED_VERSIONS) == protocol.PROTOCOL_VERSION
    assert len(fit(idle_report("pod-1", 0))) > 0
