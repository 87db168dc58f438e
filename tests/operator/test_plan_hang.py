"""Gangs that hang, and ranks that are slow: who is named, what follows, and what does not."""

import pytest

from finetune_api.protocol import AgentState, Doing, Heartbeat, Pace, Phase, Stalled
from tests.operator.documents import SCRIPT
from tests.operator.story import Story, document


def stalls(
    story: Story, rank: int, *, step: int = 41, doing: Doing = Doing.WAITING, seconds: float = 61.0, place: str = ""
) -> None:
    """All workers of a node are silent."""
    story.report(rank, stalled=Stalled(rank, Phase.TRAINING, step, seconds, doing, place or f"{doing.value}.py:7 in f"))


def test_a_gang_that_hangs_starts_anew_in_place_and_the_silent_rank_is_named() -> None:
    story = Story().trains()
    story.wait(100)
    story.report(1)
    stalls(story, 0)
    assert story.go().look_again_seconds is None
    assert story.generation == 1, "the other pod trains on, for all that is known"
    stalls(story, 1, doing=Doing.WORKING, place="feed.py:31 in batch")
    plan = story.go()
    assert (plan.create, plan.delete, story.phase, story.generation) == ((), (), "Recovering", 2)
    assert story.status["attempts"] == document("""
      - generation: 1
        startTime: "2026-01-01T12:00:00Z"
        endTime: "2026-01-01T12:01:40Z"
        reason: Hang
        message: "rank 1 stands still (Training, after step 41): silent for 61 s, it is at feed.py:31 in batch; the stacks of all ranks are in the logs of their pods"
        pod: sentiment-aaaaa-1-1
        node: node-1
        rank: 1
        lastStep: 1
    """)
    assert story.status["restarts"]["byReason"][0]["reason"] == "Hang"
    assert [story.order(rank).generation for rank in (0, 1)] == [2, 2], "the agents end what hangs"


CULPRITS = {
    "a stopped process, though its peer waits at the same step": ({"doing": Doing.STOPPED}, {}, 0),
    "who does not wait": ({}, {"doing": Doing.WORKING}, 1),
    "who has done fewer steps, whatever it does": ({"doing": Doing.WORKING}, {"step": 40}, 1),
    "of two that wait, who was heard of first of all": ({"seconds": 62.0}, {}, 0),
    "who shows no stacks, beside one that waits": ({}, {"doing": Doing.UNKNOWN}, 1),
}


@pytest.mark.parametrize(("first", "second", "culprit"), CULPRITS.values(), ids=CULPRITS.keys())
def test_the_rank_that_the_others_wait_for_is(first: dict, second: dict, culprit: int) -> None:
    story = Story().trains()
    stalls(story, 0, **first)
    stalls(story, 1, **second)
    story.go()
    (attempt,) = story.job.status.attempts
    assert (attempt.reason, attempt.rank, attempt.node) == ("Hang", culprit, f"node-{culprit}")


def test_a_rank_that_prepares_alone_keeps_its_peers_waiting_as_long_as_it_likes() -> None:
    story = Story(nodes=3).trains()
    story.report(0, heartbeat=Heartbeat(Phase.INITIALIZING))
    for rank in (1, 2):
        stalls(story, rank)
    story.wait(86400)
    for rank in range(3):
        story.report(rank)
    story.go()
    assert (story.generation, story.attempts) == (1, [])


def test_pods_that_tell_of_no_heartbeats_have_no_say() -> None:
    story = Story(base=SCRIPT).trains()
    story.report(1, heartbeat=None)
    stalls(story, 0)
    story.go()
    assert story.attempts == ["Hang"]


def test_a_pod_that_has_succeeded_is_not_asked() -> None:
    story = Story().trains()
    stalls(story, 1, doing=Doing.STOPPED)
    story.workers_succeed(1)
    stalls(story, 0)
    story.go()
    assert (story.attempts, story.job.status.attempts[0].rank) == (["Hang"], 0)


def test_while_a_pod_is_not_heard_nobody_knows() -> None:
    story = Story().trains()
    stalls(story, 0)
    stalls(story, 1)
    story.wait(15)
    story.report(0)
    assert story.go().look_again_seconds == 15
    assert story.generation == 1
    story.report(1)
    story.go()
    assert story.attempts == ["Hang"]


def test_a_new_operator_process_waits_until_it_has_heard_all() -> None:
    story = Story().trains()
    stalls(story, 0)
    story.heard.pop(story.pod(1).uid)
    assert story.go().look_again_seconds == 15
    assert story.generation == 1


def test_a_failure_is_no_hang_and_a_pod_that_must_go_is_waited_for_first() -> None:
    story = Story().trains()
    stalls(story, 0)
    stalls(story, 1)
    story.worker_ends(1, signal=11)
    story.wait(1)
    story.go()
    assert story.attempts == ["WorkerKilled"]
    story = Story().trains()
    story.must_go(1)
    stalls(story, 0)
    stalls(story, 1)
    story.go()
    assert (story.attempts, story.say().split(":")[0]) == ([], "PodLeaving")


def test_what_was_said_of_a_generation_before_counts_no_more() -> None:
    story = Story().trains()
    stalls(story, 0)
    stalls(story, 1)
    story.go()
    story.go()
    assert (story.generation, story.attempts) == (2, ["Hang"])
    for rank in (0, 1):
        story.report(rank, stalled=None, generation=2, state=AgentState.RUNNING)
    story.recovers()
    assert story.attempts == ["Hang"]


def test_hangs_have_a_budget_of_their_own() -> None:
    story = Story("recovery: {maxRestarts: 1}").trains()
    for _ in range(2):
        for rank in (0, 1):
            stalls(story, rank)
        story.go()
        if story.phase != "Failed":
            for rank in (0, 1):
                story.report(rank, stalled=None, generation=2, state=AgentState.RUNNING)
            story.recovers()
    assert story.say().startswith("RestartsExhausted: gave up after 1 restarts for Hang ")


def test_the_least_silence_that_is_a_hang_is_the_jobs_to_say_and_goes_with_the_order() -> None:
    assert Story().trains().order(0).hang_seconds == 60
    assert Story("recovery: {hangSeconds: 0}").trains().order(0).hang_seconds == 0


# Stragglers.


def paces(story: Story, *busy: float, step: float = 1.0) -> None:
    """What a step takes of each rank alone."""
    for rank, seconds in enumerate(busy):
        story.report(rank, paces=[Pace(rank, step, seconds)])


def straggler(story: Story) -> tuple[str, str]:
    story.go()
    condition = story.condition("Straggler")
    return condition.status, condition.message.split(" ")[1] if condition.status == "True" else ""


def trains_for_a_while(nodes: int = 3) -> Story:
    story = Story(nodes=nodes).trains()
    story.wait(61)
    for rank in range(nodes):
        story.report(rank)
    return story


def test_a_straggler_is_named_with_its_pod_and_node_and_nothing_is_restarted() -> None:
    story = trains_for_a_while()
    paces(story, 0.3, 0.69, 0.31)
    assert straggler(story) == ("True", "1")
    assert story.condition("Straggler").message == (
        "rank 1 (pod sentiment-aaaaa-1-1, node node-1) holds up the others: a step takes 0.69 s of it alone, "
        "2.3 times as much as of its peers (0.305 s)"
    )
    assert (story.phase, story.generation, story.restarts, story.holds) == ("Running", 1, 0, {"Ready", "Straggler"})


NO_STRAGGLERS = {
    "half as much again is noise": (3, (0.3, 0.45, 0.3), 1.0),
    "and so is what is no part of a step to speak of": (3, (0.003, 0.009, 0.003), 1.0),
    "a rank of which nothing is known": (3, (0.3, 0.9), 1.0),
    "one rank alone": (1, (0.9,), 1.0),
    "ranks that take nothing": (2, (0.0, 0.0), 1.0),
}


@pytest.mark.parametrize(("nodes", "busy", "step"), NO_STRAGGLERS.values(), ids=NO_STRAGGLERS.keys())
def test_it_is_no_straggler(nodes: int, busy: tuple[float, ...], step: float) -> None:
    story = trains_for_a_while(nodes)
    paces(story, *busy, step=step)
    assert straggler(story) == ("False", "")


def test_however_the_numbers_jump_the_condition_turns_once_a_minute_and_keeps_its_words() -> None:
    story = trains_for_a_while(2)
    seen = []
    for second in range(600):
        story.wait(1)
        paces(story, 0.3, 0.9 if second % 7 < 4 else 0.3)
        story.go()
        seen.append((story.condition("Straggler").status, story.condition("Straggler").message))
    turns = sum(before != after for before, after in zip(seen, seen[1:], strict=False))
    assert 2 <= turns <= 10
    assert len(set(seen)) == 2


def test_it_stays_one_until_it_is_nearly_as_fast_whatever_the_second_slowest_does() -> None:
    story = trains_for_a_while()
    paces(story, 0.3, 0.6, 0.3)
    assert straggler(story) == ("True", "1")
    message = story.condition("Straggler").message
    story.wait(61)
    paces(story, 0.8, 0.7, 0.3)
    assert straggler(story) == ("True", "1"), "0.7 against 0.55"
    assert story.condition("Straggler").message == message
    paces(story, 0.8, 0.3, 0.3)
    assert straggler(story) == ("True", "0")
    story.wait(61)
    paces(story, 0.35, 0.3, 0.3)
    assert straggler(story) == ("False", "")


def test_a_straggler_is_one_of_the_generation_that_runs() -> None:
    story = trains_for_a_while(2)
    paces(story, 0.3, 0.9)
    assert straggler(story) == ("True", "1")
    story.worker_ends(0, 1)
    story.worker_ends(1, 1)
    assert straggler(story) == ("False", "")
    story.recovers()
    assert straggler(story) == ("False", "")
