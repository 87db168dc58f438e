"""Are the rights there? Asked once at start: kopf retries a forbidden watch for a minute, so a gap in RBAC looks like a hang."""

from finetune_operator.kube.api import ACCESS_REVIEWS, CONFIG_MAPS, JOBS, NETWORK_POLICIES, PODS, KubeApi, Resource
from finetune_operator.kube.errors import Forbidden
from finetune_operator.settings import Settings

NEEDED: tuple[tuple[Resource, str, tuple[str, ...]], ...] = (
    (JOBS, "", ("get", "list", "watch", "delete")),
    (JOBS, "status", ("patch",)),
    (PODS, "", ("get", "list", "watch", "create", "delete")),
    (CONFIG_MAPS, "", ("create", "patch")),
    (NETWORK_POLICIES, "", ("create", "patch")),
)


async def check_access(api: KubeApi, settings: Settings) -> None:
    """Raise ``Forbidden`` that names every right the operator lacks."""
    missing = [
        f"{verb} {resource.plural}{'/' + subresource if subresource else ''} in {namespace or 'all namespaces'}"
        for namespace in settings.watch_namespaces or ("",)
        for resource, subresource, verbs in NEEDED
        for verb in verbs
        if not await _may(api, resource, subresource, verb, namespace)
    ]
    if missing:
        raise Forbidden(f"the operator's service account may not: {'; '.join(missing)}", status=403)


async def _may(api: KubeApi, resource: Resource, subresource: str, verb: str, namespace: str) -> bool:
    group = resource.group_version.rpartition("/")[0]
    attributes = {
        "group": group,
        "resource": resource.plural,
        "subresource": subresource,
        "verb": verb,
        "namespace": namespace,
    }
    body = {
        "apiVersion": ACCESS_REVIEWS.group_version,
        "kind": ACCESS_REVIEWS.kind,
        "spec": {"resourceAttributes": attributes},
    }
    review = await api.create(ACCESS_REVIEWS, None, body)
    return bool(review["status"]["allowed"])
