"""Are the rights there? Asked once at start: kopf retries a forbidden watch for a minute, so a gap in RBAC looks like a hang."""

import logging
from collections.abc import Sequence

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

logger = logging.getLogger(__name__)

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


async def check_access(api: KubeApi, settings: Settings) -> tuple[str, ...]:
    """Return which of ``settings.watch_namespaces`` to serve; none stands for all there are.

    One without any right is left out and told: who deletes a namespace deletes the operator's rights in it, and the others' jobs go on.

    Raises:
        Forbidden: a right is missing; every one is named.
    """
    wanted = settings.watch_namespaces
    lacking = {namespace: await _lacking(api, _questions(namespace)) for namespace in wanted or ("",)}
    served = [one for one, lacks in lacking.items() if len(lacks) < len(_questions(one))]
    at_home = await _lacking(
        api,
        [
            _question(resource, verb, settings.namespace, name="" if suffix is None else settings.service + suffix)
            for resource, suffix, verbs in NEEDED_AT_HOME
            for verb in verbs
        ],
    )
    missing = [right for one in served or lacking for right in lacking[one]] + at_home
    if missing:
        raise Forbidden(f"the operator's service account may not: {'; '.join(missing)}", status=403)
    for one in lacking.keys() - served:
        logger.error(
            "namespace %s is not served: no right in it; if it is no more, take it out of watchNamespaces", one
        )
    return tuple(one for one in wanted if one in served)


def _questions(namespace: str) -> list[dict[str, str]]:
    return [
        _question(resource, verb, namespace, subresource=subresource)
        for resource, subresource, verbs in NEEDED
        for verb in verbs
    ]


async def _lacking(api: KubeApi, questions: Sequence[dict[str, str]]) -> list[str]:
    return [_in_words(question) for question in questions if not await _may(api, question)]


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
