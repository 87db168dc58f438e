"""The operator's rights against what it has really asked for, from the API server's own log of everything before. These tests run last."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.cluster import Cluster
from tests.cluster.audit import Access, Grant, accesses, grants, uncovered, unused
from tests.cluster.installation import RELEASE, SYSTEM_NAMESPACE, install_on, uninstall_operator
from tests.cluster.jobs import submit
from tests.cluster.training_inputs import script_spec

ACCOUNT = f"system:serviceaccount:{SYSTEM_NAMESPACE}:{RELEASE}"
FILES = {path.name for path in Path(__file__).parent.glob("test_*.py")}

# What happens too rarely to be met here, and where it is tested.
RARE = {
    Grant("get", "finetune.dev", "finetunejobs"): "its status was written by somebody else: test_takeover.py",
    Grant("get", "", "pods"): "a pod was made by a process that died before it knew: test_reconcile.py",
    Grant("delete", "finetune.dev", "finetunejobs"): "ttlSecondsAfterFinished: test_plan_end.py",
    Grant("update", "", "secrets", SYSTEM_NAMESPACE, f"{RELEASE}-job-server"): "certificates are renewed after months: test_certificates.py",
}  # fmt: skip


@pytest.fixture
def log(operator: Cluster) -> list[str]:
    return log_of(operator)


@pytest.fixture
def granted(operator: Cluster) -> set[Grant]:
    return granted_by_the_release(operator)


def log_of(cluster: Cluster) -> list[str]:
    return cluster.control_plane.audit_log.read_text().splitlines()


def granted_by_the_release(cluster: Cluster) -> set[Grant]:
    manifest = cluster.helm("get", "manifest", RELEASE, "--namespace", SYSTEM_NAMESPACE)
    return grants([item for item in yaml.safe_load_all(manifest) if item], ACCOUNT)


def test_the_log_has_what_the_operator_does(log: list[str]) -> None:
    """Or the other tests would compare nothing."""
    asked = accesses(log, ACCOUNT)
    lease = ("coordination.k8s.io", "leases", SYSTEM_NAMESPACE, RELEASE)
    assert {Access("update", *lease), Access("list", "", "pods"), Access("watch", "", "pods")} <= asked


def test_it_asks_for_nothing_that_it_may_not(log: list[str], granted: set[Grant]) -> None:
    assert uncovered(accesses(log, ACCOUNT), granted) == set()


def test_it_may_do_nothing_that_it_does_not(
    request: pytest.FixtureRequest, log: list[str], granted: set[Grant]
) -> None:
    if not {item.path.name for item in request.session.items} >= FILES:
        pytest.skip("only after all tests of this folder has everything been tried")
    assert unused(granted, accesses(log, ACCOUNT)) - RARE.keys() == set()


@pytest.mark.long
def test_in_a_namespace_of_its_own_it_serves_jobs_with_that_namespaces_rights(
    operator: Cluster, namespace: str
) -> None:
    uninstall_operator(operator)
    before = len(log_of(operator))
    try:
        install_on(operator, {"watchNamespaces": [namespace]})
        job = submit(operator, namespace, "at-home", script_spec(operator, "pass"))
        job.wait_for_phase("Succeeded")
        job.delete()
        granted, asked = granted_by_the_release(operator), accesses(log_of(operator)[before:], ACCOUNT)
    finally:
        uninstall_operator(operator)
        install_on(operator)
    assert uncovered(asked, granted) == set()
    assert {grant.namespace for grant in granted if grant.resource == "pods"} == {namespace, SYSTEM_NAMESPACE}
    assert Access("create", "", "pods", namespace) in {replace(access, name="") for access in asked}
