"""Two whole operator processes but for kopf, against one API server over HTTP: one leads, the other stands by and takes over."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from finetune_api.contract import LEADER_LABEL, ORDER_PATH
from finetune_operator.kube.api import JOBS, LEASES, PODS, Resource
from finetune_operator.kube.client import Answer, KubeClient
from finetune_operator.kube.errors import Forbidden, KubeError
from finetune_operator.observability.logs import JsonFormatter
from finetune_operator.runtime import Runtime
from tests.operator.documents import job_body, settings
from tests.operator.fake_api import FakeKubeApi
from tests.operator.http_api import HttpApi
from tests.operator.story import idle_report

QUICK = """
jobServerPort: 1
healthPort: 1
metricsPort: 1
leaderElection: {leaseSeconds: 6, renewSeconds: 4, retrySeconds: 0.05}
"""
HOME = "finetune-system"


class Replica:
    """One operator process, and what is seen of it from outside."""

    def __init__(self, scene: "Scene", name: str) -> None:
        self.scene, self.name = scene, name
        self.lost = self.dead = 0
        self.runtime: Runtime | None = None

    async def starts(self) -> "Replica":
        self.scene.monkeypatch.setenv("POD_NAME", self.name)
        self.scene.monkeypatch.setenv("POD_UID", f"uid-{self.name}")
        self.runtime = await Runtime.start(self.scene.settings, on_fatal=self._fatal, on_lost=self._lost)
        return self

    def _fatal(self) -> None:
        self.dead += 1

    def _lost(self) -> None:
        self.lost += 1

    @property
    def leads(self) -> bool:
        assert self.runtime is not None
        return self.runtime._lease.has_time() and self.runtime._leads

    async def says(self, path: str, *, health: bool = False) -> int:
        """What a probe, or an agent without a token, is answered."""
        return (await self._ask("http" if health else "https", 0 if health else 2, path))[0]

    async def probed(self, path: str) -> str:
        """What a probe reads."""
        return (await self._ask("http", 0, path))[1].strip()

    async def scraped(self) -> dict[str, float]:
        """What Prometheus is told, by name and the values of the labels."""
        status, text = await self._ask("http", 1, "/metrics")
        assert status == 200
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        return {" ".join((one.name, *one.labels.values())): one.value for one in samples}

    async def scraped_when(self, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """What Prometheus is told as soon as it is so: the lease is renewed, and jobs are looked at, meanwhile."""
        async with asyncio.timeout(30):
            while not holds(told := await self.scraped()):
                await asyncio.sleep(0.01)
        return told

    async def _ask(self, scheme: str, door: int, path: str) -> tuple[int, str]:
        assert self.runtime is not None
        url = f"{scheme}://127.0.0.1:{self.runtime._runners[door].addresses[0][1]}{path}"
        async with aiohttp.ClientSession() as session, session.get(url, ssl=False) as answer:
            return answer.status, await answer.text()


class Scene:
    """The API server, the job, and who watches it."""

    def __init__(self, server: HttpApi, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server, self.api, self.monkeypatch = server, server.api, monkeypatch
        self.settings = settings(QUICK).model_copy(update={"job_server_port": 0, "health_port": 0, "metrics_port": 0})
        self.replicas: list[Replica] = []

    def replica(self, name: str) -> Replica:
        metadata = {
            "name": name,
            "namespace": HOME,
            "uid": f"uid-{name}",
            "labels": {"app.kubernetes.io/instance": "r"},
        }
        self.api.store(PODS, {"kind": "Pod", "metadata": metadata})
        self.replicas.append(Replica(self, name))
        return self.replicas[-1]

    async def until(self, holds: Callable[[], Any]) -> None:
        """Let everybody work, and the watches show what they do, until it is so."""
        async with asyncio.timeout(30):
            while not holds():
                self._watch()
                await asyncio.sleep(0.01)

    def _watch(self) -> None:
        while self.api.events:
            kind, body = self.api.events.popleft()
            for runtime in (replica.runtime for replica in self.replicas if replica.runtime is not None):
                see = runtime.observe_pod if body["kind"] == "Pod" else runtime.observe_job
                see(body, deleted=kind == "DELETED")

    @property
    def training_pods(self) -> list[str]:
        return sorted(pod["metadata"]["name"] for pod in self.api.bodies(PODS) if pod["metadata"]["namespace"] != HOME)

    @property
    def holder(self) -> str | None:
        spec: dict[str, str] = self.api.objects[LEASES.plural, HOME, "finetune-operator"]["spec"]
        return spec.get("holderIdentity")

    @property
    def labelled(self) -> list[str]:
        return [pod["metadata"]["name"] for pod in self.api.bodies(PODS) if LEADER_LABEL in pod["metadata"]["labels"]]


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    monkeypatch.setattr("finetune_operator.runtime.START_RETRY_SECONDS", 0.01)
    async with HttpApi(FakeKubeApi()) as server:
        monkeypatch.setattr(KubeClient, "connect", server.connect)
        scene = Scene(server, monkeypatch)
        scene.api.store(JOBS, job_body(), "ADDED")
        yield scene
        server.hold.set()
        for replica in scene.replicas:
            if replica.runtime is not None:
                await replica.runtime.stop()


async def test_one_leads_and_the_other_is_ready_and_does_nothing(scene: Scene) -> None:
    first, second = await scene.replica("a").starts(), scene.replica("b")
    await scene.until(lambda: len(scene.training_pods) == 2 and scene.labelled == ["a"])
    await second.starts()
    await scene.until(lambda: second.runtime.cache.pods_of(job_body()["metadata"]["uid"]))
    for replica, answer in ((first, 401), (second, 503)):
        assert await replica.says("/readyz", health=True) == 200, "leading or not"
        assert await replica.says(ORDER_PATH) == answer
    assert (first.leads, second.leads) == (True, False)
    scene.api.store(JOBS, job_body(name="another", uid="bbbbbccc-1"), "ADDED")
    await scene.until(lambda: len(scene.training_pods) == 4)
    tasks = [task.get_name() for task in second.runtime._tasks]
    nobody_works = ["event loop lag", "resync", "certificates", "memory", "strangers"]
    assert (len(second.runtime.queue), tasks) == (0, nobody_works)
    assert scene.holder == "a_uid-a"


async def test_what_prometheus_is_told_of_a_leader_and_of_who_stands_by(scene: Scene) -> None:
    first, second = await scene.replica("a").starts(), await scene.replica("b").starts()
    await scene.until(lambda: len(scene.training_pods) == 2 and scene.labelled == ["a"])
    assert await first.says("/v1/report/nothing") == 404
    assert await second.says(ORDER_PATH) == 503
    led = await first.scraped_when(
        lambda told: (
            told["finetune_operator_queue_seconds_count"] == told["finetune_operator_reconcile_seconds_count"]
            and "finetune_operator_api_requests_total 200 leases update" in told
        )  # the lease's thread counts too
    )
    standby = await second.scraped()
    assert (led["finetune_operator_leader"], standby["finetune_operator_leader"]) == (1, 0)
    assert led["finetune_operator_jobs Pending"] == 1
    assert "finetune_operator_jobs Pending" not in standby, "else there would seem to be twice as many"
    assert led["finetune_operator_reconciles_total done"] >= 1
    assert led["finetune_operator_reconciles_total bug"] == 0
    assert led["finetune_operator_api_requests_total 200 pods create"] == 2
    assert led["finetune_operator_job_server_requests_total 404 other"] == 1
    assert standby["finetune_operator_job_server_requests_total 503 /v1/order"] == 1
    assert not [name for name in led if "sentiment" in name or "team-a" in name]


async def test_a_bug_is_counted_and_its_lines_say_whose_job_it_was(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(caplog.handler, "emit", lambda record: lines.append(JsonFormatter().format(record)))
    monkeypatch.setattr("finetune_operator.reconcile.plan_job", lambda _: 1 / 0)
    first = await scene.replica("a").starts()
    await scene.until(lambda: lines and "a bug in the operator" in lines[-1])
    entry = json.loads(lines[-1])
    assert (entry["namespace"], entry["job"], entry["uid"]) == ("team-a", "sentiment", job_body()["metadata"]["uid"])
    assert "ZeroDivisionError" in entry["exception"]
    assert (await first.scraped())["finetune_operator_reconciles_total bug"] >= 1


async def test_a_probe_says_what_is_wrong(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await scene.replica("a").starts()
    await scene.until(lambda: len(scene.training_pods) == 2 and not scene.api.events)
    assert (await first.probed("/healthz"), await first.probed("/readyz")) == ("ok", "ok")
    monkeypatch.setattr("finetune_operator.observability.vitals.WATCH_DEAD_SECONDS", 2.0)
    scene.api.store(JOBS, job_body(name="another", uid="bbbbbccc-1"), "ADDED")
    scene.api.events.clear()  # the watches are dead from here on
    await first.runtime._take_stock()
    await asyncio.sleep(2.1)
    assert await first.says("/healthz", health=True) == 503
    assert re.match(r"the watches have been silent for \d+ s", await first.probed("/healthz"))
    assert (await first.scraped())["finetune_operator_watch_lag_seconds"] > 2.0
    first.runtime._metrics.api.record(Answer("get", "leases", 0, 1.0))
    assert await first.probed("/healthz") == "ok", "while the API server is away no watch can show anything"
    await first.runtime._agents_door.cleanup()
    assert await first.says("/readyz", health=True) == 503
    assert await first.probed("/readyz") == "the job server does not listen"


async def test_who_has_not_listed_everything_is_not_ready(scene: Scene) -> None:
    first = await scene.replica("a").starts()
    first.runtime.cache.is_synced = False
    assert await first.probed("/readyz") == "not all jobs and pods are listed yet"


async def test_one_that_goes_is_followed_at_once_and_its_agents_are_sent_on(scene: Scene) -> None:
    first, second = await scene.replica("a").starts(), await scene.replica("b").starts()
    await scene.until(lambda: scene.labelled)
    assert first.leads
    heard_until_now = second.runtime._reports.hearing.since
    await first.runtime.stop()
    assert scene.holder != "a_uid-a"
    await scene.until(lambda: second.leads and scene.labelled == ["b"])
    assert second.runtime._reports.hearing.since > heard_until_now, "silence counts from now on"
    assert await second.says(ORDER_PATH) == 401
    assert (first.lost, first.dead, second.dead) == (0, 0, 0)
    scene.api.remove(PODS, "team-a", scene.training_pods[0])
    await scene.until(lambda: len(scene.training_pods) == 2)
    first.runtime = None


async def test_what_changed_while_nobody_led_is_done_by_the_next(scene: Scene) -> None:
    first, second = await scene.replica("a").starts(), await scene.replica("b").starts()
    await scene.until(lambda: len(scene.training_pods) == 2)
    await first.runtime.stop()
    first.runtime = None
    scene.api.store(JOBS, job_body(name="another", uid="bbbbbccc-1"), "ADDED")
    await scene.until(lambda: len(scene.training_pods) == 4)
    assert second.leads


async def test_a_pod_that_a_watch_which_hangs_has_not_shown_is_not_taken_for_deleted(scene: Scene) -> None:
    first, second = await scene.replica("a").starts(), await scene.replica("b").starts()
    await scene.until(lambda: len(scene.training_pods) == 2 and not scene.api.events)
    members = [
        {"rank": rank, "pod": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
        for rank, pod in enumerate(scene.api.bodies(PODS))
        if pod["metadata"]["namespace"] != HOME
    ]
    gang = {"generation": 1, "nodes": 2, "members": members}
    scene.api.store(JOBS, scene.api.bodies(JOBS)[0] | {"status": {"gang": gang}})
    await scene.until(lambda: not scene.api.events)
    for member in members:
        second.runtime.cache._drop_pod(member["uid"])
    await first.runtime.stop()
    first.runtime = None
    await scene.until(lambda: second.leads)
    await second.scraped_when(lambda told: told["finetune_operator_reconciles_total done"] >= 1)
    status = scene.api.bodies(JOBS)[0]["status"]
    assert (status["gang"]["generation"], status.get("attempts", [])) == (1, [])
    assert len(scene.training_pods) == 2


async def test_a_leader_without_an_api_server_gives_no_orders_and_ends(scene: Scene) -> None:
    first, second = await scene.replica("a").starts(), await scene.replica("b").starts()
    await scene.until(lambda: scene.labelled == ["a"])
    scene.server.hold.clear()
    await scene.until(lambda: not first.leads)
    assert await first.says(ORDER_PATH) == 503
    with pytest.raises(KubeError):
        await first.runtime._client.create(PODS, "team-a", {"metadata": {"name": "late"}})
    await scene.until(lambda: first.lost)
    assert (second.lost, second.dead, second.leads) == (0, 0, False)
    assert await second.says("/readyz", health=True) == 200
    scene.server.hold.set()
    await scene.until(lambda: second.leads)
    assert "late" not in scene.training_pods


async def test_who_starts_while_the_api_server_is_away_waits_for_it(scene: Scene) -> None:
    scene.server.answer_with = [(503, {})] * 50
    starting = asyncio.create_task(scene.replica("a").starts())
    await scene.until(lambda: len(scene.server.requests) > 8)
    assert not starting.done()
    scene.server.answer_with = []
    await scene.until(starting.done)
    await scene.until(lambda: starting.result().leads)


async def test_what_vanished_while_a_watch_was_away_is_missed_when_it_begins_anew(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_operator.runtime.RELIST_SECONDS", 0.01)
    first = await scene.replica("a").starts()
    await scene.until(lambda: len(scene.training_pods) == 2 and first.leads)
    scene.api.remove(PODS, "team-a", scene.training_pods[0])
    scene.api.events.clear()
    scene.server.answer_with = [(500, {})] * 5  # more than one list is tried
    gone = scene.training_pods
    first.runtime.watch_has_begun()
    await scene.until(lambda: len(scene.training_pods) == 2)
    assert scene.server.answer_with == [], "the lists that failed were tried again"
    assert set(gone) < set(scene.training_pods)


async def test_the_last_word_of_a_member_that_is_gone_survives_taking_stock(scene: Scene) -> None:
    another = {"holderIdentity": "another", "leaseDurationSeconds": 60}
    scene.api.store(LEASES, {"metadata": {"name": "finetune-operator", "namespace": HOME}, "spec": another})
    gang = {"generation": 1, "members": [{"rank": 0, "pod": "p", "uid": "member"}]}
    scene.api.store(JOBS, job_body() | {"status": {"gang": gang}})
    first = await scene.replica("a").starts()
    for uid in ("member", "stranger"):
        first.runtime._reports.hear(idle_report(uid, 0))
    await first.runtime._take_stock()
    assert first.runtime._reports.heard.keys() == {"member"}


async def test_a_right_that_is_missing_ends_the_start(scene: Scene) -> None:
    async def denied(*_: Any) -> Any:
        return {"status": {"allowed": False}}

    scene.api.create = denied
    with pytest.raises(Forbidden, match=r"update leases/finetune-operator in finetune-system; create leases"):
        await scene.replica("a").starts()


async def test_without_a_right_in_any_namespace_the_start_ends_too(scene: Scene) -> None:
    async def denied(*_: Any) -> Any:
        return {"status": {"allowed": False}}

    scene.settings = scene.settings.model_copy(update={"watch_namespaces": ("team-a", "team-b")})
    scene.api.create = denied
    with pytest.raises(
        Forbidden, match=r"may not: get finetunejobs in team-a; .* finetunejobs in team-b; .*get secrets"
    ):
        await scene.replica("a").starts()


async def test_a_namespace_whose_rights_are_taken_away_stays_as_it_was_known_and_the_others_are_listed(
    scene: Scene,
) -> None:
    scene.settings = scene.settings.model_copy(update={"watch_namespaces": ("team-a", "team-b")})
    list_all = scene.api.list

    async def no_pods_there(resource: Resource, namespace: str | None = None, **more: Any) -> Any:
        if resource is PODS and namespace == "team-a":
            raise Forbidden("pods is forbidden", status=403)
        return await list_all(resource, namespace, **more)

    first = await scene.replica("a").starts()
    await scene.until(lambda: len(scene.training_pods) == 2 and not scene.api.events)
    scene.api.list = no_pods_there
    scene.api.store(JOBS, job_body(name="another", uid="bbbbbccc-1", namespace="team-b"), "ADDED")
    scene.api.events.clear()
    await first.runtime._take_stock()
    assert len(first.runtime.cache.pods_of(job_body()["metadata"]["uid"])) == 2
    await scene.until(lambda: len(scene.training_pods) == 4)
    assert (first.lost, first.dead) == (0, 0)


async def test_to_be_chosen_while_stopping_begins_nothing(scene: Scene) -> None:
    first = await scene.replica("a").starts()
    await scene.until(lambda: first.leads)
    tasks = len(first.runtime._tasks)
    await first.runtime.stop()
    first.runtime._take_over(first._fatal, first._lost)
    assert (len(first.runtime._tasks), first.lost) == (tasks, 0)
    first.runtime = None


async def test_certificates_are_shown_and_put_back_without_a_restart(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_operator.runtime.CERTIFICATE_SECONDS", 0.02)
    secret = ("secrets", HOME, "finetune-operator-job-server")
    first = await scene.replica("a").starts()
    await scene.until(lambda: first.leads)
    known = first.runtime._certificates
    with suppress(KeyError):
        del scene.api.objects[secret]
    await scene.until(lambda: secret in scene.api.objects)
    assert first.runtime._certificates == known, "agents of running jobs trust no other authority"
