"""Are the rights there? Asked once at start: kopf retries a forbidden watch for a minute, so a gap in RBAC looks like a hang."""

from finetune_operator.kube.api import (
    ACCESS_REVIEWS,
    CONFIG_MAPS,
    JOBS,
    LEASES,
    NETWORK_POLICIES,
    PODS,
    SECRETS,
    KubeApi,
    Resource,
)
from finetune_operator.kube.errors import Forbidden
from finetune_operator.settings import Settings

NEEDED: tuple[tuple[Resource, str, tuple[str, ...]], ...] = (
    (JOBS, "", ("get", "list", "watch", "delete")),
    (JOBS, "status", ("patch",)),
    (PODS, "", ("get", "list", "watch", "create", "delete")),
    (CONFIG_MAPS, "", ("create", "patch")),
    (NETWORK_POLICIES, "", ("create", "patch")),
)
# In the operator's own namespace, of the object with this suffix to the release's name, or of any: its certificates, its lease, its label.
NEEDED_AT_HOME: tuple[tuple[Resource, str | None, tuple[str, ...]], ...] = (
    (SECRETS, "-job-server", ("get", "update")),
    (SECRETS, None, ("create",)),
    (LEASES, "", ("get", "update")),
    (LEASES, None, ("create",)),
    (PODS, None, ("get", "list", "patch")),
)


async def check_access(api: KubeApi, settings: Settings) -> None:
    """Raise ``Forbidden`` that names every right the operator lacks."""
    questions = [
        _question(resource, verb, namespace, subresource=subresource)
        for namespace in settings.watch_namespaces or ("",)
        for resource, subresource, verbs in NEEDED
        for verb in verbs
    ] + [
        _question(resource, verb, settings.namespace, name="" if suffix is None else settings.service + suffix)
        for resource, suffix, verbs in NEEDED_AT_HOME
        for verb in verbs
    ]
    missing = [_in_words(question) for question in questions if not await _may(api, question)]
    if missing:
        raise Forbidden(f"the operator's service account may not: {'; '.join(missing)}", status=403)


def _question(
    resource: Resource, verb: str, namespace: str, *, subresource: str = "", name: str = ""
) -> dict[str, str]:
    return {
        "group": resource.group_version.rpartition("/")[0],
        "resource": resource.plural,
        "subresource": subresource,
        "verb": verb,
        "namespace": namespace,
        "name": name,
    }


def _in_words(question: dict[str, str]) -> str:
    what = "/".join(part for part in (question["resource"], question["subresource"], question["name"]) if part)
    return f"{question['verb']} {what} in {question['namespace'] or 'all namespaces'}"


async def _may(api: KubeApi, question: dict[str, str]) -> bool:
    body = {
        "apiVersion": ACCESS_REVIEWS.group_version,
        "kind": ACCESS_REVIEWS.kind,
        "spec": {"resourceAttributes": question},
    }
    review = await api.create(ACCESS_REVIEWS, None, body)
    return bool(review["status"]["allowed"])
