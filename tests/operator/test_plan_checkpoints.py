"""What status tells of checkpoints: how saving goes, where a gang started, and what that cost."""

from typing import Any

import pytest

from finetune_api.contract import ExitCode
from finetune_api.protocol import Checkpoint, Heartbeat, Phase, Progress, Resumed, ResumeSource, Saves
from tests.operator.story import Story, document

NO_CONDITION = ("False", "NotDelayed", "no save fails or has to wait")
PUT_OFF = (
    "saves are due sooner than the store takes them: one was put off because those before it are still on their way;"
    " status.saves.recommendedIntervalSeconds is the interval that would lose least"
)
REFUSED = "s3://checkpoints: 403 AccessDenied"


def commit(step: int, time: str = "2026-01-01T12:00:30Z") -> Checkpoint:
    return Checkpoint(step=step, uri=f"s3://checkpoints/x/step-{step}", size_bytes=1024, commit_time=time)


def saves(**changes: Any) -> Saves:
    return Saves(**{"stall_seconds": 0.123456, "commit_seconds": 7.0, "recommended_interval_seconds": 41.6} | changes)


def failing(since: str = "2026-01-01T12:00:10Z", message: str = REFUSED, reason: str = "NoPermission") -> Saves:
    return saves(failing_since=since, reason=reason, message=message)


def told(story: Story, kind: str) -> tuple[str, str, str]:
    condition = story.condition(kind)
    return condition.status, condition.reason, condition.message


def says(story: Story, **levels: Any) -> Story:
    story.report(0, **levels)
    story.go()
    return story


# How saving goes.


def test_a_save_under_way_is_shown_with_what_saves_cost_and_how_often_they_should_be() -> None:
    story = says(Story().trains(), saves=saves(saving_step=50, saving_since="2026-01-01T12:00:20.5+00:00"))
    assert story.status["saves"] == document("""
      {savingStep: 50, savingSince: "2026-01-01T12:00:20Z", putOff: 0, reason: "", message: "",
       stallSeconds: 0.1235, commitSeconds: 7.0, recommendedIntervalSeconds: 42}
    """)
    assert told(story, "CheckpointsDelayed") == NO_CONDITION


def test_what_another_rank_says_of_saving_is_not_believed() -> None:
    story = Story().trains()
    story.report(1, saves=failing(), resumed=Resumed(9, ResumeSource.STORAGE, "nonsense"))
    story.go()
    assert {"saves", "resumed"} & story.status.keys() == set()
    assert told(story, "CheckpointsDelayed") == NO_CONDITION


def test_a_store_that_refuses_is_told_with_since_when_and_why_and_training_goes_on() -> None:
    story = Story().trains()
    story.wait(30)
    says(story, saves=failing())
    assert told(story, "CheckpointsDelayed") == (
        "True",
        "NoPermission",
        f"nothing could be committed since 2026-01-01T12:00:10Z: {REFUSED}",
    )
    assert story.condition("CheckpointsDelayed").last_transition_time == "2026-01-01T12:00:30Z"
    assert story.holds == {"Ready", "CheckpointsDelayed"}
    assert story.status["saves"]["failingSince"] == "2026-01-01T12:00:10Z"
    says(story, saves=saves(), checkpoint=commit(50))
    assert told(story, "CheckpointsDelayed") == NO_CONDITION


def test_the_condition_keeps_the_words_it_began_with_and_status_has_the_newest() -> None:
    story = says(Story().trains(), saves=failing())
    first = told(story, "CheckpointsDelayed")
    says(story, saves=failing(message="s3://checkpoints: 403 AccessDenied (attempt 17)"))
    assert told(story, "CheckpointsDelayed") == first
    assert story.status["saves"]["message"].endswith("(attempt 17)")
    says(story, saves=failing(reason="StorageUnavailable", message="503"))
    assert told(story, "CheckpointsDelayed")[1:] == (
        "StorageUnavailable",
        "nothing could be committed since 2026-01-01T12:00:10Z: 503",
    )
    says(story, saves=failing("2026-01-01T12:30:00Z"), checkpoint=commit(50, "2026-01-01T12:20:00Z"))
    assert told(story, "CheckpointsDelayed")[2].startswith("nothing could be committed since 2026-01-01T12:30:00Z")


REASONS = ["", "not a word", "x" * 65, "403", "Säule"]


@pytest.mark.parametrize("reason", REASONS, ids=[f"{reason[:12]!r} is no reason" for reason in REASONS])
def test_a_reason_that_a_condition_cannot_have_becomes_one(reason: str) -> None:
    story = says(Story().trains(), saves=failing(reason=reason))
    assert told(story, "CheckpointsDelayed")[:2] == ("True", "SaveFailed")


def test_a_save_that_is_put_off_is_told_until_saves_have_room_again() -> None:
    story = Story().trains()
    steps = {
        "a save is on its way": saves(saving_step=10),
        "the next is put off": saves(saving_step=10, put_off=1),
        "and the next": saves(saving_step=10, put_off=2),
        "the first is committed": saves(put_off=2),
        "another has its turn": saves(saving_step=40),
        "and the one after it is put off again": saves(saving_step=40, put_off=1),
        "another has its turn and takes as long as it may": saves(saving_step=60),
        "it is committed, and none was put off": saves(),
        "a save is on its way again": saves(saving_step=70),
    }
    seen = [says(story, saves=level).condition("CheckpointsDelayed").status for level in steps.values()]
    assert dict(zip(steps, seen, strict=True)) == dict(
        zip(steps, ["False", "True", "True", "True", "True", "True", "True", "False", "False"], strict=True)
    )


def test_a_save_that_is_put_off_says_what_to_do_in_words_that_stand_still() -> None:
    story = says(Story().trains(), saves=saves(saving_step=10, put_off=1))
    first = told(story, "CheckpointsDelayed")
    assert first == (
        "True",
        "SavePutOff",
        PUT_OFF,
    )
    assert told(says(story, saves=saves(saving_step=10, put_off=9)), "CheckpointsDelayed") == first


def test_a_generation_that_ends_has_no_save_on_its_way_any_more_but_a_store_that_refuses_still_does() -> None:
    story = says(
        Story().trains(),
        saves=Saves(
            saving_step=50, put_off=2, failing_since="2026-01-01T12:00:10Z", reason="NoPermission", message=REFUSED
        ),
    )
    story.vanish(1)
    story.go()
    assert story.generation == 2
    assert story.status["saves"] == document(f"""
      {{putOff: 0, failingSince: "2026-01-01T12:00:10Z", reason: NoPermission, message: "{REFUSED}"}}
    """)
    assert told(story, "CheckpointsDelayed")[:2] == ("True", "NoPermission")
    story.recovers()
    assert told(story, "CheckpointsDelayed")[0] == "True", "nobody has said otherwise"
    says(story, saves=failing("2026-01-01T12:05:00Z"))
    assert story.status["saves"]["failingSince"] == "2026-01-01T12:00:10Z", "nothing was committed in between"
    says(story, saves=failing("2026-01-01T12:05:00Z"), checkpoint=commit(60, "2026-01-01T12:03:00Z"))
    assert story.status["saves"]["failingSince"] == "2026-01-01T12:05:00Z"


AT_REST = {
    "succeeds": lambda s: s.workers_succeed(),
    "fails": lambda s: s.worker_ends(0, ExitCode.BAD_DATA),
    "is suspended": lambda s: (s.edit(suspend=True), s.go(), s.vanish_all()),
}


@pytest.mark.parametrize("end", AT_REST.values(), ids=AT_REST.keys())
def test_nothing_is_delayed_once_a_job(end) -> None:
    story = says(Story().trains(), saves=saves(saving_step=5, put_off=1, failing_since="2026-01-01T12:00:10Z"))
    assert "CheckpointsDelayed" in story.holds
    end(story)
    story.go()
    story.go()
    assert told(story, "CheckpointsDelayed") == NO_CONDITION
    assert story.status["saves"] == document("""
      {putOff: 0, reason: "", message: "", stallSeconds: 0.1235, commitSeconds: 7.0, recommendedIntervalSeconds: 42}
    """)


# Where a gang starts, and what that cost.


def ends_at(story: Story, step: int, *, initializing: bool = False) -> None:
    """The gang dies at a step, and its pods start the next generation."""
    phase = Phase.INITIALIZING if initializing else Phase.TRAINING
    for rank in (0, 1):
        story.report(rank, heartbeat=Heartbeat(phase, step))
    story.wait(100)
    story.worker_ends(1, signal=11)
    story.go()
    story.wait(1)
    story.go()
    story.recovers()


def test_where_a_gang_started_is_shown() -> None:
    story = Story().trains()
    ends_at(story, 120)
    says(story, resumed=Resumed(100, ResumeSource.MEMORY, skipped_samples=64, rollbacks=1))
    assert story.status["resumed"] == document("""
      {generation: 2, step: 100, source: Memory, fallback: "", rollbacks: 1, skippedSamples: 64}
    """)
    assert story.condition("CheckpointFallback").status == "False"


def losses(story: Story) -> list[tuple[int | None, int | None]]:
    return [(attempt.last_step, attempt.lost_steps) for attempt in story.job.status.attempts]


def test_lost_steps_are_known_when_the_next_generation_has_found_its_start() -> None:
    story = says(Story().trains(), resumed=Resumed(0, ResumeSource.START))
    ends_at(story, 120)
    assert losses(story) == [(120, None)]
    says(story, resumed=Resumed(100, ResumeSource.STORAGE))
    assert losses(story) == [(120, 20)]
    ends_at(story, 130)
    says(story, resumed=Resumed(130, ResumeSource.MEMORY))
    assert losses(story) == [(120, 20), (130, 0)]


def test_a_generation_that_never_trained_loses_nothing_and_the_one_before_it_is_measured_by_the_one_after() -> None:
    story = Story().trains()
    ends_at(story, 120)
    ends_at(story, 0, initializing=True)
    says(story, resumed=Resumed(80, ResumeSource.STORAGE))
    assert losses(story) == [(120, 40), (None, None)]


def test_a_generation_that_died_right_after_it_resumed_has_lost_nothing_by_itself() -> None:
    story = Story().trains()
    ends_at(story, 120)
    says(story, resumed=Resumed(100, ResumeSource.STORAGE))
    ends_at(story, 0, initializing=True)
    says(story, resumed=Resumed(100, ResumeSource.STORAGE))
    assert losses(story) == [(120, 20), (100, 0)]


def test_progress_tells_the_last_step_of_a_gang_whose_heartbeat_nobody_has_heard() -> None:
    story = Story().trains()
    story.wait(10)
    story.report(0, heartbeat=None, progress=Progress(step=55))
    story.go()
    story.heard.clear()
    story.vanish_all()
    story.go()
    assert losses(story) == [(55, None)]


def test_progress_of_a_generation_before_is_no_step_of_this_one() -> None:
    story = Story().trains()
    story.wait(10)
    says(story, progress=Progress(step=55))
    ends_at(story, 55)
    ends_at(story, 0, initializing=True)
    assert losses(story) == [(55, None), (None, None)]


def test_a_script_that_never_says_where_it_starts_has_no_lost_steps() -> None:
    story = Story().trains()
    ends_at(story, 120)
    story.workers_succeed()
    story.go()
    assert losses(story) == [(120, None)]


# Torn checkpoints.

TORN = "step 100 cannot be read: rank-00001.safetensors chunk 3 has another SHA-256"


def test_a_torn_checkpoint_is_told_until_there_is_a_newer_one_and_stays_in_the_attempt() -> None:
    story = says(Story().trains(), checkpoint=commit(100))
    ends_at(story, 120)
    says(story, resumed=Resumed(50, ResumeSource.STORAGE, TORN))
    assert told(story, "CheckpointFallback") == (
        "True",
        "CheckpointUnreadable",
        f"generation 2 started after step 50: {TORN}",
    )
    assert "Ready" in story.holds, "training goes on"
    says(story, progress=Progress(step=60))
    assert story.condition("CheckpointFallback").status == "True"
    says(story, checkpoint=commit(75, "2026-01-01T12:10:00Z"))
    assert told(story, "CheckpointFallback") == (
        "False",
        "NoFallback",
        "the gang started from the newest checkpoint, or there is a newer one by now",
    )
    says(story, progress=Progress(step=80))
    assert story.condition("CheckpointFallback").status == "False"
    ends_at(story, 90)
    attempt = story.job.status.attempts[-1]
    assert (attempt.generation, attempt.fallback) == (2, TORN)
    assert story.job.status.attempts[0].fallback is None
    says(story, resumed=Resumed(75, ResumeSource.STORAGE))
    assert (story.status["resumed"]["fallback"], story.condition("CheckpointFallback").status) == ("", "False")


def test_a_fallback_is_told_on_while_the_next_generation_has_not_found_its_start() -> None:
    story = Story().trains()
    ends_at(story, 120)
    says(story, resumed=Resumed(50, ResumeSource.STORAGE, TORN))
    ends_at(story, 60)
    assert story.condition("CheckpointFallback").status == "True"
    says(story, resumed=Resumed(50, ResumeSource.STORAGE))
    assert story.condition("CheckpointFallback").status == "False"
