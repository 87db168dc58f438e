"""Where a job's time goes: every second is accounted for once, whoever looks and however often."""

import pytest

from finetune_api.protocol import Heartbeat, Phase, Progress, Resumed, ResumeSource, Saves
from tests.operator.documents import SCRIPT
from tests.operator.story import Story, document


def begins(story: Story, step: int = 0) -> None:
    """Node 0 has found where it starts."""
    source = ResumeSource.STORAGE if step else ResumeSource.START
    story.report(0, resumed=Resumed(step, source))
    story.go()


def reaches(story: Story, step: int, *, seconds: float, stall: float = 0.0) -> None:
    """After some seconds more, so many steps are done, and training has stood still for so long in this generation."""
    story.wait(seconds)
    for rank in (0, 1):
        story.report(rank, heartbeat=Heartbeat(Phase.TRAINING, step))
    story.report(0, progress=Progress(step=step), saves=Saves(total_stall_seconds=stall or None))
    story.go()


def fails(story: Story, *, seconds: float) -> None:
    story.wait(seconds)
    for rank in (0, 1):
        story.worker_ends(rank, signal=11)
    story.go()
    story.workers_train()
    story.go()


def started(base: str | None = None) -> Story:
    """A job whose gang was complete 30 seconds ago."""
    story = Story() if base is None else Story(base=base)
    story.go()
    story.pods_start()
    story.go()
    story.workers_train()
    story.wait(30)
    return story


def test_every_second_of_a_life_is_accounted_for() -> None:
    story = started()
    begins(story)
    reaches(story, 100, seconds=200, stall=2.5)
    reaches(story, 150, seconds=103, stall=5.5)
    fails(story, seconds=7)
    story.wait(13)
    begins(story, step=120)
    reaches(story, 130, seconds=20, stall=1.0)
    story.wait(4)
    story.workers_succeed()
    story.go()
    assert story.status["goodput"] == document("""
      percent: 69.1
      productiveSeconds: 260.5
      lostSeconds: {startup: 30.0, recovery: 20.0, recomputation: 60.0, checkpoint: 6.5}
      until: "2026-01-01T12:06:17Z"
      stepSeconds: 2.0
      stalledSeconds: 1.0
    """), "30 steps of 2 s were done again"
    assert story.status["completionTime"] == "2026-01-01T12:06:17Z"


def test_what_has_to_be_done_again_is_counted_once() -> None:
    story = started()
    begins(story)
    reaches(story, 100, seconds=100)
    for _ in range(3):
        fails(story, seconds=61)  # no quick one, which would have to wait
        begins(story, step=90)
        reaches(story, 95, seconds=5)
        reaches(story, 100, seconds=5)
    assert story.status["goodput"]["lostSeconds"]["recomputation"] == 30.0
    assert story.status["goodput"]["productiveSeconds"] == 100.0


def test_looking_often_or_seldom_gives_the_same() -> None:
    sums = []
    for looks in (1, 11):
        story = started()
        begins(story)
        for look in range(looks):
            story.go()
            story.go()
            reaches(story, (look + 1) * 60, seconds=420 / looks)
        story.go()
        sums.append(story.status["goodput"]["productiveSeconds"])
    assert sums == [420.0, pytest.approx(420.0, abs=1.0)], "status knows whole seconds"


def test_a_failed_job_has_lost_what_came_after_its_last_progress() -> None:
    story = started()
    begins(story)
    reaches(story, 50, seconds=100)
    story.wait(40)
    story.worker_ends(0, 65, message="bad")
    story.go()
    goodput = story.status["goodput"]
    assert (story.phase, goodput["productiveSeconds"], goodput["lostSeconds"]["recovery"]) == ("Failed", 100.0, 40.0)


def test_a_suspended_job_loses_no_time() -> None:
    story = started()
    begins(story)
    reaches(story, 50, seconds=100)
    story.edit(suspend=True)
    story.go()
    story.vanish_all()
    story.wait(5)
    story.go()
    assert "until" not in story.status["goodput"]
    story.wait(86400)
    story.edit(suspend=False)
    story.go()
    story.pods_start()
    story.go()
    story.workers_train()
    story.wait(25)
    begins(story, step=50)
    assert story.status["goodput"]["lostSeconds"] == {
        "startup": 30.0,
        "recovery": 25.0,
        "recomputation": 0.0,
        "checkpoint": 0.0,
    }
    assert story.status["goodput"]["percent"] == 64.5


def test_a_script_does_not_tell_when_it_begins_to_train() -> None:
    story = started(SCRIPT)
    reaches(story, 50, seconds=100)
    assert "goodput" not in story.status


def test_a_generation_that_never_trained_is_part_of_the_recovery() -> None:
    story = started()
    begins(story)
    reaches(story, 50, seconds=100)
    fails(story, seconds=5)
    fails(story, seconds=10)
    story.wait(20)
    story.recovers()
    begins(story, step=50)
    lost = story.status["goodput"]["lostSeconds"]
    assert (lost["startup"], lost["recovery"]) == (30.0, 35.0)
