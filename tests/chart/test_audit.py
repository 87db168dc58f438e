"""The comparison of an audit log with the chart's rules; the log itself is made on the cluster (tests/cluster/test_rights.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_operator.access import NEEDED, NEEDED_AT_HOME
from tests.chart.helm import NAMESPACE, OPERATOR, RELEASE, example, render
from tests.cluster.audit import Access, Grant, accesses, grants, uncovered, unused

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"
# As an API server of version 1.34 writes it, without what nobody reads.
EVENT: dict[str, Any] = {
    "kind": "Event",
    "apiVersion": "audit.k8s.io/v1",
    "level": "Metadata",
    "stage": "ResponseComplete",
    "requestURI": "/apis/finetune.dev/v1alpha1/namespaces/team-a/finetunejobs/sentiment/status?fieldManager=finetune-operator",
    "verb": "patch",
    "user": {"username": ACCOUNT, "groups": ["system:serviceaccounts"]},
    "objectRef": {"resource": "finetunejobs", "namespace": "team-a", "name": "sentiment", "apiGroup": "finetune.dev", "apiVersion": "v1alpha1", "subresource": "status"},
    "responseStatus": {"metadata": {}, "code": 200},
    "annotations": {"authorization.k8s.io/decision": "allow", "authorization.k8s.io/reason": "RBAC: allowed by …"},
}  # fmt: skip


def line(**changes: Any) -> str:
    return json.dumps(EVENT | changes, separators=(",", ":"))


def reference(resource: str, group: str = "", **more: str) -> dict[str, str]:
    return {"resource": resource, "apiVersion": "v1", **({"apiGroup": group} if group else {}), **more}


CONFIG_MAP = reference("configmaps", namespace="team-a", name="sentiment-aaaaa")
LINES = {
    "a subresource": (line(), {Access("patch", "finetune.dev", "finetunejobs/status", "team-a", "sentiment")}),
    "a watch of everything": (line(verb="watch", objectRef=reference("pods")), {Access("watch", "", "pods")}),
    "an apply of what is there": (
        line(objectRef=CONFIG_MAP),
        {Access("patch", "", "configmaps", "team-a", "sentiment-aaaaa")},
    ),
    "an apply of what was not there": (
        line(objectRef=CONFIG_MAP, responseStatus={"code": 201}),
        {Access(verb, "", "configmaps", "team-a", "sentiment-aaaaa") for verb in ("patch", "create")},
    ),
    "no resource": (
        json.dumps({k: v for k, v in EVENT.items() if k != "objectRef"} | {"verb": "get", "requestURI": "/openid/v1/jwks?x=1"}),
        {Access("get", path="/openid/v1/jwks")},
    ),
    "what is refused": (
        line(objectRef=CONFIG_MAP, verb="get", responseStatus={"code": 403}),
        {Access("get", "", "configmaps", "team-a", "sentiment-aaaaa")},
    ),
    "somebody else": (line(user={"username": "admin"}), set()),
    "somebody in its name": (line(impersonatedUser={"username": ACCOUNT}), set()),
    "an empty line": ("", set()),
}  # fmt: skip


@pytest.mark.parametrize(("text", "found"), LINES.values(), ids=LINES.keys())
def test_what_a_line_of_the_log_says(text: str, found: set[Access]) -> None:
    assert accesses([text], ACCOUNT) == found


COVERED = {
    "in any namespace": (Grant("get", "", "pods"), Access("get", "", "pods", "team-a", "one"), True),
    "everywhere at once": (Grant("list", "", "pods"), Access("list", "", "pods"), True),
    "everywhere at once, in one namespace": (Grant("list", "", "pods", "team-a"), Access("list", "", "pods"), False),
    "another namespace": (Grant("get", "", "pods", "team-a"), Access("get", "", "pods", "team-b", "one"), False),
    "another name": (Grant("get", "", "secrets", "a", "one"), Access("get", "", "secrets", "a", "two"), False),
    "all names, of one": (Grant("get", "", "secrets", "a", "one"), Access("get", "", "secrets", "a"), False),
    "another verb": (Grant("get", "", "pods"), Access("list", "", "pods"), False),
    "a subresource": (Grant("patch", "", "pods"), Access("patch", "", "pods/status", "a", "one"), False),
    "another group": (Grant("get", "apps", "pods"), Access("get", "", "pods"), False),
    "a path": (Grant("get", path="/openid/v1/jwks"), Access("get", path="/openid/v1/jwks"), True),
}


@pytest.mark.parametrize(("grant", "access", "is_covered"), COVERED.values(), ids=COVERED.keys())
def test_what_covers_what(grant: Grant, access: Access, is_covered: bool) -> None:
    assert (uncovered([access], [grant]) == set()) == is_covered
    assert (unused([grant], [access]) == set()) == is_covered


def test_what_everybody_may_look_at_needs_no_grant() -> None:
    paths = ("/api", "/apis", "/apis/finetune.dev/v1alpha1", "/version", "/openid/v1/jwks", "/metrics")
    asked = {Access("get", path=path) for path in paths}
    assert {access.path for access in uncovered(asked, [])} == {"/openid/v1/jwks", "/metrics"}


@pytest.mark.parametrize(("name", "namespaces"), [("minimal", [""]), ("namespaced", ["team-a", "team-b"])])
def test_what_the_chart_grants_is_what_the_operator_needs(name: str, namespaces: list[str]) -> None:
    served = {
        Grant(verb, resource.group_version.rpartition("/")[0], f"{resource.plural}/{sub}".rstrip("/"), namespace)
        for resource, sub, verbs in NEEDED
        for verb in verbs
        for namespace in namespaces
    }
    home = {
        Grant(
            verb,
            resource.group_version.rpartition("/")[0],
            resource.plural,
            NAMESPACE,
            "" if suffix is None else RELEASE + suffix,
        )
        for resource, suffix, verbs in NEEDED_AT_HOME
        for verb in verbs
    }
    itself = {
        Grant("create", "authorization.k8s.io", "selfsubjectaccessreviews"),
        Grant("get", path="/openid/v1/jwks"),
        Grant("get", path="/.well-known/openid-configuration"),
    }
    documents = render(OPERATOR, "--values", example(name), "--set", "basicRole=true")
    assert grants(documents, ACCOUNT) == served | home | itself


def test_another_account_has_none_of_it() -> None:
    documents = render(OPERATOR, "--values", example("minimal"))
    assert grants(documents, f"system:serviceaccount:{NAMESPACE}:default") == set()
    assert grants(documents, f"system:serviceaccount:team-a:{RELEASE}") == set()
