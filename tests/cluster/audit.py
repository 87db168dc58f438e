"""What the operator has asked of the API server, against what its roles allow.

The API server of the test cluster writes an audit log of the service accounts of the operator's namespace (``control_plane.py``). Each request in
it is an ``Access``; each verb on each resource of each rule that is bound to the account is a ``Grant``. An access that no grant covers was
refused, or allowed by somebody else's role; a grant that covers no access is a right too many, or one that nothing has tried. Whether a request was
refused is not asked: while a release is uninstalled, its roles go before its pods.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

Object = Mapping[str, Any]

# What the cluster's own role system:discovery allows to everybody who is known: what there is, but nothing of what is in it.
DISCOVERY = ("/api", "/apis", "/version", "/openapi")


@dataclass(frozen=True, slots=True, order=True)
class Access:
    """One kind of request: to a resource, or to a path that is none."""

    verb: str
    group: str = ""
    resource: str = ""  # with its subresource: pods/status
    namespace: str = ""
    name: str = ""
    path: str = ""


@dataclass(frozen=True, slots=True, order=True)
class Grant:
    """One verb on one resource or path that a rule allows; without a namespace in all of them, without a name on all of them."""

    verb: str
    group: str = ""
    resource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""

    def covers(self, access: Access) -> bool:
        """Tell whether it allows a request, as RBAC would."""
        return (
            (self.verb, self.group, self.resource, self.path)
            == (access.verb, access.group, access.resource, access.path)
            and self.namespace in ("", access.namespace)
            and self.name in ("", access.name)
        )


def accesses(log: Iterable[str], account: str) -> set[Access]:
    """Return what an account has asked for by itself. A request that somebody made in its name (``--as``) is not its own."""
    events = (json.loads(line) for line in log if line.strip())
    own = (e for e in events if e["user"]["username"] == account and "impersonatedUser" not in e)
    return {access for event in own for access in _accesses(event)}


def grants(objects: Sequence[Object], account: str) -> set[Grant]:
    """Return what roles and bindings among the objects allow to a service account."""
    *_, namespace, name = account.split(":")
    roles = {
        (item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"]): item["rules"]
        for item in objects
        if item["kind"] in ("Role", "ClusterRole")
    }
    found: set[Grant] = set()
    for item in objects:
        subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
        if item["kind"] in ("RoleBinding", "ClusterRoleBinding") and subject in item["subjects"]:
            where, role = item["metadata"].get("namespace", ""), item["roleRef"]
            home = where if role["kind"] == "Role" else ""
            found |= {grant for rule in roles[role["kind"], home, role["name"]] for grant in _grants(rule, where)}
    return found


def uncovered(asked: Iterable[Access], granted: Iterable[Grant]) -> set[Access]:
    """Return what was asked for without any grant of ours."""
    granted = list(granted)
    return {
        access
        for access in asked
        if not any(grant.covers(access) for grant in granted) and not access.path.startswith(DISCOVERY)
    }


def unused(granted: Iterable[Grant], asked: Iterable[Access]) -> set[Grant]:
    """Return the grants that nothing has needed. Where two cover the same, both count as used."""
    asked = list(asked)
    return {grant for grant in granted if not any(grant.covers(access) for access in asked)}


def _accesses(event: Object) -> Iterator[Access]:
    reference = event.get("objectRef", {})
    if "resource" not in reference:
        yield Access(event["verb"], path=urlsplit(event["requestURI"]).path)
        return
    resource = "/".join(part for part in (reference["resource"], reference.get("subresource")) if part)
    where = (reference.get("apiGroup", ""), resource, reference.get("namespace", ""), reference.get("name", ""))
    yield Access(event["verb"], *where)
    if event["verb"] == "patch" and event.get("responseStatus", {}).get("code") == 201:
        yield Access("create", *where)  # an apply of what was not there needs the right to create it too


def _grants(rule: Object, namespace: str) -> Iterator[Grant]:
    for verb in rule["verbs"]:
        for path in rule.get("nonResourceURLs", ()):
            yield Grant(verb, path=path)
        for group in rule.get("apiGroups", ()):
            for resource in rule["resources"]:
                for name in rule.get("resourceNames", ("",)):
                    yield Grant(verb, group, resource, namespace, name)
