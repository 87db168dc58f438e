"""The API server of the session's cluster, with the CRD as it is generated now, by way of its chart."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.api.api_server import ApiServer
from tests.cluster import Cluster
from tests.cluster.installation import CRDS_RELEASE, ROOT, SYSTEM_NAMESPACE

CHART = ROOT / "charts/finetune-crds"
CRD = "finetunejobs.finetune.dev"


@pytest.fixture(scope="session")
def api(cluster: Cluster) -> Iterator[ApiServer]:
    # In the release in which users have it, so that tests of the operator on the same cluster find it there.
    cluster.helm(
        "upgrade", "--install", CRDS_RELEASE, str(CHART), "--namespace", SYSTEM_NAMESPACE, "--create-namespace"
    )
    cluster.wait_for_crd(CRD)
    namespace = f"api-{secrets.token_hex(4)}"  # a cluster may outlive a session, and names are free only some time after deletion
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    server = ApiServer(cluster.kubeconfig, namespace)
    yield server
    server.close()
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")
