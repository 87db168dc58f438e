"""What breaks while a job trains, on the real cluster, and what the job makes of it."""

import re
import time

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.installation import RELEASE, SYSTEM_NAMESPACE
from tests.cluster.jobs import Job, restarts_used, submit
from tests.cluster.training_inputs import recipe_spec, script_spec

# Ends when told to by a file, fails when told to by another, and says which generation it is.
PATIENT = """
import os, pathlib, time
print("generation", os.environ["FINETUNE_GENERATION"], "world", os.environ["WORLD_SIZE"], flush=True)
while not pathlib.Path("/scratch/done").exists():
    time.sleep(0.1)
"""

# What runs in a training pod has names of its own: "agent", "fork-server", "worker-parent", "worker 0".
KILL = """
import os, pathlib, signal, sys
found = [int(file.parent.name) for file in pathlib.Path("/proc").glob("[0-9]*/comm") if file.read_text().startswith(sys.argv[1])]
assert len(found) == 1, found
os.kill(found[0], signal.SIGKILL)
"""


def test_a_killed_worker_restarts_the_gang_in_place_and_resumes(operator: Cluster, namespace: str) -> None:
    job = submit(operator, namespace, "killed", recipe_spec(operator, steps=800))
    job.wait("a checkpoint", lambda status: status.get("checkpoint", {}).get("step", 0) >= 5)
    before = {pod["metadata"]["uid"] for pod in job.pods()}
    victim = job.pods()[1]["metadata"]["name"]
    job.run_in(victim, "python3", "-c", KILL, "worker ")
    status = job.wait("the next generation runs", lambda s: s["gang"]["generation"] == 2 and s["phase"] == "Running")
    assert {pod["metadata"]["uid"] for pod in job.pods()} == before, "the pods live on"
    assert status["restarts"]["total"] == 1
    attempt = status["attempts"][0]
    assert (attempt["generation"], attempt["reason"], attempt["signal"], attempt["rank"]) == (1, "WorkerKilled", 9, 1)
    assert attempt["pod"] == victim
    done = job.wait_for_phase("Succeeded", 300)
    assert (done["resumed"]["generation"], done["resumed"]["source"]) == (2, "Memory"), "storage was not asked"
    assert 0 <= done["attempts"][0]["lostSteps"] <= 800
    assert done["progress"]["step"] == 800
    resumed = re.search(r"generation 2: starting after step (\d+) of 800", job.logs(victim.replace("-1-1", "-0-1")))
    assert resumed
    assert int(resumed[1]) >= 5, "nothing that was committed is done again"
    job.delete()


@pytest.mark.long
def test_an_edited_interval_is_in_force_from_the_next_generation_on(operator: Cluster, namespace: str) -> None:
    spec = recipe_spec(operator, steps=3200)
    spec["checkpoint"] = {"interval": {"steps": 100000}}
    job = submit(operator, namespace, "edited", spec)
    job.wait("some steps", lambda status: status.get("progress", {}).get("step", 0) >= 5)
    before = {pod["metadata"]["uid"] for pod in job.pods()}
    job.patch({"checkpoint": {"interval": {"steps": 7}, "keep": 1}})
    later = job.status()["progress"]["step"] + 30
    status = job.wait("more steps", lambda status: status["progress"]["step"] >= later)
    assert (status["gang"]["generation"], status.get("checkpoint")) == (1, None), "what runs goes on as it began"
    job.run_in(job.pods()[1]["metadata"]["name"], "python3", "-c", KILL, "worker ")
    status = job.wait("a checkpoint", lambda status: "checkpoint" in status)
    assert (status["gang"]["generation"], status["checkpoint"]["step"] % 7) == (2, 0)
    assert {pod["metadata"]["uid"] for pod in job.pods()} == before, "in place"
    job.delete()


@pytest.mark.long
def test_a_killed_fork_server_disturbs_no_training_and_a_killed_agent_is_replaced_in_place(
    operator: Cluster, namespace: str
) -> None:
    job = submit(operator, namespace, "parents", recipe_spec(operator, steps=800))
    job.wait("a checkpoint", lambda status: status.get("checkpoint", {}).get("step", 0) >= 5)
    before = {pod["metadata"]["uid"] for pod in job.pods()}
    agentless, serverless = (pod["metadata"]["name"] for pod in job.pods())
    job.run_in(serverless, "python3", "-c", KILL, "fork-server")
    job.run_in(agentless, "python3", "-c", KILL, "agent")
    status = job.wait("the next generation runs", lambda s: s["gang"]["generation"] == 2 and s["phase"] == "Running")
    assert status["restarts"]["total"] == 1, "the agent's death was one, the fork server's none"
    assert "another starts in 30 s" in job.logs(serverless)
    done = job.wait_for_phase("Succeeded", 300)
    assert {pod["metadata"]["uid"] for pod in job.pods()} == before
    assert done["resumed"]["source"] == "Memory"
    assert "workers are not forked" not in job.logs(agentless)
    job.delete()


def test_a_deleted_pod_is_replaced_and_the_other_stays(operator: Cluster, namespace: str) -> None:
    job = submit(operator, namespace, "deleted", recipe_spec(operator, steps=800))
    job.wait("a checkpoint", lambda status: status.get("checkpoint", {}).get("step", 0) >= 5)
    kept, lost = (pod["metadata"] for pod in job.pods())
    operator.kubectl("delete", "pod", "-n", namespace, lost["name"], "--wait=false")
    status = job.wait(
        "the next generation runs", lambda s: s["gang"]["generation"] == 2 and s["phase"] == "Running", 300
    )
    members = {member["rank"]: member for member in status["gang"]["members"]}
    assert members[0]["uid"] == kept["uid"]
    assert members[1]["uid"] != lost["uid"]
    assert members[1]["pod"].endswith("-1-2")
    assert status["attempts"][0]["reason"] == "Preempted", "it was asked to go, and saved first"
    assert restarts_used(status) == 0
    done = job.wait_for_phase("Succeeded", 300)
    assert done["attempts"][0]["lostSteps"] == 0
    assert done["resumed"]["source"] == "Storage", "one of the pods is new"
    job.delete()


def test_a_gang_that_keeps_failing_gives_up_and_says_why(operator: Cluster, namespace: str) -> None:
    spec = script_spec(operator, "import sys; sys.exit('the disk is on fire')")
    spec["recovery"] = {"maxRestarts": 2}
    job = submit(operator, namespace, "hopeless", spec)
    status = job.wait_for_phase("Failed")
    assert job.condition("Failed")["reason"] == "RestartsExhausted"
    assert "the disk is on fire" in job.condition("Failed")["message"]
    assert status["restarts"]["total"] == 2
    assert [attempt["generation"] for attempt in status["attempts"]] == [1, 2, 3]
    assert all(attempt["exitCode"] == 1 for attempt in status["attempts"])
    job.delete()


def test_an_operator_that_dies_disturbs_no_training(operator: Cluster, namespace: str) -> None:
    job = submit(operator, namespace, "steady", script_spec(operator, PATIENT))
    before = job.wait_for_phase("Running")
    operator.kubectl(
        "delete", "pod", "-n", SYSTEM_NAMESPACE, "-l", "app.kubernetes.io/name=finetune-operator", "--wait"
    )
    operator.kubectl("rollout", "status", "-n", SYSTEM_NAMESPACE, f"deployment/{RELEASE}", "--timeout=90s")
    _finish(job)
    done = job.wait_for_phase("Succeeded")
    assert done["gang"]["generation"] == 1
    assert done["gang"]["members"] == before["gang"]["members"]
    assert "restarts" not in done
    job.delete()


def test_an_api_server_that_is_away_disturbs_no_training(operator: Cluster, namespace: str) -> None:
    job = submit(operator, namespace, "patient", script_spec(operator, PATIENT))
    job.wait_for_phase("Running")
    operator.stop_apiserver()
    time.sleep(5)
    operator.start_apiserver()
    _finish(job)
    done = job.wait_for_phase("Succeeded")
    assert done["gang"]["generation"] == 1
    job.delete()


def test_suspend_saves_and_gives_the_pods_back_and_resume_goes_on(operator: Cluster, namespace: str) -> None:
    job = submit(operator, namespace, "paused", recipe_spec(operator, steps=800))
    job.wait("some steps", lambda status: status.get("checkpoint", {}).get("step", 0) >= 5)
    job.patch({"suspend": True})
    job.wait(
        "all pods are gone", lambda s: s["phase"] == "Suspended" and s["gang"]["generation"] == 2 and not job.pods()
    )
    assert job.condition("Ready")["status"] == "True", "suspended is what was asked for"
    job.patch({"suspend": False})
    done = job.wait_for_phase("Succeeded", 300)
    assert "restarts" not in done, "a suspend is no failure"
    assert done["progress"]["step"] == 800
    job.delete()


def test_a_gang_is_made_smaller_and_larger_while_it_trains_and_loses_no_step(operator: Cluster, namespace: str) -> None:
    job = submit(operator, namespace, "resized", recipe_spec(operator, steps=1600))
    job.wait("some steps", lambda status: status.get("checkpoint", {}).get("step", 0) >= 5)
    first = job.pods()[0]["metadata"]["uid"]
    for nodes, generation in ((1, 2), (2, 3)):
        job.patch({"workers": {"nodes": nodes}})
        status = job.wait(
            f"{nodes} train",
            lambda s, g=generation: s["gang"]["generation"] == g and s.get("resumed", {}).get("generation") == g,
        )
        assert [member["rank"] for member in status["gang"]["members"]] == list(range(nodes))
        assert status["gang"]["members"][0]["uid"] == first, "in place"
    done = job.wait_for_phase("Succeeded", 400)
    assert [(attempt["reason"], attempt["lostSteps"]) for attempt in done["attempts"]] == [("Resized", 0)] * 2
    assert "restarts" not in done
    assert done["progress"]["step"] == 1600
    job.delete()


def _finish(job: Job) -> None:
    for pod in job.pods():
        job.run_in(pod["metadata"]["name"], "touch", "/scratch/done")
