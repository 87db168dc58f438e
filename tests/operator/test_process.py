"""Two real processes, kopf and all, and what the system does to them: signals, stops, an API server that hangs."""

import asyncio
import base64
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from finetune_api.contract import ORDER_PATH, REPORT_PATH
from finetune_operator.kube.api import JOBS, LEASES, PODS, SECRETS, Resource
from finetune_operator.kube_object import KubeObject
from tests.operator.documents import SETTINGS, job_body
from tests.operator.fake_api import FakeKubeApi
from tests.operator.http_api import HttpApi
from tests.operator.operator_process import free_port, spawn_operator

TIMES = {"leaseSeconds": 8, "renewSeconds": 6, "retrySeconds": 0.2}


class Scene:
    """An API server, a folder, and processes."""

    def __init__(self, server: HttpApi, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.ports: dict[str, dict[str, int]] = {}

    async def start(self, name: str, *, token: str = "", **settings: Any) -> asyncio.subprocess.Process:
        ports = self.ports[name] = {port: free_port() for port in ("jobServerPort", "healthPort", "metricsPort")}
        metadata = {"name": name, "namespace": "finetune-system", "uid": f"uid-{name}"}
        self.server.api.store(PODS, {"kind": "Pod", "metadata": metadata})
        self.processes[name] = await spawn_operator(
            self.folder,
            name,
            uid=f"uid-{name}",
            kubeconfig=self._kubeconfig(name, token or name),
            settings=yaml.safe_load(SETTINGS) | ports | {"leaderElection": TIMES} | settings,
        )
        return self.processes[name]

    def _kubeconfig(self, name: str, token: str) -> Path:
        """Each process has a token of its own, so that its requests are known."""
        document = {
            "clusters": [{"name": "c", "cluster": {"server": self.server.url}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "current-context": "c",
        }
        file = self.folder / f"{name}.kubeconfig"
        file.write_text(yaml.safe_dump(document))
        return file

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    @property
    def leader(self) -> str:
        lease = self.server.api.objects.get((LEASES.plural, "finetune-system", "finetune-operator"), {})
        return lease.get("spec", {}).get("holderIdentity", "").partition("_")[0]

    def pods(self) -> int:
        return sum(pod["metadata"]["namespace"] == "team-a" for pod in self.server.api.bodies(PODS))

    async def until(self, holds: Callable[[], Any]) -> None:
        until = time.monotonic() + 90
        while not holds():
            assert time.monotonic() < until, "\n".join(self.log(name)[-3000:] for name in self.processes)
            await asyncio.sleep(0.02)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with HttpApi(FakeKubeApi()) as server:
        server.api.store(JOBS, job_body(), "ADDED")
        scene = Scene(server, tmp_path)
        yield scene
        for process in scene.processes.values():
            if process.returncode is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                await process.wait()


@pytest.fixture
async def two(scene: Scene) -> Scene:
    """The first leads, the second stands by."""
    await scene.start("a")
    await scene.until(lambda: scene.leader == "a" and scene.pods() == 2)
    await scene.start("b")
    await scene.until(lambda: "standing by" in scene.log("b"))
    return scene


async def test_on_sigterm_the_lease_is_given_back_and_the_other_goes_on(two: Scene) -> None:
    two.processes["a"].terminate()
    await two.until(lambda: two.leader == "b")
    assert await two.processes["a"].wait() == 0, two.log("a")
    two.server.api.store(JOBS, job_body(name="another", uid="bbbbbccc-1"), "ADDED")
    await two.until(lambda: two.pods() == 4)
    assert two.processes["b"].returncode is None
    assert "kopf.objects" not in two.log("a") + two.log("b"), "events are no news"


async def test_one_that_was_stopped_for_longer_than_its_lease_ends_and_writes_nothing_more(two: Scene) -> None:
    two.processes["a"].send_signal(signal.SIGSTOP)
    await two.until(lambda: two.leader == "b")
    two.server.api.store(JOBS, job_body(name="another", uid="bbbbbccc-1"), "ADDED")
    await two.until(lambda: two.pods() == 4)
    assert any(token == "a" and path.endswith("/status") for _, path, token in two.server.requests), "as long as it led"
    two.server.requests.clear()
    two.processes["a"].send_signal(signal.SIGCONT)
    assert await two.processes["a"].wait() == 1, two.log("a")
    sent = {path.rpartition("/")[2] for method, path, token in two.server.requests if token == "a" and method != "GET"}
    assert sent <= {"finetune-operator"}, "it may still ask for the lease, which is refused"


async def test_one_without_an_api_server_ends_with_1_and_starts_again_when_it_is_back(two: Scene) -> None:
    two.server.hold.clear()
    assert await two.processes["a"].wait() == 1, two.log("a")
    await two.start("a")
    two.server.hold.set()
    await two.until(lambda: two.leader)
    await two.until(lambda: two.log("a").count("standing by") == 2)
    assert two.processes["b"].returncode is None, two.log("b")


async def test_a_right_that_is_missing_is_told_and_ends_the_process(scene: Scene) -> None:
    async def denied(*_: Any) -> Any:
        return {"status": {"allowed": False}}

    scene.server.api.create = denied
    process = await scene.start("a")
    assert await process.wait() == 1
    assert "the operator's service account may not: get finetunejobs in all namespaces" in scene.log("a")


async def test_a_namespace_that_is_no_more_keeps_no_other_from_being_served(scene: Scene) -> None:
    create = scene.server.api.create

    async def denied_there(resource: Resource, namespace: str | None, body: KubeObject) -> KubeObject:
        asked = body.get("spec", {}).get("resourceAttributes", {})
        if asked.get("namespace") == "gone":
            return {"status": {"allowed": False}}
        return await create(resource, namespace, body)

    scene.server.api.create = denied_there
    process = await scene.start("a", watchNamespaces=["gone", "team-a"])
    await scene.until(lambda: scene.pods() == 2)
    scene.server.api.store(JOBS, job_body(name="another", uid="bbbbbccc-1"), "ADDED")
    await scene.until(lambda: scene.pods() == 4)
    assert process.returncode is None
    assert "namespace gone is not served: no right in it" in scene.log("a")
    assert not [path for _, path, _ in scene.server.requests if "/gone/" in path], "kopf watches nothing there either"


async def test_every_line_is_an_object_and_no_secret_stands_in_any(scene: Scene) -> None:
    """Planted wherever a secret may pass through, and looked for in all that is logged, in every detail."""
    canary = "hunter2hunter2hunter2"
    script = {"command": ["python"], "image": "any:1", "environment": [{"name": "PASSWORD", "value": canary}]}
    scene.server.api.store(JOBS, job_body(base=yaml.safe_dump({"script": script}), name="with", uid="c-1"), "ADDED")
    unreadable = {"command": canary, "image": "any:1", "unknown": [canary]}
    scene.server.api.store(JOBS, job_body(base=yaml.safe_dump({"script": unreadable}), name="not", uid="d-1"), "ADDED")
    await scene.start("a", token=f"{canary}-of-the-operator", logging={"level": "DEBUG"})
    await scene.until(lambda: scene.pods() == 4 and "cannot be read by this version" in scene.log("a"))
    url = f"https://127.0.0.1:{scene.ports['a']['jobServerPort']}"
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {canary}"}) as session:
        for path in (f"{ORDER_PATH}?pod_uid={canary}", f"/{canary}"):
            async with session.get(url + path, ssl=False) as answer:
                assert answer.status in (401, 404)
        async with session.post(url + REPORT_PATH, json={"progress": canary}, ssl=False) as answer:
            assert answer.status == 401
    scene.processes["a"].terminate()
    assert await scene.processes["a"].wait() == 0
    lines = [json.loads(line) for line in scene.log("a").splitlines()]
    assert {line["level"] for line in lines} >= {"DEBUG", "INFO", "ERROR"}
    assert any(line["logger"].startswith("kopf") for line in lines)
    assert any(line.get("job") == "not" and line["uid"] == "d-1" for line in lines)
    (secret,) = scene.server.api.bodies(SECRETS)
    for planted in (canary, *(value[:40] for value in secret["data"].values())):
        assert planted not in scene.log("a")
    for value in secret["data"].values():
        key_lines = [line for line in base64.b64decode(value).decode().splitlines() if "-----" not in line]
        assert not any(line in scene.log("a") for line in key_lines)


async def test_plain_text_is_an_option(scene: Scene) -> None:
    await scene.start("a", logging={"format": "Text"})
    await scene.until(lambda: "INFO finetune_operator.runtime standing by" in scene.log("a"))
    assert not [line for line in scene.log("a").splitlines() if line.startswith("{")]
