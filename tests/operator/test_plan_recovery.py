"""What the end of a gang costs, and gangs that are held until the store or a person lets them go on."""

import pytest

from finetune_api.contract import ExitCode
from finetune_api.protocol import Heartbeat, Phase, Resumed, ResumeSource
from tests.operator.story import Story

REFUSED = "s3://checkpoints/team-a: 403 AccessDenied; the secret's user needs s3:PutObject there"
GONE = "s3://checkpoints/team-a/HEAD: it is gone"
AWAY = "s3://checkpoints: 503 SlowDown for 10 minutes"
HELD = {
    "without permission": (ExitCode.NO_PERMISSION, "NoPermission", REFUSED, {"Stalled"}),
    "without its checkpoints": (ExitCode.CHECKPOINTS_LOST, "CheckpointsLost", GONE, {"Stalled"}),
    "without the store": (ExitCode.STORAGE_UNAVAILABLE, "StorageUnavailable", AWAY, {"Reconciling"}),
}
held = pytest.mark.parametrize(("code", "reason", "message", "holds"), HELD.values(), ids=HELD.keys())


def initializes(story: Story) -> None:
    """All members run the committed generation, and none trains yet."""
    story.workers_train()
    for rank in range(len(story.job.status.gang.members)):
        story.report(rank, heartbeat=Heartbeat(Phase.INITIALIZING))
    story.go()


def is_tried_again(story: Story, code: int, message: str) -> None:
    """The time of the next try has come, and it ends as the last one did."""
    wait = story.look().look_again_seconds
    assert wait is not None
    story.wait(wait)
    story.go()
    initializes(story)
    story.worker_ends(0, code, message=message)
    story.worker_ends(1, 1)
    story.go()


@held
def test_a_gang_is_held_told_with_since_when_and_tried_again_in_place(
    code: int, reason: str, message: str, holds: set[str]
) -> None:
    story = Story("recovery: {maxRestarts: 0}").trains()
    story.wait(100)
    story.worker_ends(0, code, message=message)
    story.worker_ends(1, 1)
    plan = story.go()
    assert (plan.create, plan.delete, plan.look_again_seconds) == ((), (), 15)
    assert (story.phase, story.generation, story.restarts) == ("Recovering", 2, 0)
    assert story.job.status.gang.members == []
    assert [(order.action, order.generation) for order in map(story.order, (0, 1))] == [("Wait", 2)] * 2, (
        "no worker runs"
    )
    assert story.holds == holds
    assert story.say() == f"{reason}: {message}; so since 2026-01-01T12:01:40Z, next try at 2026-01-01T12:01:55Z"
    story.wait(7)
    assert story.go().status.conditions == plan.status.conditions, "words that stand still"
    story.wait(8)
    plan = story.go()
    assert (plan.create, [order.action for order in map(story.order, (0, 1))]) == ((), ["Run", "Run"])
    assert story.say() == f"{reason}: {message}; so since 2026-01-01T12:01:40Z, generation 2 tries again"
    initializes(story)
    assert story.holds == holds, "starting is not yet healing"
    story.workers_train()
    story.go()
    assert (story.phase, story.holds, story.restarts) == ("Running", {"Ready"}, 0)


@held
def test_a_held_gang_is_tried_ever_more_slowly_for_ever_and_never_fails(
    code: int, reason: str, message: str, holds: set[str]
) -> None:
    story = Story("recovery: {maxRestarts: 0}").trains()
    story.wait(100)
    story.worker_ends(0, code, message=message)
    story.worker_ends(1, 1)
    story.go()
    stalled = story.condition("Stalled")
    waits = []
    for _ in range(200):
        waits.append(story.look().look_again_seconds)
        is_tried_again(story, code, message)
        assert story.condition("Stalled") == stalled.model_copy(update={"message": story.condition("Stalled").message})
    assert waits[:8] == [15, 15, 30, 60, 120, 240, 300, 300]
    assert set(waits[8:]) == {300}
    assert (story.phase, story.generation, story.restarts, story.holds) == ("Recovering", 202, 0, holds)
    assert "so since 2026-01-01T12:01:40Z" in story.say()


@held
def test_days_of_trying_do_not_push_out_what_happened_before(
    code: int, reason: str, message: str, holds: set[str]
) -> None:
    story = Story().trains()
    story.wait(100)
    story.worker_ends(0, signal=11)
    story.worker_ends(1, 1)
    story.go()
    story.recovers()
    story.wait(100)
    story.worker_ends(0, code, message=message)
    story.worker_ends(1, 1)
    story.go()
    for _ in range(20):
        is_tried_again(story, code, message)
    attempts = [(attempt.generation, attempt.reason) for attempt in story.job.status.attempts]
    assert attempts == [(1, "WorkerKilled"), (2, reason), (22, reason)]


@held
def test_a_gang_that_got_further_in_between_begins_a_new_row(
    code: int, reason: str, message: str, holds: set[str]
) -> None:
    story = Story().trains()
    story.wait(100)
    story.report(0, resumed=Resumed(0, ResumeSource.START), heartbeat=Heartbeat(Phase.TRAINING, 50))
    story.worker_ends(0, code, message=message)
    story.worker_ends(1, 1)
    story.go()
    for _ in range(5):
        is_tried_again(story, code, message)
    story.wait(300)
    story.recovers()
    story.wait(3600)
    story.report(0, heartbeat=Heartbeat(Phase.TRAINING, 900))
    story.worker_ends(0, code, message=message)
    story.worker_ends(1, 1)
    assert story.go().look_again_seconds == 15
    assert [attempt.last_step for attempt in story.job.status.attempts] == [50, None, 900]


def test_what_a_gang_was_held_for_is_forgotten_when_it_fails_for_another_reason() -> None:
    story = Story().trains()
    story.wait(100)
    story.worker_ends(0, ExitCode.NO_PERMISSION, message=REFUSED)
    story.worker_ends(1, 1)
    story.go()
    story.wait(15)
    story.recovers()
    story.wait(100)
    story.worker_ends(0, signal=11)
    story.worker_ends(1, 1)
    story.go()
    assert (story.say(), story.holds) == ("Starting: generation 3 is being started", {"Reconciling"})


def test_a_held_gang_that_is_suspended_and_resumed_starts_without_a_stale_complaint() -> None:
    story = Story().trains()
    story.wait(100)
    story.worker_ends(0, ExitCode.NO_PERMISSION, message=REFUSED)
    story.worker_ends(1, 1)
    story.go()
    story.wait(15)
    story.recovers()
    story.edit(suspend=True)
    story.go()
    story.vanish_all()
    story.go()
    story.edit(suspend=False)
    story.go()
    story.pods_start()
    story.go()
    assert (story.say(), story.holds) == ("Starting: generation 3 is being started", {"Reconciling"})


def test_a_held_gang_still_keeps_to_the_deadline_that_its_user_has_set() -> None:
    story = Story("activeDeadlineSeconds: 600").trains()
    story.worker_ends(0, ExitCode.NO_PERMISSION, message=REFUSED)
    story.worker_ends(1, 1)
    story.go()
    story.wait(600)
    story.go()
    assert story.say().startswith("DeadlineExceeded")


def test_a_pod_that_is_lost_while_its_gang_is_held_is_replaced_meanwhile() -> None:
    story = Story().trains()
    story.wait(100)
    story.worker_ends(0, ExitCode.NO_PERMISSION, message=REFUSED)
    story.worker_ends(1, 1)
    story.go()
    story.vanish(1)
    plan = story.go()
    assert [place.rank for place in plan.create] == [1]
    assert story.say().startswith("NoPermission: ")


# Going back.


def test_going_back_starts_the_next_generation_in_place_is_counted_and_uses_no_restart() -> None:
    story = Story("recovery: {maxRestarts: 0}").trains()
    story.wait(100)
    story.report(0, heartbeat=Heartbeat(Phase.TRAINING, 120))
    story.worker_ends(0, ExitCode.ROLLED_BACK, message="step 120: the loss is NaN")
    story.worker_ends(1, ExitCode.ROLLED_BACK, message="step 120: the loss is NaN")
    plan = story.go()
    assert (plan.create, plan.delete, story.phase, story.generation) == ((), (), "Recovering", 2)
    assert len(story.job.status.gang.members) == 2
    counted = {"reason": "RolledBack", "count": 1, "used": 0, "lastStep": 120}
    assert story.status["restarts"] == {"total": 1, "byReason": [counted]}
    story.recovers()
    story.report(0, resumed=Resumed(100, ResumeSource.STORAGE, skipped_samples=1280, rollbacks=1))
    story.go()
    attempt = story.job.status.attempts[0]
    assert (attempt.reason, attempt.message) == ("RolledBack", "step 120: the loss is NaN")
    assert (attempt.exit_code, attempt.last_step, attempt.lost_steps) == (79, 120, 20)
    assert (story.job.status.resumed.rollbacks, story.job.status.resumed.skipped_samples) == (1, 1280)


def test_going_back_between_failures_neither_uses_nor_refills_the_budget() -> None:
    story = Story("recovery: {maxRestarts: 1, windowSeconds: 3600}").trains()
    for code in (ExitCode.STALE, ExitCode.ROLLED_BACK):
        story.wait(100)
        story.worker_ends(0, code)
        story.worker_ends(1, 1)
        story.go()
        story.wait(1)
        story.recovers()
    assert story.status["restarts"] == {
        "total": 2,
        "byReason": [
            {"reason": "RolledBack", "count": 1, "used": 0, "lastStep": 1},
            {"reason": "Stale", "count": 1, "used": 1, "windowStart": "2026-01-01T12:01:40Z", "lastStep": 1},
        ],
    }
    story.worker_ends(0, ExitCode.STALE)
    story.worker_ends(1, 1)
    story.go()
    assert story.say().startswith("RestartsExhausted")


def test_numbers_that_going_back_does_not_mend_fail_the_job() -> None:
    story = Story().trains()
    story.worker_ends(
        0, ExitCode.NUMERIC, message="rolled back 3 times, and step 120 is NaN again; lower the learning rate"
    )
    story.go()
    assert story.say() == "NumericFailure: rolled back 3 times, and step 120 is NaN again; lower the learning rate"
    assert (story.phase, story.restarts) == ("Failed", 0)
