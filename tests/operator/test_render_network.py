"""The NetworkPolicy of a job: what its pods may reach, and what they never may."""

import ipaddress
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.render.network import render_network_policy
from tests.operator.documents import RECIPE, a_job, settings
from tests.operator.story import document


def test_a_whole_policy() -> None:
    assert render_network_policy(a_job(), settings())["spec"] == document("""
      podSelector: {matchLabels: {finetune.dev/job-uid: aaaaabbb-0000-4000-8000-000000000001}}
      policyTypes: [Ingress, Egress]
      ingress:
      - from: [{podSelector: {matchLabels: {finetune.dev/job-uid: aaaaabbb-0000-4000-8000-000000000001}}}]
      egress:
      - to: [{podSelector: {matchLabels: {finetune.dev/job-uid: aaaaabbb-0000-4000-8000-000000000001}}}]
      - ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]
      - to:
        - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: finetune-system}}
          podSelector: {matchLabels: {app.kubernetes.io/name: finetune-operator}}
        ports: [{protocol: TCP, port: 9443}]
      - to: [{ipBlock: {cidr: 0.0.0.0/0, except: [169.254.0.0/16]}}]
        ports: [{protocol: TCP, port: 8333}]
    """)


PORTS = {
    "the endpoint's own": ("storage: {uri: s3://bucket, endpoint: 'http://store.example:8333'}", [8333]),
    "80 for plain HTTP": ("storage: {uri: s3://bucket, endpoint: 'http://store.example'}", [80]),
    "443 for HTTPS": ("storage: {uri: s3://bucket, endpoint: 'https://store.example'}", [443]),
    "443 for Amazon": ("storage: {uri: s3://bucket}", [443]),
}


@pytest.mark.parametrize(("spec", "ports"), PORTS.values(), ids=PORTS.keys())
def test_the_port_of_the_store(spec: str, ports: list[int]) -> None:
    rule = render_network_policy(a_job(spec), settings())["spec"]["egress"][-1]
    assert [port["port"] for port in rule["ports"]] == ports


def test_a_model_of_the_hub_is_fetched_over_https() -> None:
    recipe = document(RECIPE.replace("s3://models/minilm", "hf://org/minilm@main"))
    rule = render_network_policy(a_job(json.dumps({"recipe": recipe["recipe"]})), settings())["spec"]["egress"][-1]
    assert [port["port"] for port in rule["ports"]] == [443, 8333]


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_link_local_addresses_are_out_of_reach_whatever_the_store_s_ranges_are(address, length: int) -> None:
    cidr = ipaddress.ip_network(f"{address}/{length}", strict=False)
    policy = render_network_policy(a_job(), settings(f'storageCidrs: ["{cidr}", "::/0"]'))
    link_local = [ipaddress.ip_network("169.254.0.0/16"), ipaddress.ip_network("fe80::/10")]
    for rule in policy["spec"]["egress"]:
        for to in rule.get("to", ()):
            if "ipBlock" in to:
                allowed = ipaddress.ip_network(to["ipBlock"]["cidr"])
                excepted = [ipaddress.ip_network(item) for item in to["ipBlock"].get("except", ())]
                assert all(item.subnet_of(allowed) for item in excepted), "the API server refuses anything else"
                for network in link_local:
                    assert network.version != allowed.version or network in excepted or not network.overlaps(allowed)
