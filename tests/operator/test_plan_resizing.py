"""A gang whose size is changed while it trains: a save, a generation in the new size, and nothing lost."""

import pytest

from finetune_api.contract import ExitCode
from finetune_api.protocol import Action, AgentState, Exit, Order
from tests.operator.documents import SCRIPT
from tests.operator.story import Story


def resize(story: Story, **workers: int) -> Story:
    story.edit(workers=story.job.spec.workers.model_copy(update=workers))
    return story


def stops(story: Story) -> list[Order]:
    return [story.order(member.rank) for member in story.job.status.gang.members]


def test_a_gang_that_is_to_grow_trains_on_until_the_new_pods_are_there() -> None:
    story = resize(Story().trains(), nodes=4)
    plan = story.go()
    assert [(place.rank, place.generation) for place in plan.create] == [(2, 1), (3, 1)]
    story.pods_start(2)
    for _ in range(3):
        assert (story.go().create, story.order(0).action) == ((), Action.RUN)
    assert (story.phase, story.holds, story.status["gang"].get("spares")) == ("Running", {"Reconciling"}, None)
    assert story.say() == (
        "Resizing: generation 1 trains on 2 nodes; workers.nodes is 4: "
        "rank 3 of 4: pod sentiment-aaaaa-3-1 is being started on no node yet"
    )
    story.pods_start(3)
    story.go()
    assert stops(story) == [Order(action=Action.STOP, generation=1, grace_seconds=60)] * 2
    assert story.say() == "Resizing: generation 1 saves, to be regrouped: workers.nodes is 4"


def test_when_all_have_saved_the_next_generation_starts_at_once_in_the_new_size() -> None:
    story = resize(Story().trains(), nodes=3)
    story.go()
    story.pods_start(2)
    story.go()
    story.worker_saves(0, asked=True)
    story.go()
    assert story.generation == 1, "the other is still saving"
    story.worker_saves(1, asked=True)
    plan = story.go()
    assert (story.generation, len(story.job.status.gang.members), plan.create, plan.delete) == (2, 3, (), ())
    assert [story.order(rank).nodes for rank in range(3)] == [3, 3, 3]
    (attempt,) = story.job.status.attempts
    assert (attempt.reason, attempt.message) == ("Resized", "regrouped: workers.nodes was 2 and is 3")
    assert (story.restarts, story.job.status.gang.stop_time) == (0, None)
    story.workers_train()
    story.go()
    assert (story.say(), story.holds) == ("Running: generation 2 trains on 3 nodes", {"Ready"})


def test_a_smaller_gang_is_regrouped_at_once_and_gives_back_what_it_does_not_need() -> None:
    story = resize(Story(nodes=3).trains(), nodes=1)
    assert story.go().delete == ()
    assert [order.action for order in stops(story)] == [Action.STOP] * 3
    for rank in range(3):
        story.worker_saves(rank, asked=True)
    plan = story.go()
    assert (story.generation, story.order(0).nodes) == (2, 1)
    assert [pod.rank for pod in plan.delete] == [1, 2]


def test_a_size_that_is_taken_back_before_the_pods_are_there_costs_nothing() -> None:
    story = resize(Story().trains(), nodes=3)
    story.go()
    resize(story, nodes=2)
    plan = story.go()
    assert [pod.rank for pod in plan.delete] == [2]
    assert (story.generation, story.say()) == (1, "Running: generation 1 trains on 2 nodes")


def test_one_that_is_taken_back_after_the_gang_was_told_ends_it_all_the_same() -> None:
    story = resize(Story().trains(), nodes=1)
    story.go()
    resize(story, nodes=2)
    story.go()
    assert [order.action for order in stops(story)] == [Action.STOP] * 2, "an order that was given stands"
    for rank in range(2):
        story.worker_saves(rank, asked=True)
    plan = story.go()
    assert (story.generation, story.order(1).nodes, plan.delete) == (2, 2, ())


def test_a_script_that_does_not_save_is_regrouped_when_it_has_ended() -> None:
    story = resize(Story(base=SCRIPT).trains(), nodes=1)
    story.go()
    for rank in range(2):
        end = Exit(1, rank, None, 15)
        story.report(rank, generation=1, state=AgentState.STOPPED, exits=[end])
    story.go()
    assert (story.generation, story.attempts, story.restarts) == (2, ["Resized"], 0)


def test_members_that_do_not_end_are_not_waited_for_for_ever() -> None:
    story = resize(Story().trains(), nodes=1)
    story.go()
    story.worker_saves(0, asked=True)
    plan = story.go()
    assert plan.look_again_seconds == 60
    story.wait(60)
    story.go()
    assert (story.generation, story.attempts) == (2, ["Resized"])


def test_a_gang_that_has_done_its_work_meanwhile_has_succeeded() -> None:
    story = resize(Story().trains(), nodes=1)
    story.go()
    story.workers_succeed()
    story.go()
    assert (story.phase, story.attempts) == ("Succeeded", [])


@pytest.mark.parametrize("code", [ExitCode.ERROR, ExitCode.BAD_DATA])
def test_a_failure_before_the_new_pods_are_there_is_a_failure(code: int) -> None:
    story = resize(Story().trains(), nodes=3)
    story.go()
    story.worker_ends(0, code, message="boom")
    story.worker_ends(1, code, message="boom")
    story.go()
    assert story.attempts[-1] in ("WorkerFailed", "BadData")


def test_spares_take_the_new_ranks_and_are_made_again_behind() -> None:
    story = Story("workers: {spares: 1}").trains()
    story.pods_start(2)
    story.go()
    resize(story, nodes=3)
    plan = story.go()
    assert [order.action for order in stops(story)] == [Action.STOP] * 2
    assert [place.rank for place in plan.create] == [3], "the next spare"
    for rank in range(2):
        story.worker_saves(rank, asked=True)
    story.go()
    assert [member.pod for member in story.job.status.gang.members][2] == "sentiment-aaaaa-2-1"


# A size that cannot be had.


NO_ROOM = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."


def too_large() -> Story:
    """Two nodes train, spec asks for four, and there is no room for more than the two."""
    story = resize(Story().trains(), nodes=4)
    story.go()
    for rank in (2, 3):
        story.change(rank, unschedulable=NO_ROOM)
    story.go()
    story.wait(100)
    return story


def a_worker_dies(story: Story) -> None:
    story.worker_ends(0, signal=11)
    story.worker_ends(1, 1)
    story.go()


def test_a_size_that_cannot_be_had_does_not_cost_the_one_that_is() -> None:
    story = too_large()
    a_worker_dies(story)
    assert (story.generation, len(story.job.status.gang.members)) == (2, 2)
    assert [story.order(rank).action for rank in range(2)] == [Action.RUN] * 2
    story.workers_train()
    assert (story.go().delete, story.go().create) == ((), ()), "the pods that wait for room stay"
    for rank in (2, 3):
        story.change(rank, unschedulable="")
        story.pods_start(rank)
    story.go()
    assert stops(story) == [Order(action=Action.STOP, generation=2, grace_seconds=60)] * 2
    for rank in range(2):
        story.worker_saves(rank, asked=True)
    story.go()
    assert (story.generation, len(story.job.status.gang.members)) == (3, 4)


def test_nor_does_it_when_a_pod_has_to_be_made_again_and_lost_again() -> None:
    story = too_large()
    story.vanish(1)
    assert [(place.rank, place.generation) for place in story.go().create] == [(1, 2)]
    story.wait(100)
    story.change(1, phase="Failed")
    assert [(place.rank, place.generation) for place in story.go().create] == [(1, 3)]
    story.pods_start(1)
    story.report(0)
    story.go()
    assert (story.generation, len(story.job.status.gang.members)) == (3, 2)


def test_a_gang_that_waits_after_failures_grows_when_it_starts_and_not_before() -> None:
    story = resize(Story().trains(), nodes=3)
    story.go()
    a_worker_dies(story)
    story.pods_start(2)
    a_worker_dies(story)
    assert (story.generation, story.job.status.gang.nodes, story.condition("Ready").reason) == (3, 2, "BackingOff")
    story.vanish(2)
    story.wait(2)
    story.go()
    assert (story.generation, len(story.job.status.gang.members)) == (3, 2)


def test_a_gang_that_has_trained_takes_a_smaller_size_at_once_while_it_waits() -> None:
    story = resize(Story(nodes=3).trains(), nodes=2)
    story.vanish(2)
    story.go()
    assert (story.generation, len(story.job.status.gang.members)) == (2, 2)


def test_a_job_that_has_never_trained_takes_any_size_at_once() -> None:
    story = Story()
    story.go()
    resize(story, nodes=3)
    story.go()
    assert [pod.rank for pod in story.pods.values()] == [0, 1, 2]
    assert story.job.status.gang.nodes == 3


def test_a_job_that_is_resumed_takes_any_size_at_once() -> None:
    story = Story().trains()
    story.edit(suspend=True)
    story.go()
    story.vanish_all()
    story.go()
    resize(story, nodes=3)
    story.go()
    story.edit(suspend=False)
    assert [place.rank for place in story.go().create] == [0, 1, 2]


def test_a_gang_that_is_held_is_held_in_any_size() -> None:
    story = Story().trains()
    story.worker_ends(0, ExitCode.CHECKPOINTS_LOST)
    story.go()
    resize(story, nodes=3)
    story.go()
    assert (story.condition("Stalled").status, story.condition("Stalled").reason) == ("True", "CheckpointsLost")
    resize(story, nodes=1)
    story.go()
    assert (story.condition("Stalled").status, story.condition("Stalled").reason) == ("True", "CheckpointsLost")
    assert (story.generation, story.job.status.gang.nodes) == (2, 1)


# What it is called, and what it leaves.


def test_a_gang_that_is_to_be_resized_before_it_trains_is_starting() -> None:
    story = Story()
    story.go()
    story.pods_start()
    story.go()
    resize(story, nodes=3)
    story.go()
    assert (story.phase, story.condition("Ready").reason) == ("Starting", "Starting")
    story.workers_train()
    story.go()
    assert (story.phase, story.condition("Ready").reason) == ("Running", "Resizing")


def test_pods_that_never_ran_go_when_the_job_has_ended() -> None:
    story = resize(Story().trains(), nodes=3)
    story.go()
    story.change(2, unschedulable=NO_ROOM)
    story.go()
    story.workers_succeed()
    assert story.go().delete == ()
    assert (story.phase, [pod.rank for pod in story.go().delete]) == ("Succeeded", [2])
    assert story.go().delete == ()


def test_a_pod_that_ends_before_the_gang_could_grow_is_told_of_and_made_again_after_a_while() -> None:
    story = resize(Story().trains(), nodes=3)
    story.go()
    story.wait(20)
    story.change(2, phase="Failed", reason="UnexpectedAdmissionError", message="no devices")
    plan = story.go()
    assert (plan.create, plan.delete, plan.look_again_seconds) == ((), (), 40)
    assert story.say() == (
        "Resizing: generation 1 trains on 2 nodes; workers.nodes is 3: "
        "pod sentiment-aaaaa-2-1 ended: UnexpectedAdmissionError no devices"
    )
    story.wait(40)
    assert [pod.name for pod in story.go().delete] == ["sentiment-aaaaa-2-1"]
    assert [place.rank for place in story.go().create] == [3], "the other's name may still be taken"
    story.vanish(2)
    story.pods_start(3)
    story.go()
    assert stops(story) == [Order(action=Action.STOP, generation=1, grace_seconds=60)] * 2
