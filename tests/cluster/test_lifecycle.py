"""From the first pod to the last, on the real cluster: why a job waits, deadlines, what becomes of finished ones, and deletion."""

import json

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.installation import RELEASE, SYSTEM_NAMESPACE
from tests.cluster.jobs import Job, submit
from tests.cluster.test_recovery import PATIENT
from tests.cluster.training_inputs import make_namespace, script_spec

NOTHING = "pass"
LONGEST_NAME = "a-job-with-the-longest-name-that-is-0123"


def waits_for(job: Job, reason: str) -> str:
    """Wait until the job tells this reason, and return the message beside it."""
    job.wait(reason, lambda _: job.condition("Ready").get("reason") == reason, 60)
    message: str = job.condition("Ready")["message"]
    return message


def test_what_no_node_can_hold_is_told_in_the_schedulers_words_and_can_be_mended(
    operator: Cluster, namespace: str
) -> None:
    spec = script_spec(operator, NOTHING)
    spec["workers"]["resources"]["cpu"] = "64"
    job = submit(operator, namespace, "too-large", spec)
    assert "Insufficient cpu" in waits_for(job, "Unschedulable")
    assert job.status()["phase"] == "Pending"
    job.patch({"suspend": True, "workers": {"resources": {"cpu": "500m"}}})
    job.wait("no pod is left", lambda s: s["phase"] == "Suspended" and not job.pods())
    job.patch({"suspend": False})
    assert "restarts" not in job.wait_for_phase("Succeeded")
    job.delete()


def test_a_quota_is_told_and_when_it_is_raised_the_job_starts(operator: Cluster) -> None:
    make_namespace(operator, "small-quota")
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "pods", "namespace": "small-quota"},
        "spec": {"hard": {"pods": "1"}},
    }
    operator.apply(quota)
    try:
        job = submit(operator, "small-quota", "waits", script_spec(operator, NOTHING))
        assert "exceeded quota" in waits_for(job, "QuotaExceeded")
        operator.apply({**quota, "spec": {"hard": {"pods": "4"}}})
        assert "restarts" not in job.wait_for_phase("Succeeded")
    finally:
        operator.kubectl("delete", "namespace", "small-quota", "--wait=false")


@pytest.mark.long
def test_what_cannot_be_placed_in_time_is_given_back(operator: Cluster, namespace: str) -> None:
    spec = script_spec(operator, NOTHING)
    spec["workers"]["resources"]["cpu"] = "1500m"
    spec["workers"]["nodes"] = 4  # there is room for two
    spec["pendingDeadlineSeconds"] = 5
    job = submit(operator, namespace, "half-placed", spec)
    waits_for(job, "PendingDeadlineExceeded")
    status = job.wait("all pods are given back", lambda _: not job.pods(), 60)
    assert status["gang"]["members"] == [], "it never had enough to start"
    job.patch({"workers": {"nodes": 1}})
    job.wait_for_phase("Succeeded")
    job.delete()


def test_a_job_that_takes_too_long_fails_and_then_goes_with_its_pods(operator: Cluster, namespace: str) -> None:
    spec = script_spec(operator, PATIENT)
    spec |= {"activeDeadlineSeconds": 5, "podTTLSecondsAfterFinished": 5, "ttlSecondsAfterFinished": 20}
    job = submit(operator, namespace, "late", spec)
    job.wait_for_phase("Failed")
    assert job.condition("Failed")["reason"] == "DeadlineExceeded"
    job.wait_for_pods_to_go(30)
    operator.kubectl("wait", "--for=delete", "ftj/late", "--namespace", namespace, "--timeout=60s")


@pytest.mark.long
def test_a_job_that_is_deleted_while_no_operator_runs_goes_with_all_its_pods(operator: Cluster, namespace: str) -> None:
    job = submit(operator, namespace, "orphan", script_spec(operator, PATIENT))
    job.wait_for_phase("Running")
    replicas = json.loads(
        operator.kubectl("get", "deployment", RELEASE, "--namespace", SYSTEM_NAMESPACE, "-o", "json")
    )["spec"]["replicas"]
    scale(operator, 0)
    try:
        job.delete()
        job.wait_for_pods_to_go(120)
        left = operator.kubectl("get", "ftj,pods,configmaps", "--namespace", namespace, "-o", "name")
        assert "orphan" not in left, left
    finally:
        scale(operator, replicas)


def test_the_longest_name_with_odd_labels_trains(operator: Cluster, namespace: str) -> None:
    assert len(LONGEST_NAME) == 40
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {
            "name": LONGEST_NAME,
            "namespace": namespace,
            "labels": {"team.example.com/A_b.c": "Z" * 63, "finetune.dev/rank": "7"},
            "annotations": {"note": "{{ .Values }} $(HOME) \u2603\n--\x7f"},
        },
        "spec": script_spec(operator, NOTHING),
    }
    operator.kubectl("create", "-f", "-", input=json.dumps(manifest))
    job = Job(operator, namespace, LONGEST_NAME)
    job.wait_for_phase("Succeeded")
    job.delete()


def scale(cluster: Cluster, replicas: int) -> None:
    cluster.kubectl("scale", "deployment", RELEASE, "--namespace", SYSTEM_NAMESPACE, f"--replicas={replicas}")
    cluster.kubectl("rollout", "status", f"deployment/{RELEASE}", "--namespace", SYSTEM_NAMESPACE, "--timeout=90s")
