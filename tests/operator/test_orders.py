"""What agents are told: from committed status and nothing else."""

import pytest

from finetune_api.contract import ExitCode
from finetune_api.protocol import Action, Checkpoint, Order
from finetune_operator.plan.orders import orders_for
from tests.operator.documents import a_job
from tests.operator.story import Story


def test_without_a_status_an_agent_waits() -> None:
    assert orders_for(a_job()).to("pod-1") == Order(action=Action.WAIT)


def test_before_the_members_are_committed_all_agents_wait_in_the_minted_generation() -> None:
    story = Story()
    story.go()
    story.pods_start()
    assert story.order(0) == Order(action=Action.WAIT, generation=1)


def test_members_run_with_their_rank_and_the_one_master() -> None:
    story = Story("workers: {processesPerNode: 4}").trains()
    assert [story.order(rank) for rank in (0, 1)] == [
        Order(
            action=Action.RUN,
            generation=1,
            rank=rank,
            nodes=2,
            processes_per_node=4,
            master_address="10.0.0.0",
            master_port=29500,
        )
        for rank in (0, 1)
    ]


def test_who_runs_is_told_that_the_job_has_committed_a_checkpoint_and_so_cannot_start_afresh() -> None:
    story = Story().trains()
    assert not story.order(0).has_checkpoint
    story.report(0, checkpoint=Checkpoint(20, "s3://bucket/job/checkpoints/step-20", 1, "2026-01-01T12:00:00Z"))
    story.go()
    assert story.order(0).has_checkpoint
    story.worker_ends(0, 1)
    story.go()
    story.wait(5)
    story.go()
    assert [(order.generation, order.has_checkpoint) for order in map(story.order, (0, 1))] == [(2, True)] * 2


def test_a_pod_that_is_no_member_waits() -> None:
    story = Story().trains()
    assert orders_for(story.job).to("stranger") == Order(action=Action.WAIT, generation=1)


def test_a_pod_that_was_replaced_waits_in_the_new_generation_and_so_ends_the_old_one() -> None:
    story = Story().trains()
    story.change(1, deleting=True)
    story.go()
    story.pods_start(1)
    story.go()
    assert orders_for(story.job).to("pod-2") == Order(action=Action.WAIT, generation=2)
    assert orders_for(story.job).to("pod-3").action == Action.RUN


ENDS = {"succeeded": lambda s: s.workers_succeed(), "failed": lambda s: s.worker_ends(0, ExitCode.BAD_DATA)}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_when_the_job_has_ended_every_agent_is_told_to_finish_member_or_not(end) -> None:
    story = Story().trains()
    end(story)
    story.go()
    assert {orders_for(story.job).to(uid).action for uid in ("pod-1", "pod-2", "stranger")} == {Action.FINISH}


def test_orders_do_not_depend_on_what_is_known_of_pods_or_on_what_is_asked_for_next() -> None:
    story = Story().trains()
    before = [orders_for(story.job).to(uid) for uid in ("pod-1", "pod-2")]
    story.vanish_all()
    story.heard.clear()
    story.edit(suspend=True, workers=story.job.spec.workers.model_copy(update={"nodes": 9}))
    assert [orders_for(story.job).to(uid) for uid in ("pod-1", "pod-2")] == before
