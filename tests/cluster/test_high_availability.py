"""Two replicas of the operator on the real cluster: the leader dies, is cut off, is replaced, and training does not notice. Nor does it
when the release is upgraded, rolled back, uninstalled and installed again.

How long it takes until status moves again is printed.
"""

import json
import time
from collections.abc import Iterator

import pytest
import yaml

from tests.cluster.cluster import Cluster
from tests.cluster.console import say
from tests.cluster.installation import (
    CRDS_RELEASE,
    RELEASE,
    ROOT,
    SYSTEM_NAMESPACE,
    install_on,
    leader,
    uninstall_operator,
)
from tests.cluster.jobs import Job, submit, wait_until
from tests.cluster.training_inputs import script_spec

# Tells a step twice a second, and ends when told to by a file.
TRAINING = """
import json, os, pathlib, socket, time
rank, generation = int(os.environ["RANK"]), int(os.environ["FINETUNE_GENERATION"])
beats, step = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), 0
while not pathlib.Path("/scratch/done").exists():
    step += 1
    for kind, what in (("heartbeat", {"phase": "Training", "step": step}), ("progress", {"step": step})):
        if kind == "heartbeat" or rank == 0:
            beat = {"kind": kind, "rank": rank, "generation": generation, kind: what}
            beats.sendto(json.dumps(beat).encode(), os.environ["FINETUNE_PROGRESS_SOCKET"])
    time.sleep(0.5)
"""

# What an agent would do: asks for its order, of one replica and not of the Service.
ASK = """
import os, ssl, sys, urllib.error, urllib.request
token = open("/var/run/secrets/finetune/token").read()
url = "https://%s:9443/v1/order?pod_uid=%s" % (sys.argv[1], os.environ["FINETUNE_POD_UID"])
request = urllib.request.Request(url, headers={"Authorization": "Bearer " + token})
try:
    print(urllib.request.urlopen(request, timeout=10, context=ssl._create_unverified_context()).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""

LEASE_SECONDS = 15
# Until the next leads, agents have found it, and their next progress has been written: 10 s each at most, and this machine is small.
AGAIN_SECONDS = 60


@pytest.fixture
def job(operator: Cluster, namespace: str) -> Iterator[Job]:
    """A job that trains, in sight of a leader and a standby. It must end as its first generation, with the pods it began with."""
    wait_for_replicas(operator)
    job = submit(operator, namespace, "undisturbed", script_spec(operator, TRAINING))
    before = job.wait("it trains", lambda s: s.get("phase") == "Running" and s.get("progress", {}).get("step", 0) > 0)
    try:
        yield job
        after = job.status()
        assert after["gang"]["generation"] == 1
        assert after["gang"]["members"] == before["gang"]["members"]
        for pod in job.pods():
            job.run_in(pod["metadata"]["name"], "touch", "/scratch/done")
        done = job.wait_for_phase("Succeeded")
        assert "attempts" not in done
        assert "restarts" not in done
    finally:
        job.delete()


def replicas(cluster: Cluster) -> list[dict]:
    selector = f"app.kubernetes.io/instance={RELEASE}"
    said = cluster.kubectl("get", "pods", "--namespace", SYSTEM_NAMESPACE, "-l", selector, "-o", "json")
    return [pod for pod in json.loads(said)["items"] if "deletionTimestamp" not in pod["metadata"]]


def is_ready(pod: dict) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))


def restarts(pod: dict) -> int:
    return sum(status["restartCount"] for status in pod["status"].get("containerStatuses", []))


def find(cluster: Cluster, name: str) -> dict:
    return next(pod for pod in replicas(cluster) if pod["metadata"]["name"] == name)


def wait_for_replicas(cluster: Cluster) -> None:
    """Until two are ready, one of them leads, and it alone has the label."""

    def settled() -> bool:
        pods = replicas(cluster)
        labelled = [p["metadata"]["name"] for p in pods if "finetune.dev/leader" in p["metadata"]["labels"]]
        return len(pods) == 2 and all(map(is_ready, pods)) and labelled == [leader(cluster)]

    wait_until("two replicas are ready, and one leads", settled)


def wait_for_progress(cluster: Cluster, job: Job, what: str) -> float:
    """Wait until status shows a step that was made after this call; return how long that took."""
    began, seen = time.monotonic(), job.status()["progress"]["step"]
    job.wait("status moves again", lambda status: status["progress"]["step"] > seen, AGAIN_SECONDS)
    took = time.monotonic() - began
    say(f"{what}: status moves again after {took:.1f} s; {leader(cluster)} leads")
    return took


def test_the_replicas_are_on_two_nodes_and_only_one_takes_reports(operator: Cluster, job: Job) -> None:
    pods = replicas(operator)
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    trainer = job.pods()[0]["metadata"]["name"]
    said = {
        pod["metadata"]["name"]: job.run_in(trainer, "python3", "-c", ASK, pod["status"]["podIP"]).strip()
        for pod in pods
    }
    leads = leader(operator)
    assert said == {pod["metadata"]["name"]: "200" if pod["metadata"]["name"] == leads else "503" for pod in pods}


def test_a_leader_that_is_killed_is_followed_in_seconds(operator: Cluster, job: Job) -> None:
    operator.kill_container(SYSTEM_NAMESPACE, leader(operator), "operator")
    wait_for_progress(operator, job, "leader killed")
    wait_for_replicas(operator)


def test_a_leader_whose_pod_is_deleted_is_followed_at_once(operator: Cluster, job: Job) -> None:
    old = leader(operator)
    operator.kubectl("delete", "pod", "--namespace", SYSTEM_NAMESPACE, old, "--wait=false")
    wait_until("another leads", lambda: leader(operator) not in ("", old), 2 * LEASE_SECONDS)
    wait_for_progress(operator, job, "leader deleted")
    wait_for_replicas(operator)


def test_a_leader_without_an_api_server_ends_and_another_leads(operator: Cluster, job: Job) -> None:
    old = leader(operator)
    before = restarts(find(operator, old))
    with operator.without_apiserver(SYSTEM_NAMESPACE, old):
        wait_until("another leads", lambda: leader(operator) not in ("", old), 3 * LEASE_SECONDS)
        wait_for_progress(operator, job, "leader cut off from the API server")
        wait_until("its process has ended", lambda: restarts(find(operator, old)) == before + 1)
        last = find(operator, old)["status"]["containerStatuses"][0]["lastState"]["terminated"]
        assert last["exitCode"] == 1
        assert not is_ready(find(operator, old)), "it waits for the API server"
    wait_for_replicas(operator)
    assert restarts(find(operator, old)) == before + 1, "and was not started again and again meanwhile"


@pytest.mark.long
def test_an_api_server_that_is_away_for_longer_than_the_lease_disturbs_no_training(operator: Cluster, job: Job) -> None:
    operator.stop_apiserver()
    time.sleep(2 * LEASE_SECONDS)
    operator.start_apiserver()
    wait_for_progress(operator, job, "API server back")
    wait_for_replicas(operator)


def test_a_rolling_restart_disturbs_no_training(operator: Cluster, job: Job) -> None:
    old = {pod["metadata"]["name"] for pod in replicas(operator)}
    operator.kubectl("rollout", "restart", "--namespace", SYSTEM_NAMESPACE, f"deployment/{RELEASE}")
    operator.kubectl("rollout", "status", "--namespace", SYSTEM_NAMESPACE, f"deployment/{RELEASE}", "--timeout=180s")
    wait_for_progress(operator, job, "operator rolled")
    wait_for_replicas(operator)
    assert not old & {pod["metadata"]["name"] for pod in replicas(operator)}


@pytest.mark.long
def test_an_upgrade_and_the_way_back_disturb_no_training(operator: Cluster, job: Job) -> None:
    """Other settings, of the lease too: for a while one of each kind runs."""
    image = job.pods()[0]["spec"]["initContainers"][0]["image"]
    defaults = yaml.safe_load((ROOT / "charts/finetune-operator/values.yaml").read_text())["leaderElection"]
    for times in ({"leaseSeconds": 30, "renewSeconds": 20, "retrySeconds": 4}, defaults):
        install_on(operator, {"leaderElection": times})
        wait_for_replicas(operator)
        wait_for_progress(operator, job, f"lease of {times['leaseSeconds']} s")
    assert {pod["spec"]["initContainers"][0]["image"] for pod in job.pods()} == {image}


@pytest.mark.long
def test_a_release_that_is_rolled_back_disturbs_no_training(operator: Cluster, job: Job) -> None:
    """By Helm, from other values and other profiles."""
    said = operator.helm("status", RELEASE, "--namespace", SYSTEM_NAMESPACE, "-o", "json")
    install_on(operator, {"progressSeconds": 2, "profiles": other_profile(operator)})
    wait_for_replicas(operator)
    wait_for_progress(operator, job, "upgraded")
    revision = str(json.loads(said)["version"])
    operator.helm("rollback", RELEASE, revision, "--namespace", SYSTEM_NAMESPACE, "--wait", "--timeout", "120s")
    wait_for_replicas(operator)
    wait_for_progress(operator, job, "rolled back")


@pytest.mark.long
def test_an_uninstall_leaves_what_trains_to_the_next_installation(operator: Cluster, job: Job) -> None:
    """Both charts: the CRD, the job, its children and the authority that its agents trust are there when they come back."""
    of_job = ("--namespace", job.namespace, "-l", f"finetune.dev/job={job.name}")
    children = ("get", "pods,configmaps,networkpolicies", *of_job, "-o", "jsonpath={.items[*].metadata.uid}")
    before = operator.kubectl(*children)
    assert len(before.split()) == 4
    try:
        uninstall_operator(operator)
        operator.helm("uninstall", CRDS_RELEASE, "--namespace", SYSTEM_NAMESPACE)
        wait_until("no replica is left", lambda: not replicas(operator))
        assert operator.kubectl(*children) == before
        assert [restarts(pod) for pod in job.pods()] == [0] * len(job.pods())
    finally:
        install_on(operator)
    wait_for_replicas(operator)
    wait_for_progress(operator, job, "installed again")
    assert operator.kubectl(*children) == before


@pytest.mark.long
def test_a_profile_that_changes_reaches_a_job_when_it_starts_anew(operator: Cluster, namespace: str) -> None:
    job = submit(operator, namespace, "kept-profile", script_spec(operator, TRAINING))
    job.wait_for_phase("Running")
    try:
        install_on(operator, {"profiles": other_profile(operator)})
        wait_for_replicas(operator)
        operator.kubectl("delete", "pod", "--namespace", namespace, job.pods()[1]["metadata"]["name"])
        job.wait("the pod is replaced", lambda s: s["gang"]["generation"] > 1 and s["phase"] == "Running")
        assert [flavours(pod) for pod in job.pods()] == [[], []]
        job.patch({"suspend": True})
        job.wait_for_phase("Suspended")
        job.patch({"suspend": False})
        job.wait_for_phase("Running")
        assert [flavours(pod) for pod in job.pods()] == [["other"], ["other"]]
    finally:
        install_on(operator)
    job.delete()


def other_profile(cluster: Cluster) -> dict:
    return {"default": {"image": cluster.trainer_image, "environment": {"FLAVOUR": "other"}}}


def flavours(pod: dict) -> list[str]:
    environment = pod["spec"]["containers"][0]["env"]
    return [variable["value"] for variable in environment if variable["name"] == "FLAVOUR"]
