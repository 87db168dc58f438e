"""A rank dies at any request of a generation, and the next one goes on as if nothing had happened.

Real processes, two ranks, a real S3 server. A generation finds what one before it left (a commit, and a save that lacks
nothing but its entry in ``HEAD``), resumes, trains, and begins two saves beside training; everything old goes with their commits. The
proxy between it and the store counts the requests of both ranks, and at the k-th of them kills the rank that commits, or the other one:
before the request is carried out, or after it, so that nobody gets the answer. Its peer is left to fail by itself. Then the next
generation starts, in the same pods or in new ones.

One point of each kind is drawn, the same ones each time unless FINETUNE_RANDOM is set. All of them, each k until a run has no k-th request any more; or
the third of eight slices of that, spread evenly; or certain ones:

    FINETUNE_CRASH_POINTS=all pytest tests/trainer/checkpoint/test_crash_points.py     # or 3/8, or 17,18
"""

import os
import random
import signal
from pathlib import Path

import pytest

from tests.storage.faulty_proxy import Fault, Proxy, Request, faulty_proxy
from tests.trainer.checkpoint.gangs import Gang, Prefix, written_more_than_once
from tests.trainer.checkpoint.site import Remains, Site

SAMPLE = 1
PEER_SECONDS = 5
"""How long a peer may take to fail by itself; the agent kills it sooner."""
POINTS = os.environ.get("FINETUNE_CRASH_POINTS", "")
SAME, NEW = "the same pods", "new pods"


class Death:
    """Kills a rank at the k-th request, before or after it is carried out."""

    def __init__(self, proxy: Proxy, *, at: int, victim: int, after: bool) -> None:
        self.at, self.victim, self.is_after = at, victim, after
        self.gang: Gang
        proxy.before, proxy.after = self._before, self._after

    def _before(self, request: Request) -> Fault | None:
        if request.number != self.at or self.is_after:
            return None
        self.gang.kill(self.victim)
        return Fault.REQUEST_LOST if sender(request) == self.victim else None

    def _after(self, request: Request) -> None:
        if request.number == self.at and self.is_after:
            self.gang.kill(self.victim)


def sender(request: Request) -> int:
    """Which of two ranks a request comes from, as far as its path tells: uploads name the rank, reads do not matter."""
    return 1 if "rank-00001" in request.path and request.method != "GET" else 0


@pytest.fixture(scope="module")
def requests_of_a_run(site, remains) -> dict[str, int]:
    """How many requests there are when nobody dies."""
    counts = {}
    for pods in (SAME, NEW):
        prefix, pod = new_job(site, remains, pods)
        with faulty_proxy(site.server.endpoint) as proxy:
            gang = site.start(proxy, prefix, 2, pod, saves=[1, 2], until=3)
            assert gang.wait() == [0, 0], gang.story()
            assert written_more_than_once(proxy) == {}
        site.check(gang)
        assert len(gang.committed) == (3 if pods == SAME else 2)
        assert prefix.folders() == prefix.listed_folders()
        counts[pods] = len(proxy.requests)
    return counts


def points(most: int) -> list[int]:
    every = range(1, most + 1)
    if POINTS == "all":
        return [*every]
    if "/" in POINTS:
        first, slices = map(int, POINTS.split("/"))
        return [*every[first - 1 :: slices]]
    if POINTS:
        return [*map(int, POINTS.split(","))]
    chance = random.Random(None if os.environ.get("FINETUNE_RANDOM") else most)
    return chance.sample(every, SAMPLE)


@pytest.mark.parametrize("pods", [SAME, NEW])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("victim", [0, 1], ids=["the committing rank", "the other rank"])
def test_a_rank_dies_at_any_request_and_nothing_is_lost(
    site, remains, requests_of_a_run, victim, moment, pods, request
):
    chosen, deaths = points(requests_of_a_run[pods]), 0
    for k in chosen:
        try:
            deaths += die_and_go_on(site, remains, k, victim=victim, after=moment == "after", pods=pods)
        except BaseException:
            print(f"\nreplay: FINETUNE_CRASH_POINTS={k} pytest '{request.node.nodeid}'")
            raise
    print(f"{len(chosen)} points of {requests_of_a_run[pods]} requests: {deaths} deaths")


def new_job(site: Site, left: Remains, pods: str) -> tuple[Prefix, Path]:
    """Return prefix and pod for generation 2."""
    prefix = site.new_prefix(like=left)
    prefix.begin_upload("checkpoints/step-3/g1-0123456789abcdef-2/rank-00000.safetensors")
    return prefix, site.new_pod(left, prefix) if pods == SAME else site.new_pod()


def die_and_go_on(site: Site, left: Remains, k: int, *, victim: int, after: bool, pods: str) -> bool:
    """Return whether the victim died of it, and not of old age."""
    prefix, pod = new_job(site, left, pods)
    with faulty_proxy(site.server.endpoint) as proxy:
        death = Death(proxy, at=k, victim=victim, after=after)
        death.gang = gang = site.start(proxy, prefix, 2, pod, saves=[1, 2], until=3)
        gang.end(PEER_SECONDS)
        assert written_more_than_once(proxy) == {}
    site.check(gang)
    died = gang.codes[gang.pids[victim]] == -signal.SIGKILL
    assert died or len(proxy.requests) < k or gang.told("done", victim), gang.story()
    assert prefix.head()["generation"] <= 2
    newest = prefix.check()[0]
    assert newest >= max([2, *gang.committed])
    site.go_on(Remains(prefix, pod if pods == SAME else site.new_pod()), generation=3, committed=newest)
    return died
