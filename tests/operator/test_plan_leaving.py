"""A pod that must go: its gang saves first, and the generation ends when all members have."""

import pytest

from finetune_api.contract import ExitCode
from finetune_api.protocol import AgentState, Exit
from finetune_operator.plan.observation import NewPod
from tests.operator.story import Story


def test_a_drained_pod_s_peers_are_left_in_peace_until_all_ranks_have_saved() -> None:
    story = Story("recovery: {maxRestarts: 0}", nodes=3).trains()
    story.wait(100)
    story.workers_train()
    story.must_go(1)
    plan = story.go()
    assert (story.generation, plan.create, plan.delete) == (1, (), ())
    assert [story.order(rank).action for rank in (0, 2)] == ["Run", "Run"]
    assert (
        story.say()
        == "PodLeaving: pod sentiment-aaaaa-1-1 must go (EvictionByEvictionAPI); the workers save before the gang starts again"
    )
    assert (story.phase, story.holds) == ("Recovering", {"Reconciling"})
    story.wait(3)
    story.worker_saves(1, asked=True)
    story.go()
    assert story.generation == 1, "two members still save"
    story.worker_saves(2)
    story.go()
    assert story.generation == 1, "one member still saves: rank 0 may be committing"
    story.worker_saves(0)
    plan = story.go()
    assert (story.generation, plan.create) == (2, (NewPod(1, 2),))
    assert (story.attempts, story.restarts) == (["Preempted"], 0)
    attempt = story.job.status.attempts[0]
    assert (attempt.pod, attempt.node, attempt.exit_code) == ("sentiment-aaaaa-1-1", "node-1", ExitCode.SAVED)
    assert (
        attempt.message
        == "pod sentiment-aaaaa-1-1 (rank 1) was disrupted: EvictionByEvictionAPI; the workers have saved"
    )
    assert story.recovers().generation == 2


def test_nothing_is_written_twice_while_a_gang_saves() -> None:
    story = Story().trains()
    story.must_go(1)
    first = story.go()
    story.wait(5)
    story.workers_train()
    assert story.go().status == first.status


def heard_again(story: Story) -> None:
    story.wait(9)
    story.workers_train()


NO_SAVE_COMES = {
    "the grace period is over": (
        lambda s: [heard_again(s) for _ in range(7)],
        ("Preempted", "pod sentiment-aaaaa-1-1 (rank 1) was disrupted: EvictionByEvictionAPI"),
    ),
    "the pod is silent, for its node is gone": (
        lambda s: s.wait(15),
        ("Preempted", "pod sentiment-aaaaa-1-1 (rank 1) was disrupted: EvictionByEvictionAPI"),
    ),
    "the pod went without a word": (
        lambda s: s.vanish(1),
        ("PodDeleted", "pod sentiment-aaaaa-1-1 (rank 1) was deleted"),
    ),
    "its workers ended by the signal": (
        lambda s: s.report(1, generation=1, state=AgentState.STOPPED, exits=[Exit(1, 1, None, 15)]),
        ("Preempted", "pod sentiment-aaaaa-1-1 (rank 1) was disrupted: EvictionByEvictionAPI"),
    ),
    "a script ended politely": (
        lambda s: s.report(1, generation=1, state=AgentState.STOPPED),
        ("Preempted", "pod sentiment-aaaaa-1-1 (rank 1) was disrupted: EvictionByEvictionAPI"),
    ),
    "a peer lost its collective": (
        lambda s: s.worker_ends(0, 1, message="RuntimeError: connection closed by peer"),
        ("Preempted", "pod sentiment-aaaaa-1-1 (rank 1) was disrupted: EvictionByEvictionAPI"),
    ),
    "a worker of its own had crashed before": (
        lambda s: s.worker_ends(1, signal=11),
        ("WorkerKilled", "rank 1 ended by signal SIGSEGV"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("what", "attempt"), NO_SAVE_COMES.values(), ids=NO_SAVE_COMES.keys())
def test_a_save_that_will_not_come_is_not_waited_for(what, attempt: tuple[str, str]) -> None:
    story = Story().trains()
    story.must_go(1)
    story.go()
    assert story.generation == 1
    what(story)
    story.go()
    story.wait(1)
    story.go()
    told = story.job.status.attempts[0]
    assert (story.generation, (told.reason, told.message)) == (2, attempt)


STILL_WAITS = {
    "while its agent is heard": (heard_again, 15),
    "for one that this process has not heard yet": (lambda s: s.heard.clear(), 60),
}


@pytest.mark.parametrize(("what", "seconds"), STILL_WAITS.values(), ids=STILL_WAITS.keys())
def test_a_save_is_waited_for_and_looked_at_when_its_time_is_over(what, seconds: float) -> None:
    story = Story().trains()
    story.must_go(1)
    what(story)
    assert story.go().look_again_seconds == seconds
    assert story.generation == 1


SAVED_ALL_THE_SAME = {
    "a pod that went before its last word was heard": lambda s: (s.worker_saves(0), s.vanish(1)),
    "a pod whose last word came before it went": lambda s: (s.worker_saves(1, asked=True), s.vanish(1), s.worker_saves(0)),
    "a deletion by hand": lambda s: (s.change(1, disruption=""), s.worker_saves(1, asked=True), s.worker_saves(0)),
    "a peer that was killed after it had saved": lambda s: (s.worker_saves(1, asked=True), s.worker_ends(0, signal=9)),
}  # fmt: skip


@pytest.mark.parametrize("what", SAVED_ALL_THE_SAME.values(), ids=SAVED_ALL_THE_SAME.keys())
def test_what_was_saved_costs_nothing_whatever_became_of_the_pods(what) -> None:
    story = Story("recovery: {maxRestarts: 0}").trains()
    story.must_go(1)
    what(story)
    story.go()
    assert (story.generation, story.attempts, story.restarts) == (2, ["Preempted"], 0)


def test_the_last_word_of_a_pod_that_is_gone_keeps_its_peers_from_being_cut_short() -> None:
    story = Story().trains()
    story.must_go(1)
    story.go()
    story.worker_saves(1, asked=True)
    story.vanish(1)
    plan = story.go()
    assert (story.generation, plan.look_again_seconds) == (1, 60), "rank 0 still commits"
    story.worker_saves(0)
    story.go()
    assert (story.generation, story.attempts) == (2, ["Preempted"])


def test_peers_that_never_finish_their_save_are_not_waited_for_for_ever() -> None:
    story = Story().trains()
    story.worker_saves(1)
    story.go()
    story.wait(59)
    story.go()
    assert story.generation == 1
    story.wait(1)
    story.go()
    assert (story.generation, story.attempts, story.restarts) == (2, ["Preempted"], 0)


def test_a_pod_of_several_workers_has_ended_when_all_of_them_have() -> None:
    story = Story("workers: {processesPerNode: 2}").trains()
    story.must_go(1)
    story.report(1, generation=1, state=AgentState.STOPPED, exits=[Exit(1, 2, 75), Exit(1, 3, 75)])
    story.report(0, generation=1, state=AgentState.FAILED, exits=[Exit(1, 1, 75)])
    story.go()
    assert story.generation == 1, "rank 0 still commits"
    story.report(0, generation=1, state=AgentState.FAILED, exits=[Exit(1, 1, 75), Exit(1, 0, 75)])
    story.go()
    assert story.generation == 2


def test_two_pods_that_must_go_are_both_waited_for() -> None:
    story = Story(nodes=3).trains()
    story.must_go(1)
    story.must_go(2)
    story.go()
    assert story.say().startswith("PodLeaving: pod sentiment-aaaaa-1-1 and 1 more must go")
    for rank in (1, 2):
        story.worker_saves(rank, asked=True)
    story.worker_saves(0)
    plan = story.go()
    assert plan.create == (NewPod(1, 2), NewPod(2, 2))


def test_a_pod_that_is_evicted_after_the_others_have_succeeded_is_not_restarted_for() -> None:
    story = Story().trains()
    story.workers_succeed()
    story.must_go(1)
    story.go()
    assert story.phase == "Succeeded"


def test_a_preemption_that_has_only_been_announced_changes_nothing() -> None:
    story = Story().trains()
    story.change(1, disruption="PreemptionByScheduler")
    story.go()
    assert (story.generation, story.phase) == (1, "Running")


def test_an_agent_that_knows_of_its_end_before_we_do_is_not_counted_on_again() -> None:
    story = Story().trains()
    story.report(1, generation=1, state=AgentState.STOPPED, leaving=True)
    story.go()
    assert (story.generation, story.attempts) == (2, ["PodDeleted"])
    assert story.job.status.gang.members == [], "its pod looks as well as ever"
    story.vanish(1)
    assert story.go().create == (NewPod(1, 2),)
    assert story.recovers().attempts == ["PodDeleted"]


def test_a_container_that_is_started_again_is_counted_on_again() -> None:
    story = Story().trains()
    story.report(1, generation=1, state=AgentState.STOPPED, leaving=True)
    story.go()
    story.report(1, generation=1, state=AgentState.STOPPED, leaving=False)
    story.go()
    assert [member.rank for member in story.job.status.gang.members] == [0, 1]
