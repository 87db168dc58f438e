"""The job server over real TLS on loopback, with tokens signed as the API server signs them."""

import asyncio
import base64
import json
import logging
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from finetune_api.contract import ORDER_PATH, REPORT_BYTES_LIMIT, REPORT_PATH, TOKEN_AUDIENCE
from finetune_api.job import FineTuneJob, parse_job
from finetune_api.protocol import Progress, Report, to_wire
from finetune_operator.cache import Cache, JobKey
from finetune_operator.jobserver.app import JobServer
from finetune_operator.jobserver.auth import DISCOVERY_PATH, JWKS_PATH, TokenVerifier
from finetune_operator.jobserver.certificate_store import server_context
from finetune_operator.jobserver.flood import BURST
from finetune_operator.jobserver.reports import Reports
from finetune_operator.jobserver.tls import make_certificates
from finetune_operator.kube.errors import Unavailable
from tests.operator.documents import JOB_UID, job_body
from tests.operator.fake_api import FakeKubeApi
from tests.operator.story import Story, idle_report

HOST = "finetune-operator.finetune-system.svc"
ISSUER = "https://kubernetes.default.svc"
KEY = JobKey(("team-a", "sentiment"))
POD = "pod-1"


@pytest.fixture(scope="module")
def keys() -> dict[str, rsa.RSAPrivateKey]:
    """The cluster's signing key, the next one, and a forger's."""
    return {kid: rsa.generate_private_key(65537, 2048) for kid in ("cluster", "next", "forger")}


def jwks(keys: dict[str, rsa.RSAPrivateKey], *kids: str) -> dict[str, Any]:
    return {
        "keys": [
            jwt.algorithms.RSAAlgorithm.to_jwk(keys[kid].public_key(), as_dict=True) | {"kid": kid, "use": "sig"}
            for kid in kids
        ]
    }


@dataclass
class Scene:
    """A job server and somebody who talks to it."""

    api: FakeKubeApi
    cache: Cache
    reports: Reports
    server: JobServer
    verifier: TokenVerifier
    keys: dict[str, rsa.RSAPrivateKey]
    session: aiohttp.ClientSession
    url: str
    context: ssl.SSLContext
    lease: list[bool]  # whether this replica leads
    runner: web.AppRunner
    news: list[JobKey] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    def token(
        self,
        *,
        kid: str = "cluster",
        signed_by: str | None = None,
        drop: tuple[str, ...] = (),
        uid: str = POD,
        seconds: float = 3600,
        **claims: Any,
    ) -> str:
        bound = {
            "namespace": "team-a",
            "pod": {"name": "sentiment-aaaaa-0-1", "uid": uid},
            "serviceaccount": {"name": "default"},
        }
        now = datetime.now(UTC)
        body = {
            "aud": [TOKEN_AUDIENCE],
            "iss": ISSUER,
            "exp": now + timedelta(seconds=seconds),
            "iat": now,
            "kubernetes.io": bound,
        }
        body = {name: value for name, value in (body | claims).items() if name not in drop}
        token = jwt.encode(body, self.keys[signed_by or kid], algorithm="RS256", headers={"kid": kid})
        self.tokens.append(token)
        return token

    async def ask(
        self,
        method: str,
        path: str,
        *,
        token: str | None = "",
        body: Any = None,
        raw: bytes | None = None,
        **query: Any,
    ) -> tuple[int, Any]:
        headers = {} if token is None else {"Authorization": f"Bearer {token or self.token()}"}
        data = raw if raw is not None else (json.dumps(body).encode() if body is not None else None)
        async with self.session.request(
            method, self.url + path, data=data, params=query, headers=headers, ssl=self.context, server_hostname=HOST
        ) as response:
            text = await response.text()
            self.answers.append(text)
            return response.status, json.loads(text) if text.startswith("{") else text

    async def report(self, report: Report | None = None, **arguments: Any) -> tuple[int, Any]:
        return await self.ask("POST", REPORT_PATH, body=to_wire(report or idle_report(POD, 0)), **arguments)

    async def poll(self, **query: Any) -> tuple[int, Any]:
        return await self.ask("GET", ORDER_PATH, pod_uid=POD, **query)

    def commit(self, status: dict[str, Any]) -> None:
        """The API server has acknowledged a status."""
        self.cache.observe_job(job_body(resourceVersion="2") | {"status": status})
        self.server.job_changed(KEY)


def pod_body(uid: str = POD, rank: int = 0) -> dict[str, Any]:
    owner = {"kind": "FineTuneJob", "name": "sentiment", "uid": JOB_UID, "controller": True}
    labels = {"finetune.dev/rank": str(rank), "finetune.dev/generation": "1"}
    metadata = {
        "name": f"p-{uid}",
        "namespace": "team-a",
        "uid": uid,
        "resourceVersion": "1",
        "labels": labels,
        "ownerReferences": [owner],
    }
    return {"kind": "Pod", "metadata": metadata}


@pytest.fixture
async def scene(keys: dict[str, rsa.RSAPrivateKey], certificates) -> AsyncIterator[Scene]:
    api, cache, reports = FakeKubeApi(), Cache(), Reports(lambda: datetime.now(UTC))
    api.documents = {JWKS_PATH: jwks(keys, "cluster"), DISCOVERY_PATH: {"issuer": ISSUER}}
    cache.observe_job(job_body())
    cache.observe_pod(pod_body())
    cache.observe_pod(pod_body("pod-2", 1))
    news: list[JobKey] = []
    lease = [True]
    verifier = TokenVerifier(api)
    server = JobServer(cache=cache, reports=reports, verifier=verifier, leads=lambda: lease[0], on_news=news.append)
    runner = web.AppRunner(server.app(), access_log=logging.getLogger("access"))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_context(certificates), shutdown_timeout=0.1)
    await site.start()
    port = runner.addresses[0][1]
    context = ssl.create_default_context(cadata=certificates.authority)
    async with aiohttp.ClientSession() as session:
        url = f"https://127.0.0.1:{port}"
        yield Scene(api, cache, reports, server, verifier, keys, session, url, context, lease, runner, news)
    await runner.cleanup()


@pytest.fixture(scope="module")
def certificates():
    return make_certificates(HOST, datetime.now(UTC))


@pytest.fixture(autouse=True)
def no_token_is_ever_told(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever happens in a test of this file, no token is in an answer or in a log."""
    caplog.set_level(logging.DEBUG)
    yield
    scene = request.node.funcargs.get("scene")
    if scene is not None:
        told = caplog.text + "".join(scene.answers)
        for token in scene.tokens:
            assert token not in told
            assert token.rsplit(".", 1)[1] not in told, "nor is its signature"


# Reports.


async def test_a_report_is_heard_and_answered_with_the_order(scene: Scene) -> None:
    status, answer = await scene.report()
    assert (status, answer) == (200, to_wire_order(action="Wait", generation=0))
    assert scene.reports.heard[POD].report == idle_report(POD, 0)
    assert scene.news == [KEY]


def to_wire_order(**members: Any) -> dict[str, Any]:
    base = {
        "generation": 0,
        "rank": 0,
        "nodes": 0,
        "processesPerNode": 1,
        "masterAddress": "",
        "masterPort": 0,
        "graceSeconds": 0,
        "protocol": 1,
        "hangSeconds": 60,
        "hasCheckpoint": False,
    }
    return base | members


async def test_a_question_is_heard_when_it_comes_and_not_for_as_long_as_it_waits(scene: Scene) -> None:
    await scene.report()
    before = scene.reports.heard[POD].at
    scene.commit(committed())
    await scene.poll(known_action="Wait", known_generation=0)
    assert scene.reports.heard[POD].at > before
    waiting = asyncio.create_task(scene.poll(known_action="Run", known_generation=1))
    while KEY not in scene.server._changed:  # until it waits
        await asyncio.sleep(0.01)
    asked = scene.reports.heard[POD].at
    await asyncio.sleep(0.1)
    assert scene.reports.heard[POD].at == asked
    waiting.cancel()


async def test_a_report_that_says_nothing_new_is_no_news(scene: Scene) -> None:
    await scene.report()
    await scene.report()
    assert scene.news == [KEY]
    await scene.report(replace(idle_report(POD, 0), progress=Progress(step=1)))
    assert scene.news == [KEY, KEY]


async def test_a_member_of_the_committed_gang_is_told_to_run(scene: Scene) -> None:
    scene.commit(committed())
    _, answer = await scene.report()
    wish = {"intervalSeconds": 600, "intervalAuto": False, "keep": 2}
    told = {"generation": 1, "nodes": 2, "masterAddress": "10.0.0.0", "masterPort": 29500, "checkpoint": wish}
    assert answer == to_wire_order(action="Run", **told)


def committed() -> dict[str, Any]:
    story = Story()
    story.go()
    story.pods_start()
    story.go()
    return story.job.status.to_wire()


async def test_a_pod_whose_job_is_gone_or_another_one_by_now_is_told_to_wait(scene: Scene) -> None:
    scene.cache.observe_job(job_body(uid="another", resourceVersion="3"))
    _, answer = await scene.report()
    assert answer["action"] == "Wait"


REFUSED: dict[str, tuple[Any, int, str]] = {
    "no report at all": (b"", 400, "not a report"),
    "no JSON": (b"hello", 400, "not a report"),
    "no UTF-8": (b"\xff\xfe{", 400, "not a report"),
    "no object": (b"[]", 400, "not a report: $: must be an object"),
    "a missing field": ({"generation": None}, 400, "$.generation: is missing"),
    "a field of a wrong type, by its path": ({"exits": [{"generation": 1, "rank": "zero"}]}, 400, "$.exits[0].rank: must be of type int"),
    "an unknown state": ({"state": "Dancing"}, 400, "$.state: must be one of Idle, Running"),
    "a number that is not finite": (b"NaN", 400, "not a report"),
    "a loss that is not finite": ({"progress": {"step": 1, "loss": float("nan")}}, 400, "$.progress.loss: must be a finite number"),
    "a number too large for a float": ({"progress": {"step": 1, "loss": 10**400}}, 400, "not a report"),
    "nesting without end": (b"[" * 60000, 400, "not a report"),
    "a protocol that is not served": ({"protocol": 99}, 400, "protocol 99 is not served"),
    "too much": (b" " * (REPORT_BYTES_LIMIT + 1), 413, ""),
    "another pod's report": ({"podUid": "pod-2"}, 403, "a pod may speak for itself only"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "status", "why"), REFUSED.values(), ids=REFUSED.keys())
async def test_reports_that_are_refused(scene: Scene, body: Any, status: int, why: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(to_wire(idle_report(POD, 0)) | body).encode()
    answered, answer = await scene.ask("POST", REPORT_PATH, raw=raw)
    assert answered == status
    assert why in (answer["error"] if isinstance(answer, dict) else answer)
    assert (dict(scene.reports.heard), scene.news) == ({}, [])


async def test_a_report_of_the_largest_size_is_heard(scene: Scene) -> None:
    body = json.dumps(to_wire(idle_report(POD, 0))).encode()
    status, _ = await scene.ask("POST", REPORT_PATH, raw=body + b" " * (REPORT_BYTES_LIMIT - len(body)))
    assert status == 200


async def test_fields_of_a_newer_agent_are_ignored(scene: Scene) -> None:
    status, _ = await scene.ask("POST", REPORT_PATH, body=to_wire(idle_report(POD, 0)) | {"mood": "fine"})
    assert status == 200


async def test_a_report_of_a_generation_that_was_never_committed_is_refused(scene: Scene) -> None:
    refused = (409, {"error": "generation 1 is not known (yet): the newest is 0"})
    assert await scene.report(replace(idle_report(POD, 0), generation=1)) == refused
    assert (dict(scene.reports.heard), scene.news) == ({}, [])
    scene.commit(committed())
    assert (await scene.report(replace(idle_report(POD, 0), generation=1)))[0] == 200
    assert (await scene.report(replace(idle_report(POD, 0), generation=2)))[0] == 409
    assert scene.reports.heard[POD].report.generation == 1


async def test_a_report_of_an_older_generation_is_heard_and_answered_with_the_newest(scene: Scene) -> None:
    """It is how an agent is until it has heard of the newest; decisions pass it over (``Observation.said``)."""
    scene.commit(committed())
    _, answer = await scene.report(replace(idle_report(POD, 0), generation=0))
    assert (answer["action"], answer["generation"]) == ("Run", 1)


async def test_a_job_that_only_a_newer_version_can_read_is_left_as_it_is(scene: Scene) -> None:
    scene.cache.observe_job(job_body("recipe: {from: the future}", resourceVersion="2"))
    _, answer = await scene.report()
    assert (answer["action"], answer["generation"]) == ("Wait", 0), "which no agent obeys that has started anything"


async def test_a_pod_that_the_cache_does_not_know_is_told_so(scene: Scene) -> None:
    token = scene.token(uid="pod-9")
    assert await scene.report(idle_report("pod-9", 0), token=token) == (
        404,
        {"error": "this pod is not known (yet) as one of a job's"},
    )
    scene.cache.observe_pod(pod_body(), deleted=True)
    assert (await scene.report())[0] == 404


# Tokens.


def tampered(scene: Scene) -> str:
    """A token whose claims were changed after it was signed."""
    head, body, signature = scene.token(uid="pod-2").split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    claims["kubernetes.io"]["pod"]["uid"] = POD
    return ".".join((head, base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("="), signature))


def unsigned(scene: Scene) -> str:
    return jwt.encode(
        {"aud": TOKEN_AUDIENCE, "iss": ISSUER, "exp": 9999999999}, None, algorithm="none", headers={"kid": "cluster"}
    )


def signed_with_the_public_key(scene: Scene) -> str:
    """RS256 read as HS256: the public key is everybody's."""
    import hashlib
    import hmac

    public = scene.keys["cluster"].public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
    _, body, _ = scene.token().split(".")
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT","kid":"cluster"}').decode().rstrip("=")
    mac = hmac.new(public, f"{head}.{body}".encode(), hashlib.sha256).digest()
    return f"{head}.{body}." + base64.urlsafe_b64encode(mac).decode().rstrip("=")


def of_another_kind_of_key(scene: Scene) -> str:
    _, body, signature = scene.token().split(".")
    head = base64.urlsafe_b64encode(b'{"alg":"ES256","typ":"JWT","kid":"cluster"}').decode().rstrip("=")
    return f"{head}.{body}.{signature}"


BAD_TOKENS = {
    "none": lambda scene: None,
    "no token at all": lambda scene: "nonsense",
    "one that has expired": lambda scene: scene.token(seconds=-90),
    "one that never expires": lambda scene: scene.token(drop=("exp",)),
    "one that is not valid yet": lambda scene: scene.token(nbf=datetime.now(UTC) + timedelta(hours=1)),
    "one for another audience": lambda scene: scene.token(aud=["https://kubernetes.default.svc"]),
    "one without an audience": lambda scene: scene.token(drop=("aud",)),
    "one of another issuer": lambda scene: scene.token(iss="https://elsewhere"),
    "one signed by somebody else": lambda scene: scene.token(signed_by="forger"),
    "one of a key that the cluster does not know": lambda scene: scene.token(kid="forger"),
    "one with other claims than were signed": tampered,
    "one without a signature": unsigned,
    "one signed with the public key": signed_with_the_public_key,
    "one that claims another kind of key": of_another_kind_of_key,
    "one that is bound to no pod": lambda scene: scene.token(**{"kubernetes.io": {"namespace": "team-a", "serviceaccount": {"name": "default"}}}),
}  # fmt: skip


@pytest.mark.parametrize("make", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
async def test_tokens_that_are_refused(scene: Scene, make: Any) -> None:
    token = make(scene)
    for request in (scene.report(token=token), scene.ask("GET", ORDER_PATH, token=token, pod_uid=POD)):
        status, answer = await request
        assert status == 401
        assert "token" in answer["error"]
    assert (dict(scene.reports.heard), scene.news) == ({}, [])


@pytest.mark.parametrize("ahead", [45, -45], ids=["a clock that is ahead of ours", "a clock that is behind"])
async def test_a_token_made_by_another_clock_is_accepted(scene: Scene, ahead: int) -> None:
    made = datetime.now(UTC) + timedelta(seconds=ahead)
    status, _ = await scene.report(token=scene.token(iat=made, nbf=made, seconds=min(ahead, 0) + 1))
    assert status == 200


async def test_another_scheme_than_bearer_is_refused(scene: Scene) -> None:
    async with scene.session.get(
        scene.url + ORDER_PATH,
        headers={"Authorization": f"Basic {scene.token()}"},
        ssl=scene.context,
        server_hostname=HOST,
    ) as response:
        assert response.status == 401


async def test_a_key_that_the_cluster_has_added_is_found(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await scene.report())[0] == 200
    scene.api.documents[JWKS_PATH] = jwks(scene.keys, "cluster", "next")
    assert (await scene.report(token=scene.token(kid="next")))[0] == 401, (
        "keys are not fetched at every stranger's wish"
    )
    monkeypatch.setattr(scene.verifier, "_next_fetch", 0.0)
    assert (await scene.report(token=scene.token(kid="next")))[0] == 200


async def test_a_key_that_the_cluster_has_taken_back_signs_no_token_that_was_good_before(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = scene.token()
    assert (await scene.report(token=token))[0] == 200
    scene.api.documents[JWKS_PATH] = jwks(scene.keys, "next")
    monkeypatch.setattr(scene.verifier, "_next_fetch", 0.0)
    assert (await scene.report(token=scene.token(kid="next")))[0] == 200
    assert (await scene.report(token=token))[0] == 401


async def test_a_token_that_was_good_before_is_refused_when_it_has_expired(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_operator.jobserver.auth.LEEWAY_SECONDS", 0.0)
    token = scene.token(seconds=4)
    assert [(await scene.report(token=token))[0] for _ in range(2)] == [200, 200]
    async with asyncio.timeout(30):
        while (answer := await scene.report(token=token))[0] == 200:
            await asyncio.sleep(0.3)
    assert answer[0] == 401


async def test_a_token_is_verified_once_and_remembered_as_that_of_its_own_pod(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []
    decode = jwt.decode

    def spy(token: str, **arguments: Any) -> dict[str, Any]:
        verified.append(token)
        return decode(token, **arguments)

    monkeypatch.setattr(jwt, "decode", spy)
    mine, other = scene.token(), scene.token(uid="pod-2")
    for _ in range(2):
        assert (await scene.report(token=mine))[0] == 200
        assert (await scene.report(token=other))[0] == 403, "what is remembered is whose it is"
    assert verified == [mine, other]


async def test_only_so_many_tokens_are_kept_at_hand(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_operator.jobserver.auth.TOKENS_AT_HAND", 2)
    for number in range(5):
        await scene.report(token=scene.token(jti=str(number)))
    assert len(scene.verifier._verified) == 2


@pytest.mark.parametrize("path", [JWKS_PATH, DISCOVERY_PATH], ids=["keys", "issuer"])
async def test_an_api_server_that_is_away_is_no_fault_of_the_token(
    scene: Scene, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = scene.api.documents[path]
    scene.api.documents[path] = Unavailable("no answer")
    assert await scene.report() == (503, {"error": "the cluster's token keys cannot be read now"})
    scene.api.documents[path] = document
    assert (await scene.report())[0] == 503, "it is not asked for every request"
    monkeypatch.setattr(scene.verifier, "_next_fetch", 0.0)
    assert (await scene.report())[0] == 200


# Orders.


async def test_a_poll_that_knows_nothing_is_answered_at_once(scene: Scene) -> None:
    assert await scene.poll() == (200, to_wire_order(action="Wait"))


async def test_a_poll_waits_until_the_order_is_another_one(scene: Scene) -> None:
    poll = asyncio.create_task(scene.poll(known_action="Wait", known_generation=0))
    while KEY not in scene.server._changed:
        await asyncio.sleep(0)
    scene.server.job_changed(KEY)  # something else of the job has changed
    while KEY not in scene.server._changed:
        await asyncio.sleep(0)
    assert not poll.done()
    scene.commit(committed())
    _, answer = await asyncio.wait_for(poll, 5)
    assert (answer["action"], answer["generation"]) == ("Run", 1)


async def test_a_poll_waits_on_when_only_what_the_next_generation_is_to_do_has_changed(scene: Scene) -> None:
    scene.commit(committed())
    poll = asyncio.create_task(scene.poll(known_action="Run", known_generation=1))
    while KEY not in scene.server._changed:
        await asyncio.sleep(0)
    edited = job_body(resourceVersion="3")
    edited["spec"]["checkpoint"] = {"interval": {"steps": 7}}
    scene.cache.observe_job(edited | {"status": committed()})
    scene.server.job_changed(KEY)
    while KEY not in scene.server._changed:
        await asyncio.sleep(0)
    assert not poll.done()
    poll.cancel()
    _, answer = await scene.report()
    assert answer["checkpoint"] == {"intervalSteps": 7, "intervalAuto": False, "keep": 2}


async def test_all_polls_of_a_job_are_answered_by_one_change(scene: Scene) -> None:
    polls = [asyncio.create_task(scene.poll(known_action="Wait", known_generation=0)) for _ in range(3)]
    waiting = asyncio.create_task(
        scene.ask(
            "GET", ORDER_PATH, token=scene.token(uid="pod-2"), pod_uid="pod-2", known_action="Wait", known_generation=0
        )
    )
    while KEY not in scene.server._changed or len(scene.server._changed[KEY]._waiters) < 4:
        await asyncio.sleep(0)
    scene.commit(committed())
    answers = await asyncio.wait_for(asyncio.gather(*polls, waiting), 5)
    assert [(answer["action"], answer["rank"]) for _, answer in answers] == [("Run", 0)] * 3 + [("Run", 1)]


async def test_a_job_is_parsed_once_for_all_agents_that_ask_about_one_version_of_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []

    def parse(body: dict[str, Any]) -> FineTuneJob:
        parsed.append(body["metadata"]["resourceVersion"])
        return parse_job(body)

    monkeypatch.setattr("finetune_operator.jobserver.app.parse_job", parse)
    for _ in range(3):
        await scene.report()
        await scene.ask("GET", ORDER_PATH, token=scene.token(uid="pod-2"), pod_uid="pod-2")
    assert parsed == ["1"]
    scene.commit(committed())
    orders = [(await scene.poll())[1]["action"], (await scene.report())[1]["action"]]
    assert (orders, parsed) == (["Run", "Run"], ["1", "2"])


async def test_only_so_many_jobs_are_kept_at_hand(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_operator.jobserver.app.JOBS_AT_HAND", 2)
    for number in range(5):
        body = job_body(name=f"job-{number}", uid=f"uid-{number}")
        scene.server._read(JobKey(("team-a", f"job-{number}")), body)
    assert [name for _, name in scene.server._at_hand] == ["job-3", "job-4"]


async def test_a_poll_is_answered_with_the_same_order_after_a_while(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_operator.jobserver.app.ORDER_POLL_SECONDS", 0.01)
    assert await scene.poll(known_action="Wait", known_generation=0) == (200, to_wire_order(action="Wait"))


# Replicas.


async def test_who_does_not_lead_hears_nothing_and_orders_nothing(scene: Scene) -> None:
    scene.commit(committed())
    scene.lease[0] = False
    refused = (503, {"error": "this replica does not lead"})
    assert await scene.report() == refused
    assert await scene.poll() == refused
    assert await scene.report(token=None) == refused, "whoever asks"
    assert (dict(scene.reports.heard), scene.news, scene.api.writes) == ({}, [], [])


async def test_a_poll_that_waits_is_sent_on_when_the_lease_ends(scene: Scene) -> None:
    poll = asyncio.create_task(scene.poll(known_action="Wait", known_generation=0))
    while KEY not in scene.server._changed:
        await asyncio.sleep(0)
    scene.lease[0] = False
    scene.server.dismiss_all()
    assert (await asyncio.wait_for(poll, 5))[0] == 503


async def test_an_order_that_is_due_after_the_lease_is_not_given(scene: Scene) -> None:
    """The status was committed by this replica in its last moment, or by the next one: it is the next one's to tell."""
    poll = asyncio.create_task(scene.poll(known_action="Wait", known_generation=0))
    while KEY not in scene.server._changed:
        await asyncio.sleep(0)
    scene.lease[0] = False
    scene.commit(committed())
    assert (await asyncio.wait_for(poll, 5))[0] == 503


async def test_a_lease_that_ends_while_a_report_is_read_is_noticed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = scene.verifier.verify

    async def slow(authorization: str | None) -> Any:
        caller = await verify(authorization)
        scene.lease[0] = False
        return caller

    monkeypatch.setattr(scene.verifier, "verify", slow)
    assert (await scene.report())[0] == 503
    assert (dict(scene.reports.heard), scene.news) == ({}, [])


async def test_a_poll_for_another_pod_is_refused(scene: Scene) -> None:
    assert (await scene.ask("GET", ORDER_PATH, pod_uid="pod-2"))[0] == 403
    assert (await scene.ask("GET", ORDER_PATH))[0] == 403


async def test_paths_that_are_none_of_the_server_s_are_not_found(scene: Scene) -> None:
    assert (await scene.ask("GET", "/"))[0] == 404
    assert (await scene.ask("GET", REPORT_PATH))[0] == 405


async def test_a_client_that_does_not_trust_the_authority_is_not_served(scene: Scene) -> None:
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        async with scene.session.get(scene.url + ORDER_PATH, server_hostname=HOST):
            pass
    stranger = ssl.create_default_context(cadata=make_certificates(HOST, datetime.now(UTC)).authority)
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        async with scene.session.get(scene.url + ORDER_PATH, server_hostname=HOST, ssl=stranger):
            pass


async def test_the_certificate_is_for_the_service_and_nobody_else(scene: Scene) -> None:
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        async with scene.session.get(scene.url + ORDER_PATH, server_hostname="elsewhere.svc", ssl=scene.context):
            pass


# Floods


async def test_a_pod_that_asks_too_often_is_put_off_and_no_other_is(scene: Scene) -> None:
    flood, other = scene.token(), scene.token(uid="pod-2")
    answers = [(await scene.report(token=flood))[0] for _ in range(200)]
    assert set(answers) == {200, 429}
    assert answers[: int(BURST)] == [200] * int(BURST)
    assert 429 in [(await scene.poll(token=flood))[0] for _ in range(5)]
    assert (await scene.report(idle_report("pod-2", 1), token=other))[0] == 200
    assert set(scene.reports.heard) == {POD, "pod-2"}


async def test_who_says_nothing_or_half_a_request_or_is_refused_is_not_kept(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(scene.server.strangers, "_clock", lambda: now[0])
    body = json.dumps(to_wire(idle_report(POD, 0))).encode()
    head = f"POST {REPORT_PATH} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(body)}\r\n"
    accepted = head.encode() + f"Authorization: Bearer {scene.token()}\r\n\r\n".encode() + body
    said = {
        "nothing": b"",
        "half a head": head.encode(),
        "half a body": accepted[:-5].replace(b"Bearer ", b"Bearer x"),
        "no token": head.encode() + b"\r\n" + body,
        "a report": accepted,
    }
    port = scene.runner.addresses[0][1]
    streams = {
        who: await asyncio.open_connection("127.0.0.1", port, ssl=scene.context, server_hostname=HOST) for who in said
    }
    async with asyncio.timeout(5):
        while len(scene.runner.server.connections) < len(said):
            await asyncio.sleep(0)
    scene.server.strangers.close(scene.runner.server.connections)
    now[0] = 40.0
    for who, (_, writer) in streams.items():
        writer.write(said[who])
    assert (await streams["a report"][0].readline()).split()[1] == b"200"
    assert (await streams["no token"][0].readline()).split()[1] == b"401"
    now[0] = 70.0
    scene.server.strangers.close(scene.runner.server.connections)
    async with asyncio.timeout(5):
        for who in said.keys() - {"a report"}:
            await streams[who][0].read()
    writer = streams["a report"][1]
    writer.write(accepted)
    async with asyncio.timeout(5):
        while b"HTTP/1.1 200" not in await streams["a report"][0].readline():  # behind the first answer's body
            pass
    for _, writer in streams.values():
        writer.close()
