"""The operator's process before a real API server: killed at each of its writes, and with everything going wrong between the two.

Whatever happens, a job's life ends the same, with the same pods: see tests/operator/life.py, which also holds what must be true at any time.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finetune_agent.reporting import PROGRESS_SECONDS
from finetune_operator.kube.api import JOBS
from tests.operator.api_proxy import EventFault, Fault, Request
from tests.operator.life import Life, a_life
from tests.operator.real_api import Client, RealApi, Refused

pytestmark = pytest.mark.cluster
AT_ONCE = 3  # lives; each is mostly waiting


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealApi]:
    server = RealApi(tmp_path_factory.mktemp("server"))
    try:
        asyncio.run(_start(server))
        yield server
    finally:
        server.stop()


async def _start(server: RealApi) -> None:
    await server.start()
    async with server.client() as client, asyncio.timeout(30):
        while not await _serves_jobs(client):  # some time after it has said so
            await asyncio.sleep(0.1)


async def _serves_jobs(client: Client) -> bool:
    try:
        await client.get(JOBS.path())
    except Refused:
        return False
    return True


def _folder(folder: Path, number: int) -> Path:
    own = folder / str(number)
    own.mkdir()
    return own


# Killed.


AFTER, BEFORE = True, False
"""Whether the write is carried out before the operator dies."""


class Crashes:
    """Kills the operator at some of its writes for the job. Of those only who have ``part`` in method and path are counted, from 1."""

    def __init__(self, life: Life, numbers: Container[int], *, carried_out: bool, part: str = "") -> None:
        self._life, self._numbers, self._carried_out, self._part = life, numbers, carried_out, part
        self.writes = self.crashes = 0
        life.proxy.before, life.proxy.after = self._before, self._after

    async def _before(self, request: Request) -> None:
        self.writes += self._counts(request)
        if not self._carried_out:
            await self._crash(request)

    async def _after(self, request: Request) -> None:
        if self._carried_out:
            await self._crash(request)

    async def _crash(self, request: Request) -> None:
        if self._counts(request) and self.writes in self._numbers:
            self.crashes += 1
            await self._life.operator.kill()
            self._life.proxy.cut_off()

    def _counts(self, request: Request) -> bool:
        of_the_job = request.is_write and f"/{self._life.namespace}/" in request.path
        return of_the_job and self._part in f"{request.method} {request.path}"


async def live_and_crash(
    server: RealApi, folder: Path, numbers: Container[int], *, carried_out: bool, part: str = ""
) -> Crashes:
    async with a_life(server, folder) as life:
        crashes = Crashes(life, numbers, carried_out=carried_out, part=part)
        await life.play()
        life.check()
        assert len(life.operator.ends) <= crashes.crashes, "it ends for no other reason"
    return crashes


async def test_crashes_right_after_pods_were_made_change_nothing_in_the_end(server: RealApi, tmp_path: Path) -> None:
    """The first of the gang, and the one that replaces what is lost."""
    assert (await live_and_crash(server, tmp_path, {1, 3}, carried_out=AFTER, part="POST /api/v1")).crashes == 2


@pytest.mark.long
async def test_nor_does_a_crash_after_every_single_write(server: RealApi, tmp_path: Path) -> None:
    assert (await live_and_crash(server, tmp_path, range(10**6), carried_out=AFTER)).crashes > 10


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("carried_out", [pytest.param(AFTER, id="after"), pytest.param(BEFORE, id="before")])
async def test_nor_does_a_crash_at_any_write(server: RealApi, tmp_path: Path, carried_out: bool) -> None:
    async def crash(number: int) -> Crashes:
        return await live_and_crash(server, _folder(tmp_path, number), {number}, carried_out=carried_out)

    for first in itertools.count(1, AT_ONCE):
        lives = await asyncio.gather(*(crash(number) for number in range(first, first + AT_ONCE)))
        print(f"crashes at {first} and the next: in lives of {[life.writes for life in lives]} writes")
        if not any(life.crashes for life in lives):
            assert first > 10
            return


# Ill served.


@dataclass(frozen=True)
class Weather:
    """How often something goes wrong: with requests, and with events of watches."""

    requests: Mapping[Fault, float] = field(default_factory=dict)
    events: Mapping[EventFault, float] = field(default_factory=dict)
    watches: Mapping[Fault, float] = field(default_factory=dict)
    lists: Mapping[Fault, float] = field(default_factory=dict)

    def over(self, life: Life, seed: int) -> None:
        """Begin."""
        chance = random.Random(seed)

        def break_request(request: Request) -> Fault | None:
            special = self.watches if request.is_watch else self.lists if request.is_list else {}
            return _drawn(chance, {**self.requests, **special})

        life.proxy.break_request = break_request
        life.proxy.break_event = lambda _request, _line: _drawn(chance, self.events)


def _drawn(chance: random.Random, odds: Mapping[Any, float]) -> Any:
    drawn = chance.random()
    for fault, probability in odds.items():
        drawn -= probability
        if drawn < 0:
            return fault
    return None


EVENTS = Weather(events={EventFault.REPEATED: 0.3, EventFault.SWAPPED: 0.2, EventFault.GONE: 0.1, EventFault.TORN: 0.1})
WEATHERS = {
    "410 comes in the stream": Weather(events={EventFault.GONE: 0.3}),
    "410 is the answer to a watch": Weather(watches={Fault.GONE: 0.3}),
    "streams break in the middle of an event": Weather(events={EventFault.TORN: 0.3}),
    "events come twice and late": Weather(events={EventFault.REPEATED: 0.6}),
    "events come in another order": Weather(events={EventFault.SWAPPED: 0.5}),
    "too many requests": Weather(requests={Fault.TOO_MANY: 0.3}),
    "server errors": Weather(requests={Fault.SERVER_ERROR: 0.2}),
    "connections are reset": Weather(requests={Fault.RESET: 0.2}),
    "answers are lost": Weather(requests={Fault.ANSWER_LOST: 0.2}),
    "answers come late": Weather(requests={Fault.LATE: 0.2}),
    "lists are truncated": Weather(lists={Fault.TRUNCATED: 0.5}),
    "events go wrong in every way": EVENTS,
    "everything goes wrong": Weather(
        events={kind: 0.05 for kind in EventFault if kind is not EventFault.STALLED},
        requests={kind: 0.05 for kind in Fault if kind is not Fault.GONE},
        watches={Fault.GONE: 0.05},
    ),
}


async def live_through(server: RealApi, folder: Path, weather: Weather, seed: int) -> None:
    async with a_life(server, folder) as life:
        weather.over(life, seed)
        await life.play()
        life.check()
        print(f"{len(life.proxy.requests)} requests, ended with {life.operator.ends}")


async def test_a_life_in_which_watches_go_wrong_in_every_way_ends_the_same(server: RealApi, tmp_path: Path) -> None:
    await live_through(server, tmp_path, EVENTS, 1)


@pytest.mark.long
@pytest.mark.parametrize("weather", WEATHERS.values(), ids=WEATHERS.keys())
async def test_lives_in_any_weather_end_the_same(server: RealApi, tmp_path: Path, weather: Weather) -> None:
    seeds = range(AT_ONCE)
    await asyncio.gather(*(live_through(server, _folder(tmp_path, seed), weather, seed) for seed in seeds))


@pytest.mark.long
@pytest.mark.parametrize("plural", ["finetunejobs", "pods"])
async def test_a_watch_that_falls_silent_is_begun_anew(server: RealApi, tmp_path: Path, plural: str) -> None:
    silent: list[bytes] = []

    def break_event(request: Request, line: bytes) -> EventFault | None:
        if silent or not request.path.endswith(plural):
            return None
        silent.append(line)
        return EventFault.STALLED

    async with a_life(server, tmp_path) as life:
        life.proxy.break_event = break_event
        await life.play()
        life.check()
        assert silent
        assert life.operator.ends == []


async def test_a_pod_whose_end_no_watch_has_shown_is_missed_at_once(server: RealApi, tmp_path: Path) -> None:
    """The watch was away just then, and its next list is without the pod: nobody says DELETED."""
    hidden: list[bytes] = []

    def break_event(_: Request, line: bytes) -> EventFault | None:
        if json.loads(line)["type"] != "DELETED":
            return None
        hidden.append(line)
        return EventFault.GONE

    async with a_life(server, tmp_path) as life:
        await life.train()
        life.proxy.break_event = break_event
        await life.lose(rank=1)
        await life.until("the gang trains again", lambda: life.trains(after=1))
        await life.succeed()
        life.check()
        assert hidden


# Limited.

TELLING_SECONDS = 2 * PROGRESS_SECONDS  # until agents have told how far they are


async def be_limited(life: Life, seconds: float, *, retry_after: int, part: str) -> None:
    """Have writes with ``part`` in their path refused for so long, while training goes on.

    Then the newest progress is written, once, and until then the server is asked no more often than it wants to be.
    """
    await life.train()
    life.proxy.retry_after_seconds = retry_after
    asked: list[Request] = []

    def break_request(request: Request) -> Fault | None:
        if not request.is_write or part not in request.path:
            return None
        asked.extend([request] if request.path.endswith("/status") else [])
        return Fault.TOO_MANY

    life.proxy.break_request = break_request
    await asyncio.sleep(3)  # for what is under way
    late, asked[:], began = len(life.versions), [], time.monotonic()
    await asyncio.sleep(seconds - TELLING_SECONDS)
    due = life.newest_step
    await asyncio.sleep(TELLING_SECONDS)
    assert life.versions[late:] == []
    assert len(asked) <= (time.monotonic() - began) / retry_after + 1
    life.proxy.break_request = lambda _: None
    await life.until("the newest progress is told", lambda: life.step >= due)
    assert len(life.versions) == late + 1, "and nothing older before it"
    assert life.gang["generation"] == 1, "nothing restarts"


async def test_status_is_late_while_the_api_server_limits_us(server: RealApi, tmp_path: Path) -> None:
    async with a_life(server, tmp_path, {"progressSeconds": 1}) as life:
        await be_limited(life, 5, retry_after=3, part="/status")
        assert life.operator.ends == []


@pytest.mark.long
@pytest.mark.parametrize("part", ["/status", "/"], ids=["what it writes of jobs", "all that it writes, its lease too"])
async def test_status_is_a_minute_late_when_the_api_server_limits_us_so_long(
    server: RealApi, tmp_path: Path, part: str
) -> None:
    async with a_life(server, tmp_path, {"progressSeconds": 1}) as life:
        await be_limited(life, 60, retry_after=10, part=part)
        await life.lose(rank=1)
        await life.until("the gang trains again", lambda: life.trains(after=1))
        await life.succeed()
        life.check()
