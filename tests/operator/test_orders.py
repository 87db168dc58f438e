"""What agents are told: from committed status and nothing else."""

from dataclasses import replace
from typing import Any

import pytest

from finetune_api import job as api
from finetune_api.contract import ExitCode
from finetune_api.protocol import Action, Checkpoint, CheckpointWish, Order
from finetune_operator.plan.orders import orders_for
from tests.operator.documents import SCRIPT, a_job
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
            checkpoint=CheckpointWish(interval_seconds=600),
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


def edit(story: Story, **checkpoint: Any) -> None:
    """A user edits spec.checkpoint (names as in YAML)."""
    story.edit(checkpoint=api.Checkpoint.model_validate(checkpoint))


def test_every_order_to_run_brings_what_is_wished_of_checkpoints_now() -> None:
    story = Story("checkpoint: {interval: {steps: 50}}").trains()
    assert story.order(0).checkpoint == CheckpointWish(interval_steps=50)
    edit(story, interval={"seconds": 30}, keep=5, uploadBytesPerSecond="1Mi")
    wish = CheckpointWish(interval_seconds=30, keep=5, upload_bytes_per_second=2**20)
    assert [story.order(rank).checkpoint for rank in (0, 1)] == [wish] * 2
    story.worker_ends(0, 1)
    story.go()
    story.wait(5)
    story.go()
    assert [(story.order(rank).generation, story.order(rank).checkpoint) for rank in (0, 1)] == [(2, wish)] * 2


def test_an_edit_of_the_checkpoints_begins_no_generation() -> None:
    story = Story().trains()
    before = story.order(0)
    edit(story, interval={"steps": 7})
    plan = story.go()
    assert (plan.create, plan.delete) == ((), ())
    assert story.order(0) == replace(before, checkpoint=CheckpointWish(interval_steps=7))


def test_what_was_allowed_before_there_were_pods_is_no_part_of_an_order() -> None:
    story = Story().trains()
    before = story.order(0)
    edit(story, resumeFrom="s3://checkpoints/team-a/somebody-else/job", stagingMemory="2Gi")
    assert story.order(0) == before


def test_nobody_tells_a_script_when_to_save() -> None:
    assert Story("", base=SCRIPT).trains().order(0).checkpoint is None


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
