"""Both charts on the real API server: rights, pod security, who may name a secret, and what an uninstall leaves.

Jobs are created with ``--dry-run=server``, which runs all of admission, or suspended.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.access import NEEDED
from finetune_operator.kube.api import Resource
from tests.api.api_server import ApiServer
from tests.api.manifests import changed, script_job
from tests.chart.conftest import Installation
from tests.chart.helm import CRDS, ci_values, render
from tests.cluster.console import ClusterError
from tests.cluster.installation import CRDS_RELEASE, SYSTEM_NAMESPACE

Wait = Callable[[Callable[[], str]], str]
JOBS = {
    "apiGroups": ["finetune.dev"],
    "resources": ["finetunejobs"],
    "verbs": ["get", "list", "create", "patch", "update"],
}
CREATE = ("create", "--dry-run=server", "-f", "-")


def _full_name(resource: Resource) -> str:
    return f"{resource.plural}.{resource.group_version.rpartition('/')[0]}".rstrip(".")


def job(**storage: str) -> dict[str, Any]:
    return changed(script_job("named"), {"spec.storage": {"uri": "s3://checkpoints", **storage}})


def right(resource: str, verb: str, *names: str) -> dict[str, Any]:
    return {
        "apiGroups": [""],
        "resources": [resource],
        "verbs": [verb],
        **({"resourceNames": list(names)} if names else {}),
    }


# Who may name a secret


def test_a_user_without_a_right_to_the_secret_is_refused(installation: Installation, refusal: Wait) -> None:
    installation.allow("alice", "jobs", JOBS)
    said = refusal(lambda: installation.as_user("alice", *CREATE, job=job(secretName="s3-credentials")))
    assert (
        f'spec.storage.secretName: user "alice" may not get secret "s3-credentials" in namespace "{installation.tenant}"'
        in said
    )
    assert "Name a secret that you may read" in said
    assert "ask for a Role with verb get" in said


def test_a_user_with_a_right_to_the_secret_is_accepted(
    installation: Installation, acceptance: Wait, refusal: Wait
) -> None:
    installation.allow("bob", "jobs", JOBS)
    installation.allow("bob", "secret", right("secrets", "get", "s3-credentials"))
    acceptance(lambda: installation.as_user("bob", *CREATE, job=job(secretName="s3-credentials")))
    assert "other" in refusal(lambda: installation.as_user("bob", *CREATE, job=job(secretName="other")))


def test_a_user_who_may_read_secrets_elsewhere_is_refused(
    installation: Installation, acceptance: Wait, refusal: Wait
) -> None:
    installation.allow("carol", "jobs", JOBS)
    installation.allow("carol", "secret", right("secrets", "list"))
    assert "may not get secret" in refusal(
        lambda: installation.as_user("carol", *CREATE, job=job(secretName="s3-credentials"))
    )


def test_a_job_without_secret_or_account_is_nobodys_concern(installation: Installation, acceptance: Wait) -> None:
    installation.allow("dave", "jobs", JOBS)
    acceptance(lambda: installation.as_user("dave", *CREATE, job=job()))
    acceptance(lambda: installation.as_user("dave", *CREATE, job=script_job()))


# Who may name a service account


def test_a_user_without_a_right_to_the_service_account_is_refused(installation: Installation, refusal: Wait) -> None:
    installation.allow("erin", "jobs", JOBS)
    said = refusal(lambda: installation.as_user("erin", *CREATE, job=job(serviceAccountName="trainer")))
    assert 'spec.storage.serviceAccountName: user "erin" may not use service account "trainer"' in said
    assert "verb use on resource serviceaccounts" in said


@pytest.mark.parametrize(
    ("user", "rule"),
    [("frank", right("serviceaccounts", "use", "trainer")), ("grace", right("pods", "create"))],
    ids=["by the verb use on it", "by the right to create pods"],
)
def test_a_user_who_may_use_the_service_account_is_accepted(
    installation: Installation, acceptance: Wait, user: str, rule: dict[str, Any]
) -> None:
    installation.allow(user, "jobs", JOBS)
    installation.allow(user, "account", rule)
    acceptance(lambda: installation.as_user(user, *CREATE, job=job(serviceAccountName="trainer")))


# Who may name a profile


def test_a_profile_is_for_who_may_use_it(installation: Installation, acceptance: Wait, refusal: Wait) -> None:
    def with_profile(name: str) -> dict[str, Any]:
        return changed(script_job("profiled"), {"spec.workers": {"profile": name}})

    installation.install("--set", "profiles.gpu.image=a", "--set", "profiles.big.image=a,profiles.big.restricted=true")
    installation.allow("olivia", "jobs", JOBS)
    installation.bind("peter", "edit")
    installation.bind("quentin", "edit")
    use = {"apiGroups": ["finetune.dev"], "resources": ["profiles"], "verbs": ["use"], "resourceNames": ["big"]}
    installation.allow("quentin", "profile", use)
    said = refusal(lambda: installation.as_user("olivia", *CREATE, job=with_profile("gpu")))
    assert 'spec.workers.profile: user "olivia" may not use profile "gpu"' in said
    assert "verb use on resource profiles.finetune.dev" in said
    acceptance(lambda: installation.as_user("olivia", *CREATE, job=with_profile("default")))
    acceptance(lambda: installation.as_user("peter", *CREATE, job=with_profile("gpu")))
    assert '"big"' in refusal(lambda: installation.as_user("peter", *CREATE, job=with_profile("big")))
    acceptance(lambda: installation.as_user("quentin", *CREATE, job=with_profile("big")))


# Jobs that are there


def test_editing_a_colleagues_job_needs_no_right_to_its_secret(installation: Installation, acceptance: Wait) -> None:
    installation.allow("heidi", "jobs", JOBS)
    installation.cluster.kubectl(
        "apply", "--namespace", installation.tenant, "-f", "-", input=json.dumps(job(secretName="s3"))
    )
    patch = ("patch", "finetunejob", "named", "--type", "merge", "--dry-run=server", "--patch")
    acceptance(lambda: installation.as_user("heidi", *patch, '{"spec": {"workers": {"nodes": 3}}}'))
    acceptance(lambda: installation.as_user("heidi", *patch, '{"metadata": {"labels": {"team": "a"}}}'))


def test_the_operator_writes_status_of_a_job_whose_secret_it_may_not_read(
    installation: Installation, acceptance: Wait
) -> None:
    installation.cluster.kubectl(
        "apply", "--namespace", installation.tenant, "-f", "-", input=json.dumps(job(secretName="s3"))
    )
    operator = ApiServer(installation.cluster.kubeconfig, installation.tenant, user=_account(installation))
    written = {"status": {"phase": "Pending"}}
    acceptance(lambda: str(operator.merge(script_job("named"), written, subresource="status", dry_run=True)))
    operator.close()


# Rights and pod security


@pytest.mark.parametrize(
    ("verb", "resource", "subresource"),
    [(verb, _full_name(resource), subresource) for resource, subresource, verbs in NEEDED for verb in verbs],
)
def test_the_operator_may_do_what_it_asks_for(
    installation: Installation, acceptance: Wait, verb: str, resource: str, subresource: str
) -> None:
    more = ("--subresource", subresource) if subresource else ()
    acceptance(lambda: _can_i(installation, verb, resource, "--all-namespaces", *more))


@pytest.mark.parametrize(
    "question",
    [
        ("get", "secrets/{release}-job-server"),
        ("update", "secrets/{release}-job-server"),
        ("create", "secrets"),
        ("get", "leases.coordination.k8s.io/{release}"),
        ("update", "leases.coordination.k8s.io/{release}"),
        ("create", "leases.coordination.k8s.io"),
        ("get", "pods"),
        ("list", "pods"),
        ("patch", "pods"),
        ("create", "selfsubjectaccessreviews.authorization.k8s.io"),
        ("get", "/openid/v1/jwks"),
        ("get", "/.well-known/openid-configuration"),
    ],
    ids=" ".join,
)
def test_the_operator_may_keep_its_certificates_lead_and_know_its_agents(
    installation: Installation, acceptance: Wait, question: tuple[str, str]
) -> None:
    verb, resource = question
    where = () if resource.startswith("/") else ("--namespace", installation.namespace)
    acceptance(lambda: _can_i(installation, verb, resource.format(release=installation.release), *where))


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("get", "secrets"),
        ("list", "secrets"),
        ("create", "secrets"),
        ("update", "finetunejobs.finetune.dev"),
        ("patch", "finetunejobs.finetune.dev"),
        ("patch", "pods"),
        ("get", "leases.coordination.k8s.io"),
        ("create", "leases.coordination.k8s.io"),
        ("create", "pods --subresource=exec"),
        ("get", "configmaps"),
        ("create", "serviceaccounts --subresource=token"),
        ("impersonate", "serviceaccounts"),
        ("create", "roles.rbac.authorization.k8s.io"),
    ],
)
def test_the_operator_may_not(installation: Installation, refusal: Wait, verb: str, resource: str) -> None:
    refusal(lambda: _can_i(installation, verb, *resource.split(), "--namespace", installation.tenant))


def test_the_operator_reads_no_secret_but_its_own(installation: Installation, refusal: Wait) -> None:
    refusal(lambda: _can_i(installation, "get", "secrets/another", "--namespace", installation.namespace))


def test_the_operator_holds_no_lease_but_its_own(installation: Installation, refusal: Wait) -> None:
    refusal(
        lambda: _can_i(
            installation, "update", "leases.coordination.k8s.io/another", "--namespace", installation.namespace
        )
    )


def test_the_operators_pod_passes_restricted_pod_security(installation: Installation) -> None:
    template = installation.cluster.get("deployment", installation.release, installation.namespace)["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "operator", "labels": template["metadata"]["labels"]},
    }
    said = installation.cluster.kubectl(
        *("create", "--dry-run=server", "--namespace", installation.namespace, "-f", "-"),
        input=json.dumps(pod | {"spec": template["spec"]}),
    )
    assert "pod/operator created" in said


@pytest.mark.parametrize(("chart", "values"), ci_values(), ids=lambda path: path.stem)
def test_the_api_server_takes_every_object_as_it_is_written(
    installation: Installation, chart: Path, values: Path
) -> None:
    """Strictly: a misspelt field is an error, and not dropped. The Prometheus Operator's API is not there."""
    objects = [item for item in render(chart, "--values", values) if "monitoring.coreos.com" not in item["apiVersion"]]
    for item in objects:
        if "namespace" in item["metadata"]:
            item["metadata"]["namespace"] = installation.namespace
    documents = "\n---\n".join(json.dumps(item) for item in objects)
    said = installation.cluster.kubectl(
        *("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-"),
        input=documents,
    )
    assert said.count("serverside-applied") == len(objects)


# The cluster's own roles


def test_who_may_view_or_edit_a_namespace_may_do_so_with_its_jobs(
    installation: Installation, acceptance: Wait, refusal: Wait
) -> None:
    installation.bind("ivan", "view")
    installation.bind("judy", "edit")
    jobs = "finetunejobs.finetune.dev"

    def ask(user: str, verb: str, *more: str) -> Callable[[], str]:
        return lambda: installation.as_user(user, "auth", "can-i", verb, jobs, *more)

    acceptance(ask("judy", "create"))  # and by then the roles are known
    for user, verb in [("ivan", "get"), ("ivan", "watch"), ("judy", "list"), ("judy", "patch"), ("judy", "delete")]:
        acceptance(ask(user, verb))
    for user, verb in [("ivan", "create"), ("ivan", "patch"), ("ivan", "delete")]:
        refusal(ask(user, verb))
    for verb in ("patch", "update"):
        refusal(ask("judy", verb, "--subresource=status"))


def test_the_api_server_has_no_complaint_about_the_policy(installation: Installation, acceptance: Wait) -> None:
    name = f"{installation.namespace}-{installation.release}"
    policy = installation.cluster.get("validatingadmissionpolicy", name)
    assert "expressionWarnings" not in policy.get("status", {}).get("typeChecking", {})


# Life


def test_the_notes_tell_how_to_go_on(installation: Installation) -> None:
    notes = installation.install("--set", "profiles.gpu.image=a")
    assert f"rollout status deployment/{installation.release}" in notes
    assert "Jobs may use the profiles: default, gpu" in notes
    assert "Jobs may store at: amazon-s3" in notes
    assert "CAUTION" not in notes


def test_an_upgrade_is_rolled_back_to_what_was(installation: Installation) -> None:
    """Also after values that Helm has refused."""
    cluster, release = installation.cluster, (installation.release, "--namespace", installation.namespace)

    def state() -> tuple[Any, Any, Any]:
        template = cluster.get("deployment", installation.release, installation.namespace)["spec"]["template"]
        config = cluster.get("configmap", installation.release, installation.namespace)["data"]
        return template, config, cluster.helm("get", "values", *release, "--all")

    installation.install()
    before = state()
    revision = json.loads(cluster.helm("status", *release, "-o", "json"))["version"]
    installation.install("--set", "workers=9,replicas=1,watchNamespaces={default},networkPolicy.enabled=false")
    changed_state = state()
    assert all(one != other for one, other in zip(before, changed_state, strict=True))
    assert not cluster.kubectl("get", "networkpolicies", "-n", installation.namespace, "-o", "name").strip()
    with pytest.raises(ClusterError, match="/workers"):
        installation.install("--set", "workers=0")
    assert state() == changed_state, "what is refused changes nothing"
    cluster.helm("rollback", *release[:1], str(revision), *release[1:])
    assert state() == before
    roles = cluster.kubectl("get", "roles", "-n", "default", "-l", f"app.kubernetes.io/instance={installation.release}")
    assert not roles.strip(), "rights that are not needed any more are taken back"
    assert cluster.kubectl("get", "networkpolicies", "-n", installation.namespace, "-o", "name").strip()


def test_uninstalling_both_charts_leaves_the_crd_and_the_jobs(installation: Installation) -> None:
    """In a release of the CRD's own, taken over for the test and given back, since other tests share the cluster."""
    cluster = installation.cluster
    cluster.kubectl("apply", "--namespace", installation.tenant, "-f", "-", input=json.dumps(script_job("survivor")))
    before = cluster.get("finetunejob", "survivor", installation.tenant)["metadata"]["uid"]
    _uninstall_everything(installation)
    assert cluster.get("finetunejob", "survivor", installation.tenant)["metadata"]["uid"] == before
    _install_everything(installation)
    assert cluster.get("finetunejob", "survivor", installation.tenant)["metadata"]["uid"] == before


def _uninstall_everything(installation: Installation) -> None:
    installation.cluster.helm("uninstall", installation.release, "--namespace", installation.namespace)
    installation.cluster.helm("uninstall", CRDS_RELEASE, "--namespace", SYSTEM_NAMESPACE)


def _install_everything(installation: Installation) -> None:
    installation.cluster.helm("upgrade", "--install", CRDS_RELEASE, str(CRDS), "--namespace", SYSTEM_NAMESPACE)
    installation.install()


def _account(installation: Installation) -> str:
    return f"system:serviceaccount:{installation.namespace}:{installation.release}"


def _can_i(installation: Installation, verb: str, resource: str, *more: str) -> str:
    """Ask as the operator, in the groups of a service account; raises when the answer is no."""
    groups = ("system:serviceaccounts", f"system:serviceaccounts:{installation.namespace}", "system:authenticated")
    identity = ("--as", _account(installation), *(f"--as-group={group}" for group in groups))
    return installation.cluster.kubectl("auth", "can-i", verb, resource, *more, *identity)
