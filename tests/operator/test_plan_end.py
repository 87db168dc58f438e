"""How a job ends, and what is left of it: success, deadlines, times to live, suspension."""

import pytest

from finetune_api.contract import ExitCode
from finetune_api.protocol import Checkpoint, Evaluation, Heartbeat, Metric, Model, Phase, Progress
from tests.operator.story import Story, document

CHECKPOINT = Checkpoint(step=50, uri="s3://checkpoints/x/step-50", size_bytes=1024, commit_time="2026-01-01T12:00:30Z")


def test_a_job_succeeds_when_every_member_has_and_shows_its_result() -> None:
    story = Story().trains()
    story.wait(90)
    story.report(
        0,
        progress=Progress(
            step=100, total_steps=100, epoch=2.0, loss=0.123456789, learning_rate=2e-5, tokens_per_second=5123.77
        ),
        evaluation=Evaluation(step=100, metrics=[Metric("accuracy", 0.7125)]),
        checkpoint=CHECKPOINT,
        model=Model("s3://checkpoints/x/model"),
    )
    story.workers_succeed()
    plan = story.go()
    assert (plan.create, plan.delete, plan.delete_job) == ((), (), False)
    assert story.status == document("""
      observedGeneration: 1
      phase: Succeeded
      startTime: "2026-01-01T12:00:00Z"
      completionTime: "2026-01-01T12:01:30Z"
      gang:
        generation: 1
        nodes: 2
        processesPerNode: 1
        ready: 0
        mintTime: "2026-01-01T12:00:00Z"
        startTime: "2026-01-01T12:00:00Z"
        masterAddress: 10.0.0.0
        masterPort: 29500
        members: [{rank: 0, pod: sentiment-aaaaa-0-1, uid: pod-1}, {rank: 1, pod: sentiment-aaaaa-1-1, uid: pod-2}]
        standIns: []
        avoidNodes: []
      progress: {step: 100, totalSteps: 100, percent: 100, epoch: 2.0, loss: 0.12346, learningRate: 2.0e-05, tokensPerSecond: 5123.8, updateTime: "2026-01-01T12:01:30Z"}
      evaluation: {step: 100, metrics: [{name: accuracy, value: "0.7125"}]}
      checkpoint: {step: 50, commitTime: "2026-01-01T12:00:30Z", bytes: 1024, uri: s3://checkpoints/x/step-50}
      model: {uri: s3://checkpoints/x/model}
      attempts: []
    """)
    assert story.say() == "Succeeded: trained 100 steps; the model is at s3://checkpoints/x/model"
    assert story.holds == {"Ready", "Complete"}
    assert [story.order(rank).action for rank in (0, 1)] == ["Finish", "Finish"]


def test_one_member_that_has_not_succeeded_is_enough_to_go_on() -> None:
    story = Story().trains()
    story.workers_succeed(0)
    story.go()
    assert story.phase == "Running"


def test_progress_of_rank_0_is_shown_with_its_share_and_expected_end() -> None:
    story = Story().trains()
    story.wait(10)
    story.report(0, progress=Progress(step=33, total_steps=100, loss=1.5, remaining_seconds=670))
    story.go()
    assert story.status["progress"] == document("""
      {step: 33, totalSteps: 100, percent: 33, loss: 1.5, estimatedCompletionTime: "2026-01-01T12:11:20Z", updateTime: "2026-01-01T12:00:10Z"}
    """)
    known = story.status["progress"]
    story.wait(5)
    story.go()
    assert story.status["progress"] == known, "the same progress is no news"


def test_progress_that_another_rank_claims_is_not_believed() -> None:
    story = Story().trains()
    story.report(1, progress=Progress(step=99), checkpoint=CHECKPOINT, model=Model("s3://evil/model"))
    story.go()
    assert {"progress", "checkpoint", "model"} & story.status.keys() == set()


def test_progress_of_a_former_generation_is_not_believed() -> None:
    story = Story().trains()
    story.worker_ends(0, ExitCode.STALE)
    story.go()
    story.report(0, progress=Progress(step=99))
    story.go()
    assert "progress" not in story.status


def test_progress_stays_in_sight_while_the_gang_recovers() -> None:
    story = Story().trains()
    story.report(0, progress=Progress(step=33, total_steps=100), checkpoint=CHECKPOINT)
    story.vanish(1)
    story.go()
    assert (story.phase, story.status["progress"]["step"], story.status["checkpoint"]["step"]) == ("Recovering", 33, 50)


def test_a_gang_whose_workers_load_their_model_is_starting() -> None:
    story = Story().trains()
    for rank in (0, 1):
        story.report(rank, heartbeat=Heartbeat(Phase.INITIALIZING))
    story.go()
    assert story.say() == "Starting: generation 1: the workers are initializing"
    assert story.holds == {"Reconciling"}


ENDS = {
    "a job that succeeded": lambda story: story.workers_succeed(),
    "a job that failed": lambda story: story.worker_ends(0, ExitCode.BAD_CONFIG),
}
LATER = {
    "a worker that fails": lambda story: story.worker_ends(1, 1),
    "a worker that trains": lambda story: story.workers_train(),
    "pods that vanish": lambda story: story.vanish_all(),
    "being suspended": lambda story: story.edit(suspend=True),
    "another size": lambda story: story.edit(workers=story.job.spec.workers.model_copy(update={"nodes": 7})),
    "a deadline": lambda story: story.edit(active_deadline_seconds=1),
    "years": lambda story: story.wait(1e8),
    "nobody heard": lambda story: story.heard.clear(),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("later", LATER.values(), ids=[f"is not changed by {name}" for name in LATER])
def test_the_end_is_final(end, later) -> None:
    story = Story().trains()
    end(story)
    story.go()
    before = story.job.status
    later(story)
    plan = story.look()
    assert (plan.status, plan.create, plan.delete, plan.delete_job) == (before, (), (), False)


def test_an_active_deadline_fails_the_job_and_is_looked_forward_to() -> None:
    story = Story("activeDeadlineSeconds: 600").trains()
    story.wait(100.5)
    assert story.go().look_again_seconds == 499.5
    story.wait(499.5)
    story.go()
    assert (story.phase, story.say()) == (
        "Failed",
        "DeadlineExceeded: ran for longer than activeDeadlineSeconds (600 s)",
    )


def test_an_active_deadline_does_not_run_before_the_first_start() -> None:
    story = Story("activeDeadlineSeconds: 600")
    story.go()
    story.wait(10000)
    assert story.go().look_again_seconds is None
    assert story.phase == "Pending"


def test_none_of_an_active_deadline_is_used_while_the_job_is_suspended_and_it_begins_anew_then() -> None:
    story = Story("activeDeadlineSeconds: 3600").trains()
    story.wait(600)
    story.edit(suspend=True)
    story.go()
    story.vanish_all()
    story.go()
    story.wait(86400)
    assert (story.go().look_again_seconds, story.phase) == (None, "Suspended")
    story.edit(suspend=False)
    story.go()
    story.recovers()
    story.wait(3599)
    assert (story.go().look_again_seconds, story.phase) == (1, "Running")
    story.wait(1)
    story.go()
    assert story.phase == "Failed"


WHEN_ALL_HAVE_DONE_THEIR_WORK = {
    "suspended": lambda story: story.edit(suspend=True),
    "over its deadline": lambda story: story.edit(active_deadline_seconds=1),
}


@pytest.mark.parametrize("asked", WHEN_ALL_HAVE_DONE_THEIR_WORK.values(), ids=WHEN_ALL_HAVE_DONE_THEIR_WORK.keys())
def test_work_that_is_done_when_it_is_looked_at_is_done(asked) -> None:
    story = Story().trains()
    story.wait(60)
    story.workers_succeed()
    asked(story)
    story.go()
    assert story.phase == "Succeeded"


def test_pods_and_job_live_on_after_the_end_as_long_as_they_are_told_to() -> None:
    story = Story("{podTTLSecondsAfterFinished: 100, ttlSecondsAfterFinished: 1000}").trains()
    story.workers_succeed()
    assert story.go().look_again_seconds == 100
    story.wait(40)
    plan = story.go()
    assert (plan.delete, plan.look_again_seconds) == ((), 60)
    story.wait(60)
    plan = story.go()
    assert [pod.rank for pod in plan.delete] == [0, 1]
    assert (plan.delete_job, plan.look_again_seconds) == (False, 900)
    assert story.go().delete == (), "a pod that is leaving is not deleted twice"
    story.wait(900)
    assert story.go().delete_job


def test_without_times_to_live_nothing_is_ever_deleted() -> None:
    story = Story().trains()
    story.workers_succeed()
    assert story.go().look_again_seconds is None
    story.wait(1e8)
    plan = story.go()
    assert (plan.delete, plan.delete_job, plan.look_again_seconds) == ((), False, None)


def test_a_time_to_live_of_nothing_deletes_at_once() -> None:
    story = Story("{podTTLSecondsAfterFinished: 0}").trains()
    story.workers_succeed()
    assert story.go().look_again_seconds == 0
    assert [pod.rank for pod in story.go().delete] == [0, 1]


# Suspension.


def test_suspending_deletes_the_pods_and_ends_the_generation_when_they_have_saved_and_left() -> None:
    story = Story().trains()
    story.report(0, checkpoint=CHECKPOINT)
    story.edit(suspend=True)
    plan = story.go()
    assert ([pod.rank for pod in plan.delete], plan.create) == ([0, 1], ())
    assert (story.generation, story.phase, story.say()) == (1, "Suspended", "Suspending: 2 pods are saving and leaving")
    assert story.holds == {"Suspended", "Reconciling"}
    assert [story.order(rank).generation for rank in (0, 1)] == [1, 1], "the agents may save in peace"
    story.vanish(0)
    plan = story.go()
    assert (plan.delete, story.generation) == ((), 1)
    assert story.say() == "Suspending: 1 pods are saving and leaving"
    story.vanish(1)
    plan = story.go()
    assert (plan.create, story.generation, story.job.status.gang.members) == ((), 2, [])
    assert (story.phase, story.holds) == ("Suspended", {"Suspended", "Ready"})
    assert story.say() == "Suspended: spec.suspend is true; no pod is kept"
    assert story.status["checkpoint"]["step"] == 50
    assert (story.restarts, story.attempts) == (0, [])
    assert story.go().status == plan.status, "nothing is minted twice"


def test_resuming_starts_the_next_generation_with_pods_of_new_names() -> None:
    story = Story().trains()
    story.edit(suspend=True)
    story.go()
    story.vanish_all()
    story.go()
    story.edit(suspend=False)
    story.go()
    assert [pod.name for pod in story.pods.values()] == ["sentiment-aaaaa-0-2", "sentiment-aaaaa-1-2"]
    assert story.recovers().generation == 2
    assert (story.restarts, story.attempts) == (0, [])


def test_a_job_that_is_created_suspended_has_no_pods_until_it_is_resumed() -> None:
    story = Story("suspend: true")
    plan = story.go()
    assert (plan.create, story.phase, story.generation, story.holds) == ((), "Suspended", 1, {"Suspended", "Ready"})
    story.edit(suspend=False)
    assert len(story.go().create) == 2
    assert story.generation == 1


def test_suspending_a_gang_that_is_not_complete_frees_its_names() -> None:
    story = Story()
    story.go()
    story.edit(suspend=True)
    story.go()
    assert (story.generation, story.job.status.gang.members) == (2, [])
    story.go()
    assert story.generation == 2
    story.edit(suspend=False)
    plan = story.go()
    assert [(place.rank, place.generation) for place in plan.create] == [(0, 2), (1, 2)]
    assert (story.restarts, story.attempts) == (0, [])


def test_resuming_while_the_pods_still_leave_waits_for_them_and_costs_no_restart() -> None:
    story = Story("recovery: {maxRestarts: 0}").trains()
    story.edit(suspend=True)
    story.go()
    story.edit(suspend=False)
    plan = story.go()
    assert (story.generation, plan.create, story.phase) == (1, (), "Suspended")
    story.vanish(0)
    story.go()
    story.vanish(1)
    plan = story.go()
    assert (story.generation, len(plan.create)) == (2, 2)
    assert (story.restarts, story.attempts) == (0, [])
    assert story.recovers().generation == 2


def test_a_resumed_job_has_the_size_that_spec_asks_for_then() -> None:
    story = Story().trains()
    story.edit(suspend=True)
    story.go()
    story.vanish_all()
    story.go()
    story.edit(suspend=False, workers=story.job.spec.workers.model_copy(update={"nodes": 3}))
    plan = story.go()
    assert (len(plan.create), story.job.status.gang.nodes) == (3, 3)


def test_pods_that_have_failed_do_not_keep_a_job_from_being_suspended_or_resumed() -> None:
    story = Story().trains()
    story.change(1, phase="Failed", reason="Evicted", disruption="TerminationByKubelet")
    story.edit(suspend=True)
    assert [pod.rank for pod in story.go().delete] == [0, 1], "no pod is kept"
    story.change(0, phase="Succeeded")
    story.go()
    assert story.say() == "Suspending: 2 pods are saving and leaving", (
        "what is left of them could be taken for what a new gang is like"
    )
    story.vanish_all()
    story.go()
    assert (story.holds, story.generation) == ({"Suspended", "Ready"}, 2)
    story.edit(suspend=False)
    assert len(story.go().create) == 2
    assert story.recovers().restarts == 0


# What the conditions mean.


def test_conditions_keep_the_time_of_their_last_change_and_follow_the_version_of_spec() -> None:
    story = Story().trains()
    story.wait(60)
    story.edit(checkpoint=story.job.spec.checkpoint)
    story.go()
    complete, ready = story.condition("Complete"), story.condition("Ready")
    assert (complete.last_transition_time, complete.observed_generation) == ("2026-01-01T12:00:00Z", 2)
    story.workers_succeed()
    story.go()
    assert story.condition("Complete").last_transition_time == "2026-01-01T12:01:00Z"
    assert story.condition("Ready").last_transition_time == ready.last_transition_time
    assert story.job.status.observed_generation == 2
