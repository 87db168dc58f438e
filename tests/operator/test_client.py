"""The real client against real HTTP: what is repeated, and that only the leader writes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from finetune_operator.kube.api import ACCESS_REVIEWS, CONFIG_MAPS, JOBS, LEASES, PODS
from finetune_operator.kube.client import Answer, KubeClient
from finetune_operator.kube.errors import Conflict, KubeError, NotLeading, TooMany, Unavailable
from tests.operator.documents import job_body
from tests.operator.fake_api import FakeKubeApi
from tests.operator.http_api import HttpApi

KEY = ("team-a", "sentiment")
POD = {"metadata": {"name": "p", "namespace": "team-a", "uid": "u", "labels": {"a": "1"}}}


class Leadership:
    """A lease that ends after so many questions."""

    def __init__(self) -> None:
        self.answers = 10**6

    def __call__(self) -> bool:
        self.answers -= 1
        return self.answers >= 0


@pytest.fixture
async def server() -> AsyncIterator[HttpApi]:
    api = FakeKubeApi()
    api.store(JOBS, job_body())
    api.store(PODS, POD | {"kind": "Pod"})
    async with HttpApi(api) as server:
        yield server


@pytest.fixture
def leads() -> Leadership:
    return Leadership()


@pytest.fixture
async def client(server: HttpApi, leads: Leadership) -> AsyncIterator[KubeClient]:
    client = await server.connect(may_write=leads)
    yield client
    await client.close()


def config_map() -> dict[str, Any]:
    return {"metadata": {"name": "c", "namespace": "team-a"}}


WRITES = {
    "create": lambda client: client.create(CONFIG_MAPS, "team-a", config_map()),
    "apply": lambda client: client.apply(CONFIG_MAPS, "team-a", config_map()),
    "replace": lambda client: client.replace(JOBS, "team-a", job_body(resourceVersion="101")),
    "status": lambda client: client.patch_status(JOBS, *KEY, resource_version="101", status={"phase": "Pending"}),
    "labels": lambda client: client.patch_labels(PODS, "team-a", "p", uid="u", labels={"a": None, "b": "2"}),
    "delete": lambda client: client.delete(PODS, "team-a", "p", uid="u"),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
async def test_a_write_of_who_does_not_lead_is_not_sent(
    server: HttpApi, client: KubeClient, leads: Leadership, write: Any
) -> None:
    leads.answers = 0
    with pytest.raises(NotLeading):
        await write(client)
    assert (server.requests, server.api.writes) == ([], [])


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
async def test_a_write_of_the_leader_is_sent(server: HttpApi, client: KubeClient, write: Any) -> None:
    await write(client)
    assert len(server.api.writes) == 1


def test_every_write_of_the_client_is_among_those_above() -> None:
    reads = {"connect", "close", "get", "list", "read"}
    public = {name for name in vars(KubeClient) if not name.startswith("_")}
    assert public - reads == {"create", "apply", "replace", "patch_status", "patch_labels", "delete"}


async def test_reads_need_no_lease(server: HttpApi, client: KubeClient, leads: Leadership) -> None:
    leads.answers = 0
    assert (await client.get(JOBS, *KEY))["spec"] == job_body()["spec"]
    assert len(await client.list(JOBS)) == 1


async def test_the_lease_is_asked_for_again_before_a_write_is_repeated(
    server: HttpApi, client: KubeClient, leads: Leadership
) -> None:
    """The API server has had us wait, and meanwhile the lease has ended."""
    leads.answers = 1
    server.answer_with = [(429, {"Retry-After": "0"})]
    with pytest.raises(NotLeading):
        await WRITES["labels"](client)
    assert (len(server.requests), server.api.writes) == (1, [])


async def test_labels_are_set_and_taken_off_one_pod_and_no_other_of_its_name(
    server: HttpApi, client: KubeClient
) -> None:
    changed = await WRITES["labels"](client)
    assert changed["metadata"]["labels"] == {"b": "2"}
    with pytest.raises(Conflict):
        await client.patch_labels(PODS, "team-a", "p", uid="another", labels={"b": None})
    assert server.api.objects["pods", "team-a", "p"]["metadata"]["labels"] == {"b": "2"}


async def test_a_read_is_repeated_and_a_write_without_an_answer_is_not(
    server: HttpApi, client: KubeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_operator.kube.client.random.uniform", lambda *_: 0.0)
    server.answer_with = [(503, {}), (429, {}), (500, {})]
    assert await client.get(JOBS, *KEY)
    server.answer_with = [(503, {})]
    with pytest.raises(Unavailable):
        await WRITES["status"](client)
    server.answer_with = [(429, {})] * 4
    with pytest.raises(TooMany):
        await client.get(JOBS, *KEY)
    assert len(server.requests) == 4 + 1 + 4


async def test_a_write_that_has_to_wait_is_repeated_but_a_status_would_be_out_of_date(
    server: HttpApi, client: KubeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_operator.kube.client.random.uniform", lambda *_: 0.0)
    for name, write in WRITES.items():
        server.requests.clear()
        server.answer_with = [(429, {})] * 3
        if name == "status":
            with pytest.raises(TooMany):
                await write(client)
            server.answer_with = []
        else:
            await write(client)
        assert len(server.requests) == (1 if name == "status" else 4), name


async def test_a_question_that_is_posted_is_repeated_as_a_read_is(
    server: HttpApi, client: KubeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_operator.kube.client.random.uniform", lambda *_: 0.0)
    server.answer_with = [(500, {})] * 3
    assert (await client.create(ACCESS_REVIEWS, None, {"spec": {}}))["status"] == {"allowed": True}


async def test_a_lease_is_made_and_replaced(server: HttpApi, client: KubeClient) -> None:
    body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l", "namespace": "team-a"}}
    made = await client.create(LEASES, "team-a", body)
    assert await client.replace(LEASES, "team-a", made | {"spec": {"holderIdentity": "a"}})
    with pytest.raises(Conflict):
        await client.replace(LEASES, "team-a", made)


TOLD = {
    "get": (lambda client: client.get(JOBS, *KEY), ("get", "finetunejobs", 200)),
    "list": (lambda client: client.list(PODS), ("list", "pods", 200)),
    "create": (WRITES["create"], ("create", "configmaps", 200)),
    "apply": (WRITES["apply"], ("patch", "configmaps", 200)),
    "replace": (WRITES["replace"], ("update", "finetunejobs", 200)),
    "status": (WRITES["status"], ("patch", "finetunejobs/status", 200)),
    "labels": (WRITES["labels"], ("patch", "pods", 200)),
    "delete": (WRITES["delete"], ("delete", "pods", 200)),
    "read": (lambda client: client.read("/openid/v1/jwks"), ("get", "openid", 500)),
    "not found": (lambda client: client.get(PODS, "team-a", "another"), ("get", "pods", 404)),
}


@pytest.mark.parametrize(("ask", "told"), TOLD.values(), ids=TOLD.keys())
async def test_every_answer_is_told_by_the_words_of_rbac(
    server: HttpApi, monkeypatch: pytest.MonkeyPatch, ask: Any, told: tuple[str, str, int]
) -> None:
    monkeypatch.setattr("finetune_operator.kube.client.random.uniform", lambda *_: 0.0)
    answers: list[Answer] = []
    client = await server.connect(may_write=lambda: True, on_answer=answers.append)
    with suppress(KubeError):
        await ask(client)
    await client.close()
    assert {(one.verb, one.resource, one.status) for one in answers} == {told}
    assert all(0 <= one.seconds < 30 for one in answers)


async def test_each_try_is_told_also_one_without_an_answer_or_that_was_given_up(
    server: HttpApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_operator.kube.client.random.uniform", lambda *_: 0.0)
    answers: list[Answer] = []
    client = await server.connect(may_write=lambda: True, on_answer=answers.append)
    server.answer_with = [(503, {}), (429, {"Retry-After": "0"})]
    await client.get(JOBS, *KEY)
    server.hold.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await client.get(JOBS, *KEY)
    server.hold.set()
    client._client.configuration.host = "http://127.0.0.1:1"
    with pytest.raises(Unavailable):
        await client.delete(PODS, "team-a", "p", uid="u")
    await client.close()
    assert [one.status for one in answers] == [503, 429, 200, 0, 0]


async def test_a_write_that_is_not_sent_has_no_answer(server: HttpApi) -> None:
    answers: list[Answer] = []
    client = await server.connect(may_write=lambda: False, on_answer=answers.append)
    with pytest.raises(NotLeading):
        await WRITES["create"](client)
    await client.close()
    assert answers == []
