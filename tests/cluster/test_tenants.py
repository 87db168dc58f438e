"""What one tenant can get at of another's, and where secrets are not: on the real API server, with keys that the real store limits."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator

import pytest

from finetune_api.contract import TOKEN_FILE
from tests.cluster.cluster import Cluster
from tests.cluster.installation import SYSTEM_NAMESPACE, operator_log
from tests.cluster.jobs import Job, submit
from tests.cluster.object_store import BUCKET, TENANTS
from tests.cluster.training_inputs import SECRET, make_namespace, make_secret, recipe_spec

MINE, THEIRS = TENANTS
THEIR_DATA = f"jobs/{THEIRS}/reviews.jsonl"
WRONG_KEY = "canary-of-a-key-that-is-wrong"


@pytest.fixture(scope="module")
def tenants(operator: Cluster) -> Iterator[Cluster]:
    """Two namespaces, each with a secret of its own: keys for the inputs that all share, and for its own part of jobs/."""
    for name in TENANTS:
        make_namespace(operator, name, secret=False)
        make_secret(operator, name, operator.s3.of_tenant(name))
    rows = operator.s3.client().get_object(Bucket=BUCKET, Key="data/train.jsonl")["Body"].read()
    operator.s3.client().put_object(Bucket=BUCKET, Key=THEIR_DATA, Body=rows)
    yield operator
    operator.kubectl("delete", "namespace", *TENANTS, "--wait=false")


@pytest.fixture(scope="module")
def finished(tenants: Cluster) -> Iterator[Job]:
    job = submit(tenants, MINE, "own", recipe_spec(tenants, nodes=1))
    job.wait_for_phase("Succeeded")
    yield job
    job.delete()


def test_a_tenants_keys_are_enough_for_its_own_jobs(finished: Job) -> None:
    assert finished.status()["checkpoint"]["uri"].startswith(f"s3://{BUCKET}/jobs/{MINE}/own-")


def test_data_of_another_tenant_is_not_read(tenants: Cluster, finished: Job) -> None:
    spec = recipe_spec(tenants, nodes=1)
    spec["recipe"]["data"]["train"]["source"] = f"s3://{BUCKET}/{THEIR_DATA}"
    job = submit(tenants, MINE, "nosy", spec)
    job.wait("it is told", lambda _: job.condition("Stalled").get("reason") == "NoPermission")
    assert THEIR_DATA in job.condition("Stalled")["message"]
    job.delete()


def test_nothing_is_written_where_another_tenants_jobs_are(tenants: Cluster, finished: Job) -> None:
    spec = recipe_spec(tenants, nodes=1)
    spec["storage"]["uri"] = f"s3://{BUCKET}/jobs/{THEIRS}"
    job = submit(tenants, MINE, "intruder", spec)
    job.wait("it is told", lambda _: job.condition("Stalled").get("reason") == "NoPermission")
    job.delete()
    listed = tenants.s3.client().list_objects_v2(Bucket=BUCKET, Prefix=f"jobs/{THEIRS}/")["Contents"]
    assert [item["Key"] for item in listed] == [THEIR_DATA]


def test_secrets_are_in_nothing_that_others_may_read(tenants: Cluster, finished: Job) -> None:
    """Of a job that goes well and of one whose keys are refused: objects, events, logs, arguments, and all that lies in the store."""
    wrong = json.dumps({"stringData": {"AWS_SECRET_ACCESS_KEY": WRONG_KEY}})
    tenants.kubectl("patch", "secret", SECRET, "--namespace", THEIRS, "--type", "merge", "-p", wrong)
    refused = submit(tenants, THEIRS, "refused", recipe_spec(tenants, nodes=1))
    refused.wait("it is told", lambda _: refused.condition("Stalled").get("reason") == "NoPermission")
    (pod,) = refused.pods()
    token = refused.run_in(pod["metadata"]["name"], "cat", TOKEN_FILE).strip()
    secrets = {tenants.s3.secret_key, tenants.s3.of_tenant(MINE).secret_key, WRONG_KEY, token}
    shown = _shown(tenants, [finished, refused])
    assert "NoPermission" in shown["jobs"]
    assert "not" in shown["logs of training pods"]
    for place, text in shown.items():
        for secret in secrets:
            assert secret not in text, place
            assert base64.b64encode(secret.encode()).decode() not in text, place
    refused.delete()


def _shown(cluster: Cluster, jobs: list[Job]) -> dict[str, str]:
    everything = {
        kind: cluster.kubectl("get", kind, "--all-namespaces", "-o", "json")
        for kind in ("finetunejobs", "events", "pods", "configmaps")
    }
    store = cluster.s3.client()
    return {
        "jobs": everything["finetunejobs"],
        "events": everything["events"],
        "pods": everything["pods"],
        "config maps": everything["configmaps"],
        "logs of the operator": operator_log(cluster),
        "the operator's own objects": cluster.kubectl("get", "all", "-n", SYSTEM_NAMESPACE, "-o", "json"),
        "logs of training pods": "".join(job.logs(pod["metadata"]["name"]) for job in jobs for pod in job.pods()),
        "arguments of processes": subprocess.check_output(["ps", "-ww", "-eo", "args"], text=True),
        "the store": "".join(
            store.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read().decode("latin-1")
            for item in store.list_objects_v2(Bucket=BUCKET, Prefix=f"jobs/{MINE}/").get("Contents", ())
        ),
    }
