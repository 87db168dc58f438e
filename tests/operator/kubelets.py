"""Scheduler, nodes and kubelets of a cluster that has none, for the pods of jobs: each is bound, runs, has an agent, and ends when that does.

They speak to a real API server (real_api.py), and agents to a real job server with tokens that the API server has made for their pods. A pod
that is deleted goes at once, as on a node that kills its processes. What the API server does not answer is tried again.
"""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp

from finetune_api.contract import MANAGED_BY_LABEL, MANAGER, TOKEN_AUDIENCE, TRAINER_CONTAINER
from tests.operator.agents import Agent, JobServerAccess
from tests.operator.real_api import Client, Json, Refused
from tests.operator.simulation import SimulatedAgent

SELECTOR = f"{MANAGED_BY_LABEL}={MANAGER}"
PODS = "/api/v1/pods"
TRAINER = {"name": TRAINER_CONTAINER, "ready": True, "restartCount": 0, "image": "trainer", "imageID": "trainer"}
RETRY_SECONDS = 0.5


class Kubelets:
    """All nodes. ``agents`` is by pod uid; ``on_pod`` is called with each event of the watch."""

    def __init__(
        self,
        client: Client,
        access: JobServerAccess | None,
        *,
        nodes: int = 20,
        mind: Callable[..., SimulatedAgent] = SimulatedAgent,
        on_pod: Callable[[str, Json], None] = lambda kind, body: None,
    ) -> None:
        self.agents: dict[str, Agent] = {}
        self._client, self._access, self._mind, self._on_pod = client, access, mind, on_pod
        self._nodes = itertools.cycle(f"node-{number}" for number in range(nodes))
        self._addresses = (f"198.18.{number // 250 + 100}.{number % 250 + 1}" for number in itertools.count())
        self._pods: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Follow the pods until cancelled."""
        try:
            while True:
                with suppress(aiohttp.ClientError, Refused):
                    await self._follow()
                await asyncio.sleep(RETRY_SECONDS)
        finally:
            for task in self._pods.values():
                task.cancel()
            await asyncio.gather(*self._pods.values(), return_exceptions=True)

    async def _follow(self) -> None:
        listed = await self._client.get(f"{PODS}?labelSelector={SELECTOR}")
        there = {body["metadata"]["uid"] for body in listed["items"]}
        for uid in self._pods.keys() - there:
            self._end(uid)
        for body in listed["items"]:
            self._see("ADDED", body)
        async for event in self._client.watch(PODS, listed["metadata"]["resourceVersion"], SELECTOR):
            if event["type"] == "ERROR":
                return
            self._see(event["type"], event["object"])

    def _see(self, kind: str, body: Json) -> None:
        uid = body["metadata"]["uid"]
        self._on_pod(kind, body)
        if kind == "DELETED":
            self._end(uid)
        elif "deletionTimestamp" in body["metadata"]:
            self._end(uid)
            self._pods[uid] = asyncio.create_task(self._remove(body))
        elif uid not in self._pods and body["status"].get("phase") == "Pending":
            self._pods[uid] = asyncio.create_task(self._play(body))

    def _end(self, uid: str) -> None:
        self.agents.pop(uid, None)
        task = self._pods.pop(uid, None)
        if task is not None:
            task.cancel()

    async def _play(self, body: Json) -> None:
        """Be a pod from its binding to its end."""
        path, address = _path(body), next(self._addresses)
        target = {"apiVersion": "v1", "kind": "Node", "name": next(self._nodes)}
        binding = {"metadata": {"name": body["metadata"]["name"]}, "target": target}
        await self._persistently(lambda: self._client.post(f"{path}/binding", binding))
        state = {"running": {"startedAt": body["metadata"]["creationTimestamp"]}}
        await self._show(path, phase="Running", podIP=address, containerStatuses=[TRAINER | {"state": state}])
        if self._access is None:
            return
        uid = body["metadata"]["uid"]
        agent = Agent(self._mind(uid, address), self._access, self._token_of(body))
        self.agents[uid] = agent
        await agent.run()
        state = {"terminated": {"exitCode": 0, "reason": "Completed"}}
        await self._show(path, phase="Succeeded", containerStatuses=[TRAINER | {"ready": False, "state": state}])

    async def _show(self, path: str, **status: Any) -> None:
        await self._persistently(lambda: self._client.merge(f"{path}/status", {"status": status}))

    async def _remove(self, body: Json) -> None:
        await self._persistently(lambda: self._client.delete(_path(body), grace_seconds=0))

    def _token_of(self, body: Json) -> Callable[[], Awaitable[str]]:
        """Return what asks for a pod's token once, as the kubelet does for its volume."""
        metadata, tokens = body["metadata"], list[str]()
        reference = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
        request = {"spec": {"audiences": [TOKEN_AUDIENCE], "expirationSeconds": 3600, "boundObjectRef": reference}}
        path = f"/api/v1/namespaces/{metadata['namespace']}/serviceaccounts/{body['spec']['serviceAccountName']}/token"
        lock = asyncio.Lock()

        async def token() -> str:
            async with lock:
                if not tokens:
                    answer = await self._persistently(lambda: self._client.post(path, request))
                    tokens.append(answer["status"]["token"])
            return tokens[0]

        return token

    async def _persistently(self, do: Callable[[], Awaitable[Any]]) -> Any:
        """Try until there is an answer; what is gone, or there already, needs no more."""
        while True:
            try:
                return await do()
            except Refused as error:
                if error.status in (404, 409):
                    return None
                if error.status < 500 and error.status != 429:
                    raise
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.5))


@asynccontextmanager
async def running(kubelets: Kubelets) -> AsyncIterator[Kubelets]:
    """Run them for as long as the block does."""
    task = asyncio.create_task(kubelets.run())
    try:
        yield kubelets
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def make_nodes(client: Client, count: int = 20) -> None:
    """Make the nodes that pods are bound to; nobody says that they are not ready."""
    for number in range(count):
        await client.post("/api/v1/nodes", {"metadata": {"name": f"node-{number}"}})


def _path(body: Json) -> str:
    return f"/api/v1/namespaces/{body['metadata']['namespace']}/pods/{body['metadata']['name']}"
