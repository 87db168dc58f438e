"""What a GitOps tool finds after a job has run: its manifest as it wrote it, and nobody else's hand on the spec."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api import contract
from tests.cluster.cluster import Cluster
from tests.cluster.jobs import Job
from tests.cluster.training_inputs import script_spec
from tests.gitops import argo
from tests.operator import kstatus

OURS, THEIRS = contract.MANAGER, "gitops"
WAYS = {
    "client-side apply": (),
    "server-side apply": ("--server-side", f"--field-manager={THEIRS}"),
}


def manifest(cluster: Cluster, name: str, namespace: str) -> dict[str, Any]:
    """A manifest that leaves to defaults what it can."""
    return {
        "apiVersion": f"{contract.GROUP}/{contract.VERSION}",
        "kind": contract.KIND,
        "metadata": {"name": name, "namespace": namespace, "labels": {"team": "a"}},
        "spec": script_spec(cluster, "pass", nodes=1),
    }


@pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS.keys())
def test_a_job_that_has_run_shows_no_drift(
    operator: Cluster, namespace: str, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    job = Job(operator, namespace, f"from-git-{len(flags)}")
    file = tmp_path / "job.json"
    file.write_text(json.dumps(manifest(operator, job.name, namespace)))
    operator.kubectl("apply", *flags, "-f", str(file))
    job.wait_for_phase("Succeeded")

    ran = _stored(job)
    assert operator.kubectl("diff", *flags, "-f", str(file)) == ""
    operator.kubectl("apply", *flags, "-f", str(file))
    again = _stored(job)
    assert (again["spec"], again["metadata"]["generation"]) == (ran["spec"], 1)

    _the_operator_owns_status_and_nothing_else(again)
    assert kstatus.compute(again) == "Current"
    assert argo.health(again)[0] == "Healthy"

    job.patch({"suspend": True})  # by hand, of a manifest that says nothing of it
    assert operator.kubectl("diff", *flags, "-f", str(file)) == ""
    operator.kubectl("apply", *flags, "-f", str(file))
    assert _stored(job)["spec"]["suspend"] is True
    job.delete()


def _stored(job: Job) -> dict[str, Any]:
    said = job.cluster.kubectl(
        "get", "ftj", job.name, "--namespace", job.namespace, "-o", "json", "--show-managed-fields"
    )
    stored: dict[str, Any] = json.loads(said)
    return stored


def _the_operator_owns_status_and_nothing_else(job: dict[str, Any]) -> None:
    entries = [entry for entry in job["metadata"]["managedFields"] if entry["manager"] == OURS]
    assert entries, "the operator has written status under its name"
    assert {entry.get("subresource") for entry in entries} == {"status"}
    assert {field for entry in entries for field in entry["fieldsV1"]} == {"f:status"}
    assert not {"finalizers", "ownerReferences"} & job["metadata"].keys()
    others = {manager["manager"] for manager in job["metadata"]["managedFields"]} - {OURS}
    assert len(others) == 1, f"somebody else has written to the job: {others}"
