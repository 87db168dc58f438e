"""Nodes that are cut off, agents that are not heard, and an operator or API server that is away, on the real cluster.

The control plane calls a node not ready about 20 s after the cut. Jobs here ask for little: one node may have to hold two pods.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from finetune_api.contract import LEADER_LABEL
from tests.cluster.cluster import Cluster
from tests.cluster.console import ClusterError
from tests.cluster.installation import RELEASE, SYSTEM_NAMESPACE
from tests.cluster.jobs import Job, submit, wait_until
from tests.cluster.training_inputs import script_spec

AWAY_SECONDS = 60
OPERATOR_PORT = 9443  # of its job server

# Trains in step with its peers, as far as a gang is concerned: a step is a collective, and is told to the agent. Ends when one has seen the file.
IN_STEP = """
import json, os, pathlib, socket, time
import torch, torch.distributed
torch.distributed.init_process_group("gloo")
agent = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
agent.setblocking(False)
rank, generation, step, done = int(os.environ["RANK"]), int(os.environ["FINETUNE_GENERATION"]), 0, torch.zeros(1)
while not done:
    time.sleep(0.2)
    done = torch.tensor(float(pathlib.Path("/scratch/done").exists()))
    torch.distributed.all_reduce(done)
    step += 1
    pathlib.Path("/scratch/step").write_text(f"{generation} {step}")
    beat = {"kind": "heartbeat", "rank": rank, "generation": generation, "heartbeat": {"phase": "Training", "step": step}}
    try:
        agent.sendto(json.dumps(beat).encode(), os.environ["FINETUNE_PROGRESS_SOCKET"])
    except OSError:
        pass  # an agent that does not listen stops no training
"""

SIGNAL_AGENT = """
import os, pathlib, signal, sys
def words(path): return path.read_bytes().split(b"\\0")
found = [int(p.parent.name) for p in pathlib.Path("/proc").glob("[0-9]*/cmdline")
         if words(p)[1:3] == [b"/finetune/agent.pyz", b"agent"]]
assert len(found) == 1, found
os.kill(found[0], getattr(signal, sys.argv[1]))
"""


@pytest.fixture(scope="module")
def three_nodes(operator: Cluster) -> Cluster:
    """One node to lose, one that stays, one to go to."""
    while len(operator.nodes()) < 3:
        operator.add_node()
    return operator


def train(cluster: Cluster, namespace: str, name: str, **workers: Any) -> Job:
    """A gang of two that trains in step."""
    spec = script_spec(cluster, IN_STEP)
    spec["workers"] |= {"resources": {"cpu": "500m", "memory": "1Gi"}, **workers}
    job = submit(cluster, namespace, name, spec)
    job.wait_for_phase("Running")
    return job


def finish(job: Job) -> dict[str, Any]:
    """Have the gang end its work; one member that sees the file is enough."""
    member = job.status()["gang"]["members"][0]["pod"]
    job.run_in(member, "touch", "/scratch/done")
    return job.wait_for_phase("Succeeded")


def nodes_of(job: Job) -> dict[str, str]:
    return {pod["metadata"]["name"]: pod["spec"].get("nodeName", "") for pod in job.pods()}


def a_member_to_lose(job: Job) -> dict[str, Any]:
    """A member that shares its node neither with the operator that leads, nor with another pod of the job."""
    operators = json.loads(job.cluster.kubectl("get", "pods", "-n", SYSTEM_NAMESPACE, "-o", "json"))["items"]
    leaders = [pod for pod in operators if LEADER_LABEL in pod["metadata"]["labels"]] or operators
    taken, nodes = [pod["spec"]["nodeName"] for pod in leaders], nodes_of(job)
    members = job.status()["gang"]["members"]
    free = [member for member in members if nodes[member["pod"]] not in taken]
    alone = [member for member in free if list(nodes.values()).count(nodes[member["pod"]]) == 1]
    assert alone, f"no member is alone on a node without the operator: {nodes}, operator on {taken}"
    return alone[-1]


@contextmanager
def cut_off(cluster: Cluster, node: str) -> Iterator[float]:
    """A node is cut off; yields when."""
    cluster.cut_node(node)
    try:
        yield time.monotonic()
    finally:
        cluster.heal_node(node)
        cluster.wait_for_ready(node)


def lost_and_recovered(status: dict[str, Any]) -> bool:
    return status["gang"]["generation"] == 2 and status["phase"] == "Running"


# A node is gone.


@pytest.mark.parametrize(
    "spares", [pytest.param(0, id="without a spare", marks=pytest.mark.long), pytest.param(1, id="with a spare")]
)
def test_a_node_that_is_cut_off_costs_its_pod_and_no_more(three_nodes: Cluster, namespace: str, spares: int) -> None:
    job = train(three_nodes, namespace, f"cut-{spares}", spares=spares)
    if spares:
        job.wait("the spare is warm", lambda s: s["gang"].get("spares") == 1)
    lost = a_member_to_lose(job)
    node, before = nodes_of(job)[lost["pod"]], job.status()["gang"]["members"]
    with cut_off(three_nodes, node) as cut_at:
        job.wait("the loss is seen", lambda s: s["gang"]["generation"] == 2, 60)
        seen_at = time.monotonic()
        status = job.wait("the gang trains elsewhere", lost_and_recovered, 120)
        trains_at = time.monotonic()
        attempt = status["attempts"][0]
        assert (attempt["reason"], attempt["node"], attempt["pod"]) == ("NodeLost", node, lost["pod"])
        assert [entry["node"] for entry in status["gang"]["avoidNodes"]] == [node]
        after = {member["rank"]: member for member in status["gang"]["members"]}
        for member in before:
            assert (after[member["rank"]]["uid"] == member["uid"]) == (member["pod"] != lost["pod"])
        replacement = after[lost["rank"]]["pod"]
        assert nodes_of(job)[replacement] not in ("", node)
        assert (replacement in [member["pod"] for member in status["gang"]["standIns"]]) == bool(spares)
        assert lost["pod"] in nodes_of(job), "it is stuck, and nobody waits for it"
        if spares:
            job.wait("a spare stands behind again", lambda s: s["gang"].get("spares") == 1, 120)
        print(f"cut → seen {seen_at - cut_at:.1f} s, seen → trains {trains_at - seen_at:.1f} s")
    wait_until("the lost pod goes when its node is back", lambda: lost["pod"] not in nodes_of(job), 90)
    done = finish(job)
    assert (done["gang"]["generation"], done["restarts"]["total"]) == (2, 1)
    job.delete()


@pytest.mark.long
def test_a_pod_stuck_on_a_dead_node_keeps_no_job_from_being_suspended(three_nodes: Cluster, namespace: str) -> None:
    job = train(three_nodes, namespace, "stuck")
    lost = a_member_to_lose(job)
    node = nodes_of(job)[lost["pod"]]
    with cut_off(three_nodes, node):
        job.patch({"suspend": True})
        job.wait("it is suspended", lambda s: said(s, "Ready") == ("True", "Suspended"), 150)
        assert f"pod {lost['pod']} is still there: node {node} cannot be reached" in job.condition("Ready")["message"]
        job.patch({"suspend": False})
        status = job.wait("it trains again", lambda s: s["phase"] == "Running", 120)
        assert node not in {nodes_of(job)[member["pod"]] for member in status["gang"]["members"]}
    done = finish(job)
    assert "restarts" not in done
    job.delete()


@pytest.mark.long
def test_a_node_whose_kubelet_is_gone_costs_nothing_while_its_pod_is_heard(
    three_nodes: Cluster, namespace: str
) -> None:
    job = train(three_nodes, namespace, "headless")
    lost = a_member_to_lose(job)
    node, before = nodes_of(job)[lost["pod"]], steps_of(job)
    three_nodes.kill_kubelet(node)
    try:
        three_nodes.wait_for_ready(node, ready=False)
        time.sleep(20)
        assert job.status()["phase"] == "Running"
    finally:
        three_nodes.start_kubelet(node)
        three_nodes.wait_for_ready(node)
    wait_until("the kubelet knows its pods again", lambda: can_be_entered(job, lost["pod"]), 60)
    assert goes_on(steps_of(job), before)
    assert finish(job)["gang"]["generation"] == 1
    job.delete()


# Somebody is not heard.


def test_an_agent_that_is_silent_while_its_gang_goes_on_is_told_as_unknown(operator: Cluster, namespace: str) -> None:
    job = train(operator, namespace, "mute")
    mute = job.status()["gang"]["members"][1]["pod"]
    before = steps_of(job)
    job.run_in(mute, "python3", "-c", SIGNAL_AGENT, "SIGSTOP")
    job.wait("nobody knows", lambda s: said(s, "Ready") == ("Unknown", "AgentSilent"), 60)
    assert f"pod {mute}" in job.condition("Ready")["message"]
    assert job.status()["phase"] == "Running"
    job.run_in(mute, "python3", "-c", SIGNAL_AGENT, "SIGCONT")
    job.wait("it is heard again", lambda s: said(s, "Ready") == ("True", "Running"), 30)
    assert goes_on(steps_of(job), before)
    assert finish(job)["gang"]["generation"] == 1
    job.delete()


@contextmanager
def no_way_to_the_operator(cluster: Cluster, node: str) -> Iterator[str]:
    cluster.drop_forwarded(OPERATOR_PORT, node)
    try:
        yield "its agent was never heard"
    finally:
        cluster.forward_again(OPERATOR_PORT, node)


@contextmanager
def no_network_for_new_pods(cluster: Cluster, node: str) -> Iterator[str]:
    cluster.node(node).break_network_of_new_pods()
    try:
        yield "has neither network nor volumes"
    finally:
        cluster.node(node).mend_network_of_new_pods()


@pytest.mark.long
@pytest.mark.parametrize("broken", [no_way_to_the_operator, no_network_for_new_pods])
def test_a_pod_that_its_node_keeps_from_the_operator_is_made_elsewhere(
    three_nodes: Cluster, namespace: str, broken: Callable[[Cluster, str], Any]
) -> None:
    operators = json.loads(three_nodes.kubectl("get", "pods", "-n", SYSTEM_NAMESPACE, "-o", "json"))["items"]
    node = ({one.name for one in three_nodes.nodes()} - {pod["spec"]["nodeName"] for pod in operators}).pop()
    spec = script_spec(three_nodes, IN_STEP)
    spec["workers"] |= {"nodes": 3, "resources": {"cpu": "500m", "memory": "1Gi"}}
    with broken(three_nodes, node) as why:
        job = submit(three_nodes, namespace, broken.__name__.replace("_", "-"), spec)
        wait_until("its pods are there", lambda: len(job.pods()) == 3, 60)
        wait_until("they have nodes", lambda: all(nodes_of(job).values()), 60)
        assert node in nodes_of(job).values(), "the scheduler spreads them"
        status = job.wait("the gang trains elsewhere", lambda s: s["phase"] == "Running", 420)
    attempt = status["attempts"][0]
    assert (attempt["reason"], attempt["node"]) == ("PodNeverHeard", node)
    assert why in attempt["message"]
    assert [entry["node"] for entry in status["gang"]["avoidNodes"]] == [node]
    assert node not in {nodes_of(job)[member["pod"]] for member in status["gang"]["members"]}
    assert [entry.get("used", 0) for entry in status["restarts"]["byReason"]] == [0]
    assert finish(job)["gang"]["generation"] == 2
    job.delete()


@contextmanager
def the_api_server_away(cluster: Cluster) -> Iterator[None]:
    cluster.stop_apiserver()
    try:
        yield
    finally:
        cluster.start_apiserver()


@contextmanager
def the_operator_away(cluster: Cluster) -> Iterator[None]:
    scale = ("scale", "-n", SYSTEM_NAMESPACE, f"deployment/{RELEASE}")
    replicas = cluster.kubectl(
        "get", "-n", SYSTEM_NAMESPACE, f"deployment/{RELEASE}", "-o", "jsonpath={.spec.replicas}"
    )
    cluster.kubectl(*scale, "--replicas=0")
    try:
        yield
    finally:
        cluster.kubectl(*scale, f"--replicas={replicas}")
        cluster.kubectl("rollout", "status", "-n", SYSTEM_NAMESPACE, f"deployment/{RELEASE}", "--timeout=90s")


@contextmanager
def the_operator_deaf(cluster: Cluster) -> Iterator[None]:
    """The operator has its API server, and no agent can reach it: what it serves is dropped on every node."""
    cluster.drop_forwarded(OPERATOR_PORT)
    try:
        yield
    finally:
        cluster.forward_again(OPERATOR_PORT)


@pytest.fixture(scope="module")
def steady(operator: Cluster, namespace: str) -> Iterator[Job]:
    """A job that trains through all of this."""
    job = train(operator, namespace, "steady-in-step")
    yield job
    assert finish(job)["gang"]["generation"] == 1
    job.delete()


@pytest.mark.long
@pytest.mark.parametrize("away", [the_operator_away, the_api_server_away, the_operator_deaf])
def test_training_goes_on_and_nothing_is_restarted_when_it_is_over(
    operator: Cluster, steady: Job, away: Callable[[Cluster], Any]
) -> None:
    members, before = steady.status()["gang"]["members"], steps_of(steady)
    with away(operator):
        time.sleep(AWAY_SECONDS)
        if away is the_operator_deaf:
            status = steady.status()
            assert said(status, "Ready") == ("Unknown", "NoAgentHeard"), status
    status = steady.wait("all is well again", lambda s: said(s, "Ready") == ("True", "Running"), 90)
    time.sleep(35)  # longer than an agent may be silent: whoever is missed would be missed by now
    status = steady.status()
    assert (status["gang"]["generation"], status["gang"]["members"]) == (1, members)
    assert "restarts" not in status
    assert said(status, "Ready") == ("True", "Running")
    assert goes_on(steps_of(steady), before)


# What can be read.


def said(status: dict[str, Any], kind: str) -> tuple[str, str]:
    """Return status and reason of a condition."""
    found = next(condition for condition in status["conditions"] if condition["type"] == kind)
    return found["status"], found["reason"]


def steps_of(job: Job) -> list[tuple[int, int]]:
    """Return generation and step of each member, from its own disk, as soon as it has done one."""
    wait_for_one = "until test -s /scratch/step; do sleep 0.2; done; cat /scratch/step"
    members = job.status()["gang"]["members"]
    texts = [job.run_in(member["pod"], "timeout", "60", "sh", "-c", wait_for_one).split() for member in members]
    return [(int(generation), int(step)) for generation, step in texts]


def can_be_entered(job: Job, pod: str) -> bool:
    try:
        job.run_in(pod, "true")
    except ClusterError:
        return False
    return True


def goes_on(now: list[tuple[int, int]], before: list[tuple[int, int]]) -> bool:
    """Tell whether all members have gone on in the same generation."""
    return all(new[0] == old[0] and new[1] > old[1] for new, old in zip(now, before, strict=True))
