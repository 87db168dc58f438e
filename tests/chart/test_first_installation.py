"""From a cluster that knows nothing of the operator to a job that runs."""

import json
from pathlib import Path

import pytest

from tests.chart.helm import OPERATOR
from tests.cluster.cluster import Cluster
from tests.cluster.installation import CRDS_RELEASE, RELEASE, SYSTEM_NAMESPACE, install_on, uninstall_operator
from tests.cluster.jobs import submit
from tests.cluster.training_inputs import script_spec

CRD = "finetunejobs.finetune.dev"
IN_SYSTEM = ("--namespace", SYSTEM_NAMESPACE)


@pytest.mark.long
def test_two_commands_lead_from_an_empty_cluster_to_a_job_that_runs(operator: Cluster, tmp_path: Path) -> None:
    """The jobs that are still there go: they go with the CRD."""
    empty(operator)
    values = {
        "crds": {"enabled": True, "keep": True},
        "image": {"reference": operator.operator_image},
        "profiles": {"default": {"image": operator.trainer_image}},
    }
    (tmp_path / "values.json").write_text(json.dumps(values))
    try:
        operator.helm(
            "install",
            RELEASE,
            str(OPERATOR),
            *IN_SYSTEM,
            "--create-namespace",
            "--values",
            str(tmp_path / "values.json"),
        )
        job = submit(operator, "default", "first", script_spec(operator, "import time; time.sleep(1)"))
        job.wait_for_phase("Running")
        job.wait_for_phase("Succeeded")
        uninstall_operator(operator)
        assert job.status()["phase"] == "Succeeded", "the CRD is kept, and the job with it"
    finally:
        empty(operator)
        install_on(operator)


def empty(cluster: Cluster) -> None:
    """Remove both releases, the CRD and the namespace that the first command is to make."""
    uninstall_operator(cluster)
    cluster.helm("uninstall", CRDS_RELEASE, *IN_SYSTEM, "--ignore-not-found")
    cluster.kubectl("delete", "crd", CRD, "--ignore-not-found", "--wait")
    cluster.kubectl("delete", "namespace", SYSTEM_NAMESPACE, "--ignore-not-found", "--wait")
