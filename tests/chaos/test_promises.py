"""The eye of the chaos: each promise, broken in a document, is told; a job's whole good life is not."""

import copy
from typing import Any

import pytest

from tests.chaos.promises import broken_by_outcome, broken_by_pods, broken_by_starts, broken_by_version
from tests.operator.simulation import Cluster

GANGS = {1: {0: "a", 1: "b"}, 2: {0: "a", 1: "c"}}


async def life() -> list[dict[str, Any]]:
    """The versions of a job that trains, loses a worker, trains again and succeeds."""
    cluster = Cluster()
    versions = []

    async def go_on() -> None:
        await cluster.settle()
        versions.append(copy.deepcopy(cluster.job))

    await go_on()
    next(iter(cluster.agents.values())).worker_ends(None, 9)
    await cluster.settle()
    cluster.wait(2)
    await go_on()
    cluster.train()
    await go_on()
    return versions


async def test_a_good_life_breaks_no_promise() -> None:
    before, told = None, []
    versions = await life()
    for version in versions:
        told += broken_by_version(before, version)
        before = version
    assert told == []
    assert [version["status"]["phase"] for version in versions] == ["Running", "Running", "Succeeded"]
    assert list(broken_by_outcome(versions[-1], touches=1)) == []


def fall_back(status: dict[str, Any]) -> None:
    status["gang"]["generation"] = 1


def change_members(status: dict[str, Any]) -> None:
    status["gang"]["members"][0]["uid"] = "another"


def move_the_master(status: dict[str, Any]) -> None:
    status["gang"]["masterPort"] += 1


def double_a_rank(status: dict[str, Any]) -> None:
    status["gang"] |= {"generation": 3, "members": [status["gang"]["members"][0]] * 2}


def forget_a_commit(status: dict[str, Any]) -> None:
    status["checkpoint"]["step"] -= 1


def resume_too_early(status: dict[str, Any]) -> None:
    status["resumed"] = {"generation": 3, "step": status["checkpoint"]["step"] - 1}


def overdraw(status: dict[str, Any]) -> None:
    status["restarts"]["byReason"][0]["used"] = 9


def forget_restarts(status: dict[str, Any]) -> None:
    status["restarts"]["total"] = 0


def repeat_an_attempt(status: dict[str, Any]) -> None:
    status["attempts"] *= 2


def say_two_things(status: dict[str, Any]) -> None:
    next(c for c in status["conditions"] if c["type"] == "Reconciling")["status"] = "True"


BROKEN = {
    "a generation that falls": (fall_back, "generation fell from 2 to 1"),
    "members that change within a generation": (change_members, "members of generation 2 changed"),
    "a master that moves within a generation": (move_the_master, "masterPort of generation 2 changed"),
    "two members of one rank": (double_a_rank, "is no gang of 2"),
    "a committed step that is lost": (forget_a_commit, "the committed step fell from 7 to 6"),
    "a resume before what was committed": (resume_too_early, "resumed at step 6, and 7 was committed"),
    "more restarts than the budget has": (overdraw, "9 restarts used of 8"),
    "restarts that are forgotten": (forget_restarts, "restarts fell"),
    "an attempt that is told twice": (repeat_an_attempt, "attempts [1, 1]"),
    "conditions that contradict one another": (say_two_things, "kstatus"),
}


@pytest.mark.parametrize(("spoil", "told"), BROKEN.values(), ids=BROKEN.keys())
async def test_a_promise_broken_by_a_version_is_told(spoil: Any, told: str) -> None:
    before = (await life())[1]
    before["status"] |= {"checkpoint": {"step": 7}}
    after = copy.deepcopy(before)
    assert list(broken_by_version(before, after)) == []
    spoil(after["status"])
    assert told in "; ".join(broken_by_version(before, after))


async def test_a_finished_job_that_changes_is_told() -> None:
    finished = (await life())[2]
    after = copy.deepcopy(finished)
    after["status"]["gang"]["generation"] += 1
    assert "a finished job changed" in list(broken_by_version(finished, after))


def pod(rank: str, generation: str, **metadata: str) -> dict[str, Any]:
    labels = {"finetune.dev/rank": rank, "finetune.dev/generation": generation}
    return {"metadata": {"labels": labels, **metadata}, "status": {"phase": "Running"}}


def test_two_pods_of_one_place_are_told_unless_one_must_go() -> None:
    assert list(broken_by_pods([pod("0", "1"), pod("1", "1"), pod("0", "2")])) == []
    assert list(broken_by_pods([pod("0", "1"), pod("0", "1", deletionTimestamp="now")])) == []
    assert list(broken_by_pods([pod("0", "1"), pod("0", "1")])) == ["2 pods live for rank 0 of generation 1"]


STARTS = {
    "each rank once, where status says": ([(1, 0, "a"), (1, 1, "b"), (2, 0, "a"), (2, 1, "c")], ""),
    "a rank that never came to start": ([(1, 0, "a")], ""),
    "a rank that started twice": ([(1, 0, "a"), (1, 0, "a")], "rank 0 of generation 1 started twice"),
    "a rank in the pod of another": ([(2, 1, "b")], "rank 1 of generation 2 ran in b; its member is c"),
    "a generation that nobody committed": ([(3, 0, "a")], "generation 3 ran and was never committed"),
}


@pytest.mark.parametrize(("starts", "told"), STARTS.values(), ids=STARTS.keys())
def test_starts_are_those_that_status_committed(starts: list[tuple[int, int, str]], told: str) -> None:
    assert told in "; ".join(broken_by_starts(starts, GANGS, processes=1))
    assert bool(told) == bool(list(broken_by_starts(starts, GANGS, processes=1)))


async def test_an_end_that_is_no_success_and_a_restart_without_a_cause_are_told() -> None:
    finished = (await life())[2]
    assert list(broken_by_outcome(finished, touches=0)) == ["touched 0 times and restarted 1 times (1 WorkerKilled)"]
    finished["status"]["attempts"][0]["reason"] = "GaveWay"
    assert list(broken_by_outcome(finished, touches=0)) == []
    finished["status"]["phase"] = "Failed"
    assert "ended Failed" in next(broken_by_outcome(finished, touches=1))
