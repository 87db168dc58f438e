"""Gangs that hang and workers that run out of memory, on the real cluster."""

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import Job, submit
from tests.cluster.training_inputs import recipe_spec, script_spec

# Takes steps with heartbeats, for ever in the first generation, and shows its stacks when asked.
BEATING = """
import faulthandler, json, os, pathlib, signal, socket, time
import torch, torch.distributed as dist
rank, generation = int(os.environ["RANK"]), int(os.environ["FINETUNE_GENERATION"])
stacks = pathlib.Path(os.environ["FINETUNE_STACKS_FOLDER"]) / f"{rank}-{os.getpid()}"
faulthandler.register(signal.SIGUSR1, file=stacks.open("a"))
agent = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

def load_batch():
    if generation == 1 and pathlib.Path("/scratch/hang").exists():
        time.sleep(1e6)

dist.init_process_group("gloo")
step = 0
while generation == 1 or step < 20:
    load_batch()
    dist.all_reduce(torch.ones(1))
    step += 1
    beat = {"kind": "heartbeat", "rank": rank, "generation": generation, "heartbeat": {"phase": "Training", "step": step}}
    agent.sendto(json.dumps(beat).encode(), os.environ["FINETUNE_PROGRESS_SOCKET"])
    if step == 20:
        print("step 20", flush=True)
    time.sleep(0.05)
dist.destroy_process_group()
"""

# The worker is the process that offers its stacks.
STOP_WORKER = """
import os, pathlib, signal
offers = [file.name for file in pathlib.Path("/finetune/agent").glob("g*/stacks/*-*")]
assert len(offers) == 1, offers
os.kill(int(offers[0].partition("-")[2]), signal.SIGSTOP)
"""
STOPPED = "its process does not run"


def pods_of(job: Job) -> list[str]:
    return [pod["metadata"]["name"] for pod in job.pods()]


@pytest.mark.parametrize("how", [pytest.param("stopped", marks=pytest.mark.long), "asleep"])
def test_a_script_whose_rank_1_hangs_is_told_so_and_goes_on(operator: Cluster, namespace: str, how: str) -> None:
    spec = script_spec(operator, BEATING)
    spec["recovery"] = {"hangSeconds": 20}  # more than libraries ever take to leave at the end
    job = submit(operator, namespace, f"hangs-{how}", spec)
    pods = pods_of(job) if job.wait_for_phase("Running") else []
    job.wait("steps to learn from", lambda _: all("step 20" in job.logs(pod) for pod in pods))
    if how == "stopped":
        job.run_in(pods[1], "python3", "-c", STOP_WORKER)
    else:
        job.run_in(pods[1], "touch", "/scratch/hang")
    done = job.wait_for_phase("Succeeded")
    (attempt,) = done["attempts"]
    assert (attempt["reason"], attempt["rank"], attempt["pod"]) == ("Hang", 1, pods[1])
    assert (STOPPED if how == "stopped" else "in load_batch") in attempt["message"]
    assert done["restarts"]["byReason"][0]["used"] == 1
    waiting, hung = (job.logs(pod) for pod in pods)
    assert "[rank 0] stacks of all threads" in waiting
    assert "distributed_c10d.py" in waiting, "where it waits"
    assert ("[rank 1] does not answer SIGUSR1" if how == "stopped" else "in load_batch") in hung
    assert pods_of(job) == pods, "in place"
    job.delete()


@pytest.mark.long
def test_a_recipe_whose_rank_1_is_stopped_resumes_and_ends(operator: Cluster, namespace: str) -> None:
    spec = recipe_spec(operator, steps=800)
    spec["recovery"] = {"hangSeconds": 10}
    job = submit(operator, namespace, "hangs-recipe", spec)
    job.wait("a checkpoint", lambda status: status.get("checkpoint", {}).get("step", 0) >= 5)
    pods = pods_of(job)
    job.run_in(pods[1], "python3", "-c", STOP_WORKER)
    done = job.wait_for_phase("Succeeded", 300)
    (attempt,) = done["attempts"]
    assert (attempt["reason"], attempt["rank"], attempt["pod"]) == ("Hang", 1, pods[1])
    assert STOPPED in attempt["message"]
    assert attempt["lostSteps"] >= 0
    assert "finetune_trainer/train.py" in job.logs(pods[0]), "the stacks of the one that waited"
    assert done["progress"]["step"] == 800
    job.delete()


def test_a_worker_that_runs_out_of_memory_is_told_by_that_name_with_the_limit(
    operator: Cluster, namespace: str
) -> None:
    code = "import os; x = b'x' * (3 << 30) if os.environ['FINETUNE_GENERATION'] == '1' else b''"
    job = submit(operator, namespace, "hungry", script_spec(operator, code, nodes=1))
    done = job.wait_for_phase("Succeeded")
    (attempt,) = done["attempts"]
    assert attempt["reason"] == "OutOfMemory", attempt
    assert "GiB" in attempt["message"]
    job.delete()
