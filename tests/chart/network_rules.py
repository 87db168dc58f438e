"""What NetworkPolicies allow, by the rules of https://kubernetes.io/docs/concepts/services-networking/network-policies/ and its API.

A pod that no policy selects for a direction is open in it; for one that is selected, what any of the policies allows is allowed. A connection
between two pods needs the leave of both sides. Addresses outside the cluster are places without labels; a range of addresses is taken to
cover pods and nodes too, which an implementation may do or not, so what is refused here is refused everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """A pod, or with no namespace an address outside."""

    address: str
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def may_connect(policies: Sequence[Policy], source: Place, target: Place, port: int, protocol: str = "TCP") -> bool:
    """Tell whether a connection is allowed on both sides."""
    return _allows(policies, "Egress", source, target, (port, protocol)) and _allows(
        policies, "Ingress", target, source, (port, protocol)
    )


def _allows(policies: Sequence[Policy], direction: str, own: Place, other: Place, port: tuple[int, str]) -> bool:
    rules, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    selecting = [policy for policy in policies if direction in policy["spec"]["policyTypes"] and _covers(policy, own)]
    return not selecting or any(
        _has_peer(rule.get(peers), policy, other) and _has_port(rule.get("ports"), port)
        for policy in selecting
        for rule in policy["spec"].get(rules, ())
    )


def _covers(policy: Policy, pod: Place) -> bool:
    return policy["metadata"]["namespace"] == pod.namespace and _selects(policy["spec"]["podSelector"], pod.labels)


def _has_peer(peers: Sequence[Mapping[str, Any]] | None, policy: Policy, other: Place) -> bool:
    return not peers or any(_is_peer(peer, policy, other) for peer in peers)


def _is_peer(peer: Mapping[str, Any], policy: Policy, other: Place) -> bool:
    if "ipBlock" in peer:
        assert peer.keys() == {"ipBlock"}, "the API server refuses anything beside it"
        within = [peer["ipBlock"]["cidr"]]
        return _is_in(other, within) and not _is_in(other, peer["ipBlock"].get("except", ()))
    if not other.namespace:
        return False
    if "namespaceSelector" in peer:
        in_namespace = _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace})
    else:
        in_namespace = other.namespace == policy["metadata"]["namespace"]
    return in_namespace and _selects(peer.get("podSelector", {}), other.labels)


def _is_in(place: Place, networks: Sequence[str]) -> bool:
    return any(ip_address(place.address) in ip_network(network) for network in networks)


def _has_port(ports: Sequence[Mapping[str, Any]] | None, wanted: tuple[int, str]) -> bool:
    return not ports or any(
        (entry["port"], entry["protocol"]) == wanted and entry.keys() == {"port", "protocol"} for entry in ports
    )


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        _holds(expression, labels) for expression in selector.get("matchExpressions", ())
    )


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    assert expression["operator"] == "In", "the only operator that our policies use"
    return labels.get(expression["key"]) in expression["values"]
