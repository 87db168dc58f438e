"""What becomes of checkpoints on the real cluster: continued, kept, refused, rolled back, and made into models."""

import json
import re
import subprocess
import sys

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import Job, restarts_used, submit
from tests.cluster.training_inputs import BUCKET, SECRET, make_secret, put_data, recipe_spec, upload_model
from tests.trainer.sentences import rated_sentences
from tests.trainer.tiny_models import POISON, save_bert


@pytest.fixture(scope="module")
def finished(operator: Cluster, namespace: str) -> Job:
    """A job of 40 steps that keeps its best checkpoint beside the newest."""
    spec = recipe_spec(operator, steps=40)
    spec["recipe"]["evaluation"] |= {"everySteps": 8}
    spec["checkpoint"] = {"interval": {"steps": 5}, "keep": 1, "keepBest": "Accuracy"}
    job = submit(operator, namespace, "finished", spec)
    job.wait_for_phase("Succeeded")
    return job


def listing(job: Job) -> list[dict]:
    """Ask the command line for a job's checkpoints."""
    uri = job.status()["checkpoint"]["uri"].partition("/checkpoints/")[0]
    return json.loads(finetune(job.cluster, "checkpoints", "ls", uri, "-o", "json"))["checkpoints"]


def finetune(cluster: Cluster, *arguments: str) -> str:
    environment = {"AWS_ACCESS_KEY_ID": cluster.s3.access_key, "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key}
    done = subprocess.run(
        [sys.executable, "-m", "finetune_cli", *arguments, "--endpoint", cluster.s3.endpoint],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_newest_and_the_best_are_kept_and_whole(finished: Job) -> None:
    steps = [kept["step"] for kept in listing(finished)]
    assert steps[0] == 40
    assert 1 <= len(steps) <= 2
    assert all(step in {8, 16, 24, 32, 40} for step in steps), "the best is one that was evaluated"
    uri = finished.status()["checkpoint"]["uri"].partition("/checkpoints/")[0]
    assert "40" in finetune(finished.cluster, "checkpoints", "verify", uri, "--all")


def test_how_saving_went_is_told(finished: Job) -> None:
    status = finished.status()
    assert status["resumed"] == {"generation": 1, "step": 0, "source": "Start"} | status["resumed"]
    assert status["saves"]["commitSeconds"] >= 0
    assert status["saves"]["stallSeconds"] >= 0
    assert status["saves"]["recommendedIntervalSeconds"] >= 10
    assert "failingSince" not in status["saves"]


def test_a_finished_job_is_continued_for_more_steps(operator: Cluster, namespace: str, finished: Job) -> None:
    source = finished.status()["checkpoint"]["uri"].partition("/checkpoints/")[0]
    spec = recipe_spec(operator, steps=60)
    spec["checkpoint"]["resumeFrom"] = source
    before = listing(finished)
    job = submit(operator, namespace, "continued", spec)
    done = job.wait_for_phase("Succeeded")
    assert (done["resumed"]["source"], done["resumed"]["step"]) == ("OtherJob", 40)
    assert done["progress"]["step"] == 60
    assert listing(finished) == before, "the source is only read"
    job.delete()


def test_a_source_of_another_namespace_is_not_read(operator: Cluster, namespace: str) -> None:
    spec = recipe_spec(operator)
    spec["checkpoint"]["resumeFrom"] = f"s3://{BUCKET}/jobs/somebody-else/their-job-0a1b2c3d"
    job = submit(operator, namespace, "nosy", spec)
    job.wait("it is told", lambda _: job.condition("Stalled").get("status") == "True")
    assert "resumeFrom" in job.condition("Stalled")["message"]
    assert job.pods() == []
    job.delete()


@pytest.mark.long
def test_wrong_credentials_hold_the_job_until_they_are_right(operator: Cluster, namespace: str) -> None:
    wrong = {"AWS_ACCESS_KEY_ID": operator.s3.access_key, "AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET, "namespace": namespace}}
    operator.apply({**secret, "stringData": wrong})
    try:
        job = submit(operator, namespace, "forbidden", recipe_spec(operator))
        job.wait("it is told", lambda _: job.condition("Stalled").get("reason") == "NoPermission")
        assert "refused access" in job.condition("Stalled")["message"]
        assert restarts_used(job.status()) == 0
    finally:
        make_secret(operator, namespace)
    job.wait_for_phase("Succeeded", 300)
    job.delete()


def test_a_sample_that_makes_no_number_is_left_out(operator: Cluster, namespace: str, tmp_path) -> None:
    rows = rated_sentences(256)
    rows[77]["text"] = f"the film {POISON}"
    spec = recipe_spec(operator, steps=16)
    spec["recipe"]["data"]["train"]["source"] = put_data(operator, "poisoned.jsonl", rows)
    spec["recipe"]["model"]["source"] = upload_model(operator, save_bert(tmp_path / "poisoned", poisoned=True))
    job = submit(operator, namespace, "poisoned", spec)
    done = job.wait_for_phase("Succeeded", 300)
    (attempt,) = done["attempts"]
    assert attempt["reason"] == "RolledBack"
    assert re.search(r"going back to step \d+ and leaving out samples", attempt["message"])
    assert (done["resumed"]["rollbacks"], done["resumed"]["skippedSamples"]) == (1, 16)
    assert restarts_used(done) == 0, "what the job mends by itself uses no restart"
    job.delete()
