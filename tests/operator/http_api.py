"""``FakeKubeApi`` behind real HTTP, for what speaks to an API server through the real client and from several threads."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from finetune_operator.kube.api import (
    ACCESS_REVIEWS,
    CONFIG_MAPS,
    JOBS,
    LEASES,
    NETWORK_POLICIES,
    PODS,
    SECRETS,
    Resource,
)
from finetune_operator.kube.client import Answer, KubeClient
from finetune_operator.kube.errors import KubeError
from finetune_operator.kube_object import KubeObject
from tests.operator.fake_api import FakeKubeApi

RESOURCES = (ACCESS_REVIEWS, CONFIG_MAPS, JOBS, LEASES, NETWORK_POLICIES, PODS, SECRETS)


def _described(*resources: Resource) -> dict[str, Any]:
    verbs = ["get", "list", "watch", "patch"]
    return {
        "resources": [
            {"kind": one.kind, "name": one.plural, "singularName": "", "namespaced": True, "verbs": verbs}
            for one in resources
        ]
    }


def _discovery() -> dict[str, Any]:
    """Return what kopf must find before it watches anything: namespaces and CRDs too, which it then leaves alone."""
    namespaces = Resource("v1", "namespaces", "Namespace")
    crds = Resource("apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition")
    groups = [resource.group_version.split("/") for resource in (JOBS, crds)]
    return {
        "/api": {"versions": ["v1"]},
        "/api/v1": _described(PODS, namespaces),
        "/apis": {
            "groups": [
                {"name": group, "versions": [{"version": version}], "preferredVersion": {"version": version}}
                for group, version in groups
            ]
        },
        **{f"/apis/{resource.group_version}": _described(resource) for resource in (JOBS, crds)},
    }


DISCOVERY = _discovery()


class HttpApi:
    """An API server on loopback. ``requests`` is what came in; ``answer_with`` and ``hold`` are how it fails."""

    def __init__(self, api: FakeKubeApi) -> None:
        self.api = api
        self.requests: list[tuple[str, str, str]] = []  # method, path, token
        self.answer_with: list[tuple[int, dict[str, str]]] = []  # to the next requests, with headers
        self.hold = asyncio.Event()  # requests wait until it is set
        self.hold.set()
        self._history: list[tuple[str, KubeObject]] = []  # what watches have shown
        self._stopping = False
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        self.hold.set()
        self._stopping = True
        await self._runner.cleanup()

    async def connect(
        self, *, may_write: Callable[[], bool], on_answer: Callable[[Answer], None] = lambda _: None
    ) -> KubeClient:
        """Do what ``KubeClient.connect`` does."""
        configuration = Configuration()
        configuration.host = self.url
        return KubeClient(ApiClient(configuration), may_write=may_write, on_answer=on_answer)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.requests.append((request.method, request.path, token))
        await self.hold.wait()
        if self.answer_with:
            status, headers = self.answer_with.pop(0)
            return web.json_response({"message": "as the test said"}, status=status, headers=headers)
        if request.path in DISCOVERY:
            return web.json_response(DISCOVERY[request.path])
        if "watch" in request.query:
            return await self._watch(request)
        try:
            return web.json_response(await self._do(request))
        except KubeError as error:
            return web.json_response({"message": str(error)}, status=error.status)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        """Show what happens, from a version on, until the watcher goes."""
        resource, *_ = _parsed(request.path)
        since, shown = int(request.query["resourceVersion"]), 0
        stream = web.StreamResponse(headers={"Content-Type": "application/json"})
        await stream.prepare(request)
        with suppress(ConnectionError):
            while not self._stopping:
                while self.api.events:
                    self._history.append(self.api.events.popleft())
                for kind, body in self._history[shown:]:
                    if body["kind"] == resource.kind and int(body["metadata"]["resourceVersion"]) > since:
                        await stream.write(json.dumps({"type": kind, "object": body}).encode() + b"\n")
                shown = len(self._history)
                await asyncio.sleep(0.02)
        return stream

    async def _do(self, request: web.Request) -> Any:  # noqa: PLR0911  one for each verb
        resource, namespace, name, subresource = _parsed(request.path)
        raw = await request.read()
        body = json.loads(raw) if raw else {}
        if request.method == "GET" and not name:
            items = await self.api.list(resource, namespace, label_selector=request.query.get("labelSelector"))
            return {"metadata": {"resourceVersion": str(self.api.resource_version)}, "items": items}
        if request.method == "POST":
            return await self.api.create(resource, namespace, body)
        assert namespace is not None
        assert name is not None
        if request.method == "GET":
            return await self.api.get(resource, namespace, name)
        if request.method == "PUT":
            return await self.api.replace(resource, namespace, body)
        if request.method == "DELETE":
            await self.api.delete(resource, namespace, name, uid=body["preconditions"]["uid"])
            return {}
        if request.content_type == "application/apply-patch+yaml":
            return await self.api.apply(resource, namespace, body)
        metadata = body["metadata"]
        if subresource == "status":
            version = metadata["resourceVersion"]
            return await self.api.patch_status(
                resource, namespace, name, resource_version=version, status=body["status"]
            )
        return await self.api.patch_labels(resource, namespace, name, uid=metadata["uid"], labels=metadata["labels"])


def _parsed(path: str) -> tuple[Resource, str | None, str | None, str | None]:
    parts = path.strip("/").split("/")
    version, rest = (parts[1], parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
    namespace = None
    if rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    resource = next(one for one in RESOURCES if (one.group_version, one.plural) == (version, rest[0]))
    return (resource, namespace, *[*rest[1:], None, None][:2])  # type: ignore[return-value]
