"""Warm pods beyond the gang: they take a lost rank's place at once, are made again behind, and cost nothing when they are lost."""

from finetune_api.protocol import AgentState
from finetune_operator.plan.observation import NewPod, Problem
from tests.operator.story import Story


def with_spares(count: int = 1, nodes: int = 2) -> Story:
    """A gang that trains, with its spares warm behind it."""
    story = Story(f"workers: {{spares: {count}}}", nodes=nodes).trains()
    story.pods_start(*range(nodes, nodes + count))
    story.go()
    return story


def members(story: Story) -> list[str]:
    return [member.pod for member in story.job.status.gang.members]


def test_spares_are_made_behind_a_gang_that_has_its_members_and_not_before() -> None:
    story = Story("workers: {spares: 2}")
    assert story.go().create == (NewPod(0, 1), NewPod(1, 1)), "no gang waits for its spares"
    story.pods_start()
    assert story.go().create == (), "members first"
    assert story.go().create == (NewPod(2, 1), NewPod(3, 1))
    assert story.go().create == ()
    assert story.job.status.gang.spares == 0
    story.pods_start(2)
    story.go()
    assert (story.job.status.gang.spares, story.order(2).action) == (1, "Wait")


def test_a_spare_takes_the_place_in_the_very_write_that_ends_the_generation() -> None:
    story = with_spares()
    story.vanish(1)
    plan = story.go()
    assert (story.generation, members(story)) == (2, ["sentiment-aaaaa-0-1", "sentiment-aaaaa-2-1"])
    assert (story.order(2).action, story.order(2).rank) == ("Run", 1)
    assert (plan.create, plan.delete) == ((), ())
    assert story.go().create == (NewPod(3, 2),), "and is made again behind"
    assert story.go().create == ()


def test_a_spare_that_takes_rank_0_is_where_the_ranks_meet() -> None:
    story = with_spares()
    story.vanish(0)
    story.go()
    gang = story.job.status.gang
    assert members(story) == ["sentiment-aaaaa-2-1", "sentiment-aaaaa-1-1"]
    assert (gang.master_address, gang.master_port) == ("10.0.0.2", 29502)
    assert story.order(1).master_address == "10.0.0.2"


def test_a_spare_takes_the_place_of_a_pod_that_is_silent_and_the_silent_one_is_deleted() -> None:
    story = with_spares().listens()
    story.change(1, node_lost=True)
    plan = story.passes(14, 0, 2)
    assert story.generation == 1
    plan = story.passes(1, 0, 2)
    assert members(story) == ["sentiment-aaaaa-0-1", "sentiment-aaaaa-2-1"]
    assert [pod.name for pod in plan.delete] == ["sentiment-aaaaa-1-1"]
    assert story.go().create == (NewPod(3, 2, ("node-1",)),)


def test_a_spare_that_has_not_reported_is_not_waited_for_and_takes_no_place() -> None:
    story = Story("workers: {spares: 1}").trains()
    story.vanish(1)
    plan = story.go()
    assert plan.create == (NewPod(1, 2),)
    assert plan.delete == ()
    story.pods_start(1)
    story.go()
    assert members(story) == ["sentiment-aaaaa-0-1", "sentiment-aaaaa-1-2"]


def test_a_spare_that_is_warm_before_the_replacement_is_takes_the_place() -> None:
    story = Story("workers: {spares: 1}").trains()
    story.vanish(1)
    story.go()
    story.pods_start(2)
    story.go()
    assert members(story) == ["sentiment-aaaaa-0-1", "sentiment-aaaaa-2-1"]
    assert story.go().create == (), "the replacement is the spare now"


def test_more_pods_are_lost_than_there_are_spares() -> None:
    story = with_spares(count=1, nodes=3)
    story.vanish(1)
    story.vanish(2)
    plan = story.go()
    assert plan.create == (NewPod(2, 2),)
    assert members(story) == []
    story.pods_start(2)
    story.go()
    assert members(story) == ["sentiment-aaaaa-0-1", "sentiment-aaaaa-3-1", "sentiment-aaaaa-2-2"]


def test_a_stand_in_keeps_its_rank_whatever_else_changes() -> None:
    """What a rank has staged in its pod's memory is of use to that rank alone."""
    story = with_spares(count=2, nodes=3)
    story.vanish(2)
    story.go()
    assert [(member.rank, member.pod) for member in story.job.status.gang.stand_ins] == [(2, "sentiment-aaaaa-3-1")]
    story.go()
    story.workers_train_all()
    story.wait(100)
    story.vanish(0)
    story.go()
    assert members(story) == ["sentiment-aaaaa-4-1", "sentiment-aaaaa-1-1", "sentiment-aaaaa-3-1"]
    story.workers_train_all()
    story.wait(100)
    story.fails("sentiment-aaaaa-1-1")
    story.wait(1)
    story.go()
    assert (story.generation, members(story)) == (
        4,
        ["sentiment-aaaaa-4-1", "sentiment-aaaaa-1-1", "sentiment-aaaaa-3-1"],
    )


# Losing one.


def test_a_spare_that_is_lost_ends_no_generation_and_is_made_again_under_another_name() -> None:
    story = with_spares().listens()
    story.change(2, node_lost=True)
    plan = story.passes(15, 0, 1)
    assert (story.generation, story.attempts, story.phase) == (1, [], "Running")
    assert [pod.name for pod in plan.delete] == ["sentiment-aaaaa-2-1"]
    assert plan.create == (NewPod(3, 1, ("node-2",)),), "its own name is taken for as long as its node is away"
    assert story.job.status.gang.spares == 0


def test_a_spare_that_is_silent_is_lost_though_the_gang_advances() -> None:
    story = with_spares().listens()
    story.workers_train()
    plan = story.passes(29, 0, 1, step=1)
    assert (plan.create, plan.delete) == ((), ())
    plan = story.passes(1, 0, 1, step=1)
    assert [pod.name for pod in plan.delete] == ["sentiment-aaaaa-2-1"]
    assert plan.create == (NewPod(3, 1, ("node-2",)),)
    assert (story.generation, story.attempts, story.phase) == (1, [], "Running")


def test_a_spare_that_is_deleted_is_made_again() -> None:
    story = with_spares()
    story.vanish(2)
    assert story.go().create == (NewPod(2, 1),)


def test_a_spare_that_ends_by_itself_is_not_made_again_and_again() -> None:
    story = with_spares()
    story.change(2, phase="Failed", reason="UnexpectedAdmissionError", containers=())
    assert story.go().create == ()
    assert (story.generation, story.job.status.gang.spares) == (1, 0)
    story.worker_ends(0, signal=11)
    story.worker_ends(1, 1)
    story.go()
    assert story.go().create == (NewPod(3, 2),), "the next generation tries again"


def test_a_spare_that_cannot_be_placed_is_no_trouble_of_the_gang() -> None:
    story = Story("workers: {spares: 1}").trains()
    story.change(2, unschedulable="0/2 nodes are available")
    story.flags = {"senior_waits": True}
    story.go()
    assert (story.phase, story.holds, story.job.status.gang.spares) == ("Running", {"Ready"}, 0)


# Edits.


def test_spares_come_and_go_with_spec() -> None:
    story = with_spares(count=2)
    story.edit(workers=story.job.spec.workers.model_copy(update={"spares": 1}))
    plan = story.go()
    assert ([pod.name for pod in plan.delete], story.job.status.gang.spares) == (["sentiment-aaaaa-3-1"], 1)
    story.go()
    assert story.job.status.gang.spares == 1
    story.edit(workers=story.job.spec.workers.model_copy(update={"spares": 0}))
    assert [pod.name for pod in story.go().delete] == ["sentiment-aaaaa-2-1"]
    story.go()
    assert (story.generation, story.job.status.gang.spares) == (1, None)
    story.edit(workers=story.job.spec.workers.model_copy(update={"spares": 1}))
    assert len(story.go().create) == 1


def test_a_spare_becomes_a_member_when_the_gang_grows() -> None:
    story = with_spares()
    story.edit(workers=story.job.spec.workers.model_copy(update={"nodes": 3}))
    story.worker_ends(0, 1)
    story.worker_ends(1, 1)
    story.go()
    assert members(story) == [f"sentiment-aaaaa-{rank}-1" for rank in range(3)]


def test_no_spare_is_made_of_a_spec_that_cannot_be_rendered() -> None:
    story = Story("workers: {spares: 1}")
    story.go()
    story.pods_start()
    story.go()
    story.problem = Problem("UnknownProfile", "gone")
    assert story.go().create == ()


def test_spares_leave_with_the_gang_when_it_is_suspended_and_stay_for_their_logs_when_it_ends() -> None:
    story = with_spares()
    story.workers_succeed()
    assert story.go().delete == ()
    assert story.phase == "Succeeded"
    assert story.order(2).action == "Finish"
    story = with_spares()
    story.edit(suspend=True)
    assert len(story.go().delete) == 3


def test_a_spare_that_never_ran_does_not_count_as_running() -> None:
    story = with_spares()
    story.report(2, generation=0, state=AgentState.IDLE)
    story.go()
    assert (story.job.status.gang.ready, story.job.status.gang.nodes) == (2, 2)
