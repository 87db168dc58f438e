"""What fails around a gang, on the real cluster: its store, a device, a node under maintenance, the memory that it was given."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import Job, restarts_used, submit
from tests.cluster.training_inputs import recipe_spec, script_spec

# A device is broken where rank 1 runs first; the next time it runs elsewhere, or on the same node if there is no room.
BROKEN_DEVICE = """
import os
if os.environ["RANK"] == "1" and os.environ["FINETUNE_GENERATION"] == "1":
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
"""

# Tells of a step, and then wants more memory than there is.
ONE_STEP_THEN_TOO_MUCH = """
import json, os, socket, time
beat = {"kind": "heartbeat", "rank": 0, "generation": int(os.environ["FINETUNE_GENERATION"]), "heartbeat": {"phase": "Training", "step": 1}}
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(json.dumps(beat).encode(), os.environ["FINETUNE_PROGRESS_SOCKET"])
time.sleep(2)
memory = b"x" * (3 << 30)
"""

# Holds the worker up for most of the time, for so many seconds: a slow device, as far as the gang can tell.
SLOW_DOWN = """
import os, pathlib, signal, sys, time
(worker,) = [int(f.parent.name) for f in pathlib.Path("/proc").glob("[0-9]*/comm") if f.read_text().startswith("worker ")]
until = time.monotonic() + float(sys.argv[1])
while time.monotonic() < until:
    os.kill(worker, signal.SIGSTOP); time.sleep(0.04)
    os.kill(worker, signal.SIGCONT); time.sleep(0.01)
"""


def delayed(job: Job) -> tuple[str, str]:
    condition = job.condition("CheckpointsDelayed")
    return condition["status"], condition["message"]


def test_a_store_that_is_away_delays_checkpoints_and_stops_no_training(operator: Cluster, namespace: str) -> None:
    spec = recipe_spec(operator, steps=2500)
    spec["checkpoint"] = {"interval": {"steps": 50}}
    job = submit(operator, namespace, "storeless", spec)
    before = job.wait("a checkpoint", lambda status: status.get("checkpoint", {}).get("step", 0) >= 50)
    with operator.without_store():
        job.wait("it is told", lambda _: delayed(job)[0] == "True", 90)
        told = job.status()["progress"]["step"]
        during = job.wait("it trains on", lambda s: s["progress"]["step"] > told, 60)
        assert during["phase"] == "Running"
        assert during["checkpoint"]["step"] - before["checkpoint"]["step"] <= during["progress"]["step"]
    job.wait("commits go on", lambda s: s["checkpoint"]["step"] > told, 180)
    job.wait("nothing is delayed", lambda _: delayed(job)[0] == "False")
    done = job.wait_for_phase("Succeeded", 400)
    assert (done["gang"]["generation"], "restarts" in done, "attempts" in done) == (1, False, False)
    assert done["checkpoint"]["step"] == 2500
    job.delete()


def test_a_broken_device_costs_its_pod_and_the_node_is_avoided(operator: Cluster, namespace: str) -> None:
    job = submit(operator, namespace, "ecc", script_spec(operator, BROKEN_DEVICE))
    first = {pod["metadata"]["name"]: pod for pod in job.wait_for_phase("Running") and job.pods()}
    done = job.wait_for_phase("Succeeded")
    attempt = done["attempts"][0]
    assert (attempt["reason"], attempt["rank"]) == ("DeviceError", 1)
    assert "uncorrectable ECC error" in attempt["message"]
    broken = first[attempt["pod"]]
    assert [(entry["node"], entry["reason"]) for entry in done["gang"]["avoidNodes"]] == [
        (broken["spec"]["nodeName"], "DeviceError")
    ]
    assert done["gang"]["members"][1]["uid"] != broken["metadata"]["uid"], "another pod"
    job.delete()


@pytest.mark.long
def test_a_node_that_is_drained_costs_no_step(operator: Cluster, namespace: str) -> None:
    spec = recipe_spec(operator, steps=800)
    spec["workers"]["resources"] = {"cpu": "500m", "memory": "2Gi"}  # one node has to hold both
    job = submit(operator, namespace, "drained", spec)
    job.wait("a checkpoint", lambda status: status.get("checkpoint", {}).get("step", 0) >= 5)
    lost = job.pods()[1]
    with drained(operator, lost["spec"]["nodeName"], job):
        status = job.wait(
            "it trains again", lambda s: s["gang"]["generation"] == 2 and s.get("resumed", {}).get("generation") == 2
        )
        assert lost["spec"]["nodeName"] not in {pod["spec"]["nodeName"] for pod in job.pods()}
    assert (status["attempts"][0]["reason"], status["attempts"][0]["lostSteps"]) == ("Preempted", 0)
    assert "EvictionByEvictionAPI" in status["attempts"][0]["message"]
    done = job.wait_for_phase("Succeeded", 400)
    assert restarts_used(done) == 0
    job.delete()


def test_memory_that_never_suffices_ends_the_job_and_says_how_much_there_was(operator: Cluster, namespace: str) -> None:
    job = submit(operator, namespace, "starved", script_spec(operator, ONE_STEP_THEN_TOO_MUCH, nodes=1))
    done = job.wait_for_phase("Failed")
    failed = job.condition("Failed")
    assert failed["reason"] == "OutOfMemory"
    assert "2 times in a row without getting beyond step 1" in failed["message"]
    assert "of 3.00 GiB" in failed["message"], "2 for the workers and 1 for staging"
    assert [attempt["reason"] for attempt in done["attempts"]] == ["OutOfMemory"] * 2
    job.delete()


@pytest.mark.long
def test_a_rank_that_is_slower_than_its_peers_is_named_and_nothing_is_restarted(
    operator: Cluster, namespace: str
) -> None:
    job = submit(operator, namespace, "straggling", recipe_spec(operator, steps=6000))
    job.wait("steps", lambda status: status.get("checkpoint", {}).get("step", 0) >= 100)
    slow = job.pods()[1]["metadata"]["name"]
    command = ["kubectl", "exec", "-n", namespace, slow, "-c", "trainer", "--", "python3", "-c", SLOW_DOWN, "100"]
    with subprocess.Popen(command, env=operator.environment()) as brake:
        status = job.wait("it is named", lambda _: job.condition("Straggler").get("status") == "True", 95)
        assert brake.wait() == 0
    assert slow in job.condition("Straggler")["message"], job.condition("Straggler")
    assert status["phase"] == "Running"
    done = job.wait_for_phase("Succeeded", 600)
    assert done["gang"]["generation"] == 1
    job.delete()


@contextmanager
def drained(cluster: Cluster, node: str, job: Job) -> Iterator[None]:
    """While this lasts a node is cordoned, and the job's pods have been evicted from it."""
    selector = f"--pod-selector=finetune.dev/job={job.name}"
    try:
        cluster.kubectl("drain", node, selector, "--delete-emptydir-data", "--force", "--timeout=120s")
        yield
    finally:
        cluster.kubectl("uncordon", node)
