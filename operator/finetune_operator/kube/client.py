"""``KubeApi`` over the official client's connection handling (configuration, login, TLS), without its models.

Retries are by verb: reads, and questions that are POSTed, are repeated after 429, 5xx and lost connections; writes only after 429, because a
write without an answer may have been done, and reconcile finds out by looking. A status is not repeated at all: after the wait it would not be
the newest any more. ``Retry-After`` is honoured. A token bucket keeps one operator from flooding the API server. ``may_write`` is asked
right before each write leaves, after all waiting: only the leader writes.
"""

import asyncio
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from finetune_operator.kube.api import ACCESS_REVIEWS, Resource
from finetune_operator.kube.errors import KubeError, NotLeading, TooMany, Unavailable, error_for
from finetune_operator.kube_object import KubeObject

FIELD_MANAGER = "finetune-operator"
PAGE_SIZE = 500
REQUEST_SECONDS = 30
ATTEMPTS = 4
# Five requests bring a job's first two pods about, so 80 such jobs a second; an API server that is slower than that says so with 429.
REQUESTS_PER_SECOND = 400.0
BURST = 800
_METHODS = {"get": "GET", "list": "GET", "create": "POST", "update": "PUT", "patch": "PATCH", "delete": "DELETE"}


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request went: ``verb`` and ``resource`` as in RBAC; ``status`` is 0 when there was no answer."""

    verb: str
    resource: str
    status: int
    seconds: float


def _ignore(_: Answer) -> None:
    pass


class TokenBucket:
    """Lets ``rate`` callers a second through, after a first ``burst``."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, float(burst)
        self._tokens, self._at = float(burst), 0.0

    async def take(self) -> None:
        """Wait for a token."""
        now = asyncio.get_running_loop().time()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        self._tokens -= 1.0
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens / self._rate)


class KubeClient:
    """``KubeApi`` against a real API server. ``on_answer`` is told of every request that left."""

    def __init__(
        self, client: ApiClient, *, may_write: Callable[[], bool], on_answer: Callable[[Answer], None] = _ignore
    ) -> None:
        self._client, self._may_write, self._on_answer = client, may_write, on_answer
        self._bucket = TokenBucket(REQUESTS_PER_SECOND, BURST)

    @classmethod
    async def connect(cls, *, may_write: Callable[[], bool], on_answer: Callable[[Answer], None] = _ignore) -> Self:
        """Log in as the pod's service account, else as the kubeconfig says."""
        configuration = Configuration()
        try:
            load_incluster_config(client_configuration=configuration)
        except ConfigException:
            await load_kube_config(client_configuration=configuration)
        configuration.connection_pool_maxsize = 64
        return cls(ApiClient(configuration), may_write=may_write, on_answer=on_answer)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def get(self, resource: Resource, namespace: str, name: str) -> KubeObject:
        """Return one object."""
        return await self._request("get", resource.plural, resource.path(namespace, name))

    async def list(
        self, resource: Resource, namespace: str | None = None, *, label_selector: str | None = None
    ) -> list[KubeObject]:
        """Return all objects, page by page."""
        items: list[KubeObject] = []
        query = {"limit": str(PAGE_SIZE)} | ({"labelSelector": label_selector} if label_selector else {})
        while True:
            page = await self._request("list", resource.plural, resource.path(namespace), query=query)
            items += page["items"]
            if not page["metadata"].get("continue"):
                return items
            query["continue"] = page["metadata"]["continue"]

    async def create(self, resource: Resource, namespace: str | None, body: KubeObject) -> KubeObject:
        """Create one object; ``Conflict`` when its name is taken."""
        query = {"fieldManager": FIELD_MANAGER}
        return await self._request("create", resource.plural, resource.path(namespace), query=query, body=body)

    async def apply(self, resource: Resource, namespace: str, body: KubeObject) -> KubeObject:
        """Server-side apply as our field manager."""
        path = resource.path(namespace, body["metadata"]["name"])
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._request(
            "patch", resource.plural, path, query=query, body=body, content_type="application/apply-patch+yaml"
        )

    async def replace(self, resource: Resource, namespace: str, body: KubeObject) -> KubeObject:
        """Replace one object; ``Conflict`` when it is not at the body's resource version any more."""
        path = resource.path(namespace, body["metadata"]["name"])
        return await self._request("update", resource.plural, path, query={"fieldManager": FIELD_MANAGER}, body=body)

    async def patch_status(
        self, resource: Resource, namespace: str, name: str, *, resource_version: str, status: Mapping[str, Any]
    ) -> KubeObject:
        """Merge ``status``; ``Conflict`` when the object is not at ``resource_version`` any more."""
        return await self._request(
            "patch",
            f"{resource.plural}/status",
            resource.path(namespace, name, "status"),
            query={"fieldManager": FIELD_MANAGER},
            body={"metadata": {"resourceVersion": resource_version}, "status": status},
            content_type="application/merge-patch+json",
            attempts=1,
        )

    async def patch_labels(
        self, resource: Resource, namespace: str, name: str, *, uid: str, labels: Mapping[str, str | None]
    ) -> KubeObject:
        """Set labels, and take off those that are None; ``Conflict`` when the object is another than the one with ``uid``."""
        return await self._request(
            "patch",
            resource.plural,
            resource.path(namespace, name),
            query={"fieldManager": FIELD_MANAGER},
            body={"metadata": {"uid": uid, "labels": dict(labels)}},
            content_type="application/merge-patch+json",
        )

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str) -> None:
        """Delete one object if it still is the one with ``uid``; ``Conflict`` when it is another."""
        body = {"preconditions": {"uid": uid}}
        await self._request("delete", resource.plural, resource.path(namespace, name), body=body)

    async def read(self, path: str) -> KubeObject:
        """Return the JSON document at a path that is no resource, such as ``/openid/v1/jwks``."""
        return await self._request("get", "openid", path)

    async def _request(
        self,
        verb: str,
        resource: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: KubeObject | None = None,
        content_type: str = "application/json",
        attempts: int = ATTEMPTS,
    ) -> KubeObject:
        method = _METHODS[verb]
        only_asks = method == "GET" or resource == ACCESS_REVIEWS.plural
        for attempt in range(1, attempts + 1):
            await self._bucket.take()
            if method != "GET" and not self._may_write():
                raise NotLeading(f"{method} {path}: not sent, for this process does not lead")
            try:
                return await self._once(verb, resource, path, query=query or {}, body=body, content_type=content_type)
            except (TooMany, Unavailable) as error:
                repeatable = isinstance(error, TooMany) or only_asks
                if attempt == attempts or not repeatable:
                    raise
                await asyncio.sleep(error.retry_after or random.uniform(0.5, 1.0) * 0.2 * 2**attempt)  # noqa: S311
        raise AssertionError("the last attempt returns or raises")

    async def _once(
        self,
        verb: str,
        resource: str,
        path: str,
        *,
        query: Mapping[str, str],
        body: KubeObject | None,
        content_type: str,
    ) -> KubeObject:
        method, loop = _METHODS[verb], asyncio.get_running_loop()
        request = await self._client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            # Not JSON alone: the API server calls its token keys application/jwk-set+json, and refuses who does not accept that.
            header_params={"Accept": "application/json, */*", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        asked_at, status = loop.time(), 0
        try:
            response = await self._client.call_api(*request, _request_timeout=REQUEST_SECONDS)
            raw = await response.read()
            status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"{method} {path}: {error or type(error).__name__}") from error
        finally:
            self._on_answer(Answer(verb, resource, status, loop.time() - asked_at))
        if status < 300:
            answer: KubeObject = json.loads(raw)
            return answer
        raise _error(method, path, status, raw, response.headers.get("Retry-After"))


def _error(method: str, path: str, status: int, raw: bytes, retry_after: str | None) -> KubeError:
    try:
        said = json.loads(raw).get("message", "")
    except (ValueError, AttributeError):
        said = raw[:300].decode("utf-8", "replace")
    seconds = float(retry_after) if retry_after and retry_after.isdigit() else None
    return error_for(status, f"{method} {path}: {status} {said}", seconds)
