"""Who reaches whom, by all our NetworkPolicies together: those of jobs, and the operator's as Helm renders it.

Whether a cluster's network enforces NetworkPolicies is its own affair; these tests are about what ours say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.job import FineTuneJob
from finetune_operator.plan.observation import NewPod
from finetune_operator.render.network import render_network_policy
from finetune_operator.render.pod import render_pod
from finetune_operator.settings import Settings
from tests.chart.helm import NAMESPACE, OPERATOR, RELEASE, example, find, render
from tests.chart.network_rules import Place, may_connect
from tests.operator.documents import a_job
from tests.operator.documents import settings as a_settings

ONE = a_job(uid="11111aaa-0000-4000-8000-000000000001", namespace="team-a", name="one")
TWO = a_job(uid="22222aaa-0000-4000-8000-000000000002", namespace="team-a", name="two")
FAR = a_job(uid="33333aaa-0000-4000-8000-000000000003", namespace="team-b", name="one")


@dataclasses.dataclass(frozen=True)
class Site:
    """A cluster with the chart installed and three jobs in two namespaces."""

    policies: Sequence[Mapping[str, Any]]
    places: Mapping[str, Place]

    def may(self, source: str, target: str, port: int, protocol: str = "TCP") -> bool:
        return may_connect(self.policies, self.places[source], self.places[target], port, protocol)


def site(*values: str, name: str = "minimal") -> Site:
    documents = render(OPERATOR, "--values", example(name), "--set", "networkPolicy.enabled=true", *values)
    config = Settings.model_validate(
        yaml.safe_load(find(documents, "ConfigMap", RELEASE)["data"]["config.yaml"])
    ).model_copy(update={"allowed_endpoints": ("http://store.example:8333",)})
    operator = find(documents, "Deployment", RELEASE)["spec"]["template"]["metadata"]["labels"]
    policies = [item for item in documents if item["kind"] == "NetworkPolicy"]
    assert len(policies) == 1
    return Site(
        policies=[*policies, *(render_network_policy(job, config) for job in (ONE, TWO, FAR))],
        places={
            "rank 0": training_pod(ONE, 0, config),
            "rank 1": training_pod(ONE, 1, config),
            "another job": training_pod(TWO, 0, config),
            "another team": training_pod(FAR, 0, config),
            "operator": Place("198.18.101.2", NAMESPACE, operator),
            "a neighbour of the operator": Place("198.18.101.3", NAMESPACE, {"app": "other"}),
            "a tenant's pod": Place("198.18.101.4", "team-a", {"app": "web"}),
            "a pod called operator": Place(
                "198.18.101.5", "team-a", {"app.kubernetes.io/name": "finetune-operator"}
            ),
            "cluster DNS": Place("198.18.101.6", "kube-system", {"k8s-app": "kube-dns"}),
            "node-local DNS": Place("169.254.20.10"),
            "API server": Place("198.51.100.10"),
            "store": Place("192.0.2.7"),
            "Prometheus": Place("198.18.101.7", "monitoring", {"app": "prometheus"}),
            "somewhere": Place("203.0.113.9"),
            "metadata service": Place("169.254.169.254"),
            "metadata service by IPv6": Place("fe80::a9fe:a9fe"),
        },
    )  # fmt: skip


def training_pod(job: FineTuneJob, rank: int, config: Settings) -> Place:
    labels = render_pod(job, NewPod(rank, 1), config)["metadata"]["labels"]
    return Place(f"198.18.10{rank + 2}.{int(job.metadata.uid[0])}", job.metadata.namespace, labels)


@pytest.fixture(scope="module")
def usual() -> Site:
    return site()


ALLOWED = [
    ("rank 0", "rank 1", 29500, "TCP"),
    ("rank 1", "rank 0", 43210, "TCP"),
    ("rank 0", "rank 1", 43210, "UDP"),
    ("rank 0", "operator", 9443, "TCP"),
    ("another job", "operator", 9443, "TCP"),
    ("another team", "operator", 9443, "TCP"),
    ("rank 0", "cluster DNS", 53, "UDP"),
    ("rank 0", "node-local DNS", 53, "TCP"),
    ("rank 0", "store", 8333, "TCP"),
    ("Prometheus", "operator", 8081, "TCP"),
    ("operator", "API server", 6443, "TCP"),
    ("operator", "API server", 443, "TCP"),
    ("operator", "cluster DNS", 53, "UDP"),
]
REFUSED = [
    ("rank 0", "another job", 29500, "TCP"),
    ("rank 0", "another team", 29500, "TCP"),
    ("another team", "rank 0", 29500, "TCP"),
    ("a tenant's pod", "rank 0", 29500, "TCP"),
    ("operator", "rank 0", 29500, "TCP"),
    ("rank 0", "a tenant's pod", 80, "TCP"),
    ("rank 0", "operator", 8080, "TCP"),
    ("rank 0", "operator", 8081, "TCP"),
    ("Prometheus", "operator", 9443, "TCP"),
    ("Prometheus", "rank 0", 29500, "TCP"),
    ("rank 0", "operator", 9443, "UDP"),
    ("rank 0", "a neighbour of the operator", 9443, "TCP"),
    ("rank 0", "a pod called operator", 9443, "TCP"),
    ("rank 0", "API server", 6443, "TCP"),
    ("rank 0", "API server", 443, "TCP"),
    ("rank 0", "somewhere", 443, "TCP"),
    ("rank 0", "store", 8334, "TCP"),
    ("rank 0", "metadata service", 80, "TCP"),
    ("rank 0", "metadata service", 8333, "TCP"),
    ("rank 0", "metadata service by IPv6", 8333, "TCP"),
    ("a tenant's pod", "operator", 9443, "TCP"),
    ("a neighbour of the operator", "operator", 9443, "TCP"),
    ("a pod called operator", "operator", 9443, "TCP"),
    ("somewhere", "operator", 9443, "TCP"),
    ("operator", "store", 8333, "TCP"),
    ("operator", "metadata service", 80, "TCP"),
    ("operator", "somewhere", 80, "TCP"),
]


@pytest.mark.parametrize("connection", ALLOWED, ids=str)
def test_what_works(usual: Site, connection: tuple[str, str, int, str]) -> None:
    assert usual.may(*connection)


@pytest.mark.parametrize("connection", REFUSED, ids=str)
def test_what_does_not(usual: Site, connection: tuple[str, str, int, str]) -> None:
    assert not usual.may(*connection)


def test_without_access_from_outside_everything_needed_works_and_nothing_else() -> None:
    tight = site(name="air-gapped")
    assert all(tight.may(*one) for one in ALLOWED if one[1:3] != ("API server", 443))
    assert not any(tight.may(*one) for one in REFUSED)
    for source, target, port, protocol in [
        ("operator", "API server", 443, "TCP"),
        ("operator", "somewhere", 6443, "TCP"),
        ("rank 0", "somewhere", 8333, "TCP"),
        ("rank 0", "somewhere", 53, "UDP"),
        ("rank 0", "metadata service", 53, "UDP"),
        ("operator", "somewhere", 53, "UDP"),
    ]:
        assert not tight.may(source, target, port, protocol)


def test_a_store_on_443_opens_443_wherever_the_store_may_be_and_nowhere_else() -> None:
    """By default that is everywhere, the API server included: the reason to list the ranges of the store."""
    storage = ONE.spec.storage.model_copy(update={"endpoint": None})
    amazon = ONE.model_copy(update={"spec": ONE.spec.model_copy(update={"storage": storage})})
    config = a_settings()
    places = {
        "rank 0": training_pod(amazon, 0, config),
        "API server": Place("198.51.100.10"),
        "store": Place("192.0.2.7"),
    }

    def reached(cidr: str) -> set[str]:
        policy = render_network_policy(amazon, config.model_copy(update={"storage_cidrs": (cidr,)}))
        opened = Site([policy], places)
        return {target for target in ("API server", "store") if opened.may("rank 0", target, 443)}

    assert reached("0.0.0.0/0") == {"API server", "store"}
    assert reached("192.0.2.0/24") == {"store"}


def test_only_pods_of_namespaces_that_are_served_reach_the_job_server() -> None:
    served = site("--set", "watchNamespaces={team-b}")
    assert served.may("another team", "operator", 9443)
    assert not served.may("rank 0", "operator", 9443)


def test_metrics_are_for_those_who_are_named() -> None:
    named = site(
        "--set", r"networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.kubernetes\.io/metadata\.name=monitoring"
    )
    assert named.may("Prometheus", "operator", 8081)
    assert not named.may("a tenant's pod", "operator", 8081)
    assert site().may("a tenant's pod", "operator", 8081)


def test_without_it_only_the_operators_own_policy_is_gone() -> None:
    documents = render(OPERATOR, "--values", example("minimal"), "--set", "networkPolicy.enabled=false")
    assert not [item for item in documents if item["kind"] == "NetworkPolicy"]


addresses = st.one_of(st.ip_addresses(), st.ip_addresses(network="169.254.0.0/16"), st.ip_addresses(network="fe80::/10"))  # fmt: skip
ports = st.integers(1, 65535) | st.sampled_from([80, 443, 6443, 8333, 9443])


@settings(max_examples=200, deadline=None)
@given(addresses, ports, st.sampled_from(["TCP", "UDP"]))
def test_outside_a_training_pod_reaches_names_and_the_store_and_is_reached_from_nowhere(usual, address, port, protocol):
    outside, rank = Place(str(address)), usual.places["rank 0"]
    to_store = (port, protocol, address.version) == (8333, "TCP", 4) and not address.is_link_local
    assert may_connect(usual.policies, rank, outside, port, protocol) == (port == 53 or to_store)
    assert not may_connect(usual.policies, outside, rank, port, protocol)


SPOILT = {
    "a job that lets everybody in": lambda policy: policy["spec"]["ingress"].append({}),
    "a job that may go anywhere": lambda policy: policy["spec"]["egress"].append({}),
    "a job whose policy covers no egress": lambda policy: policy["spec"].update(policyTypes=["Ingress"]),
    "a job whose policy selects nothing of it": lambda policy: policy["spec"].update(
        podSelector={"matchLabels": {"finetune.dev/job-uid": "another"}}
    ),
    "a store that may be the metadata service": lambda policy: policy["spec"]["egress"][-1]["to"][0]["ipBlock"].pop("except"),
    "an operator in any namespace": lambda policy: policy["spec"]["egress"][2]["to"][0].update(namespaceSelector={}),
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_the_rules_above_notice(spoil) -> None:
    spoilt = site()
    spoil(spoilt.policies[1])
    assert any(spoilt.may(*one) for one in REFUSED)
