"""What a gang does about failures: which one is the cause, what it costs, and when to give up."""

from dataclasses import replace

import pytest

from finetune_api.contract import ExitCode
from finetune_api.protocol import AgentState, Checkpoint, Exit, Heartbeat, Memory, Phase
from finetune_operator.plan.observation import NewPod
from tests.operator.documents import SCRIPT
from tests.operator.story import RUNNING, Story, document

OOM_NOW = replace(RUNNING, last_exit_code=137, last_exit_reason="OOMKilled", restart_count=1)


def test_a_worker_that_fails_ends_its_generation_and_the_same_pods_start_the_next_one() -> None:
    story = Story().trains()
    story.wait(100)
    story.worker_ends(1, 1, message="ValueError: no")
    story.wait(0.2)
    story.worker_ends(0, 1, message="RuntimeError: connection reset by peer")
    plan = story.go()
    assert (plan.create, plan.delete) == ((), ())
    assert story.status == document("""
      observedGeneration: 1
      phase: Recovering
      startTime: "2026-01-01T12:00:00Z"
      gang:
        generation: 2
        nodes: 2
        processesPerNode: 1
        ready: 0
        mintTime: "2026-01-01T12:01:40Z"
        startTime: "2026-01-01T12:01:40Z"
        masterAddress: 10.0.0.0
        masterPort: 29500
        members: [{rank: 0, pod: sentiment-aaaaa-0-1, uid: pod-1}, {rank: 1, pod: sentiment-aaaaa-1-1, uid: pod-2}]
        standIns: []
        avoidNodes: []
      restarts:
        total: 1
        byReason: [{reason: WorkerFailed, count: 1, used: 1, windowStart: "2026-01-01T12:01:40Z", lastStep: 1}]
      attempts:
      - generation: 1
        startTime: "2026-01-01T12:00:00Z"
        endTime: "2026-01-01T12:01:40Z"
        reason: WorkerFailed
        message: "rank 1 ended with exit code 1: ValueError: no"
        pod: sentiment-aaaaa-1-1
        node: node-1
        rank: 1
        exitCode: 1
        lastStep: 1
    """)
    assert story.holds == {"Reconciling"}
    story.workers_train()
    story.go()
    assert (story.phase, story.generation) == ("Running", 2)


def test_a_lone_python_error_may_be_an_echo_so_the_others_get_a_second_to_report() -> None:
    story = Story().trains()
    story.worker_ends(0, 1, message="RuntimeError: connection reset by peer")
    plan = story.go()
    assert (story.generation, plan.look_again_seconds) == (1, 1.0)
    story.wait(0.4)
    assert story.go().look_again_seconds == pytest.approx(0.6)
    story.worker_ends(1, signal=11)
    story.go()
    assert (story.generation, story.attempts) == (2, ["WorkerKilled"])
    assert story.job.status.attempts[0].message == "rank 1 ended by signal SIGSEGV"


def test_a_lone_python_error_is_believed_after_a_second() -> None:
    story = Story().trains()
    story.worker_ends(0, 1)
    story.go()
    story.wait(1.0)
    story.go()
    assert (story.generation, story.attempts) == (2, ["WorkerFailed"])


ABORT = "terminate called after throwing an instance of 'c10::DistBackendError'"
GLOO = "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"


def test_a_broken_collective_alone_is_believed_when_its_peer_has_said_nothing_for_five_seconds() -> None:
    story = Story().trains()
    story.worker_ends(0, 1, message=GLOO)
    assert story.go().look_again_seconds == 5.0
    story.wait(4.9)
    story.go()
    assert story.generation == 1
    story.change(1, phase="Failed", reason="Evicted")
    story.go()
    assert story.attempts == ["PodFailed"], "the kubelet was slower than the peer"
    story = Story().trains()
    story.worker_ends(0, 1, message=GLOO)
    story.wait(5.0)
    story.go()
    assert story.attempts == ["CollectiveFailed"]


def test_on_one_node_too_the_echo_waits_for_its_cause() -> None:
    story = Story("workers: {processesPerNode: 2}", nodes=1).trains()
    echo = Exit(1, 0, None, 6, "", "[rank0] ... ProcessGroupNCCL's watchdog got stuck")
    story.report(0, generation=1, state=AgentState.FAILED, exits=[echo])
    assert story.go().look_again_seconds == 5.0
    story.report(0, exits=[echo, Exit(1, 1, 1, None, "ValueError: no")])
    story.go()
    assert [(attempt.reason, attempt.rank) for attempt in story.job.status.attempts] == [("WorkerFailed", 1)]


CAUSES = {
    "a Python error heard first is the cause of one heard later": (
        lambda s: (s.worker_ends(1, 1), s.wait(0.1), s.worker_ends(0, 1)),
        ("WorkerFailed", 1),
    ),
    "a signal is the cause of a Python error heard before it": (
        lambda s: (s.worker_ends(1, 1), s.wait(0.1), s.worker_ends(0, signal=7)),
        ("WorkerKilled", 0),
    ),
    "what the trainer says is the cause of a signal": (
        lambda s: (s.worker_ends(1, signal=6), s.worker_ends(0, ExitCode.STALE)),
        ("Stale", 0),
    ),
    "an abort over a broken collective is the echo of a Python error heard after it": (
        lambda s: (s.worker_ends(0, signal=6, message=ABORT), s.wait(0.1), s.worker_ends(1, 1, message="ValueError")),
        ("WorkerFailed", 1),
    ),
    "an exception over one too": (
        lambda s: (s.worker_ends(0, 1, message=GLOO), s.wait(0.1), s.worker_ends(1, 1, message="ValueError")),
        ("WorkerFailed", 1),
    ),
    "an abort for any other reason is the cause of a Python error": (
        lambda s: (s.worker_ends(0, signal=6, message="free(): invalid pointer"), s.worker_ends(1, 1)),
        ("WorkerKilled", 0),
    ),
    "a name of a collective library in a program's own error is no broken collective": (
        lambda s: (s.worker_ends(0, 1, message="ValueError: no backend nccl"), s.wait(0.1), s.worker_ends(1, 1)),
        ("WorkerFailed", 0),
    ),
    "of broken collectives alone the first is told": (
        lambda s: (s.worker_ends(1, 1, message=GLOO), s.wait(0.1), s.worker_ends(0, signal=6, message=ABORT)),
        ("CollectiveFailed", 1),
    ),
    "a wrong world size is told by its name": (lambda s: s.worker_ends(0, ExitCode.WRONG_WORLD), ("WrongWorldSize", 0)),
    "a stale incarnation is told by its name": (lambda s: s.worker_ends(0, ExitCode.STALE), ("Stale", 0)),
    "a pod that went away is the cause of what its peers say": (
        lambda s: (s.worker_ends(1, ExitCode.STALE), s.change(0, deleting=True)),
        ("PodDeleted", None),
    ),
    "a pod that failed is told with the kubelet's words": (
        lambda s: s.change(0, phase="Failed", reason="Evicted", message="The node was low on resource: memory."),
        ("PodFailed", None),
    ),
    "a container killed at its memory limit is the cause of a lost peer": (
        lambda s: (s.change(0, containers=(OOM_NOW,)), s.worker_ends(0, who=-1), s.vanish(1)),
        ("OutOfMemory", None),
    ),
    "a worker killed by its own stop is a signal, not a lack of memory": (
        lambda s: (s.worker_ends(0, signal=9), s.worker_ends(1, 1)),
        ("WorkerKilled", 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "cause"), CAUSES.values(), ids=CAUSES.keys())
def test_the_cause_is_the_most_telling_failure(fault, cause: tuple[str, int | None]) -> None:
    story = Story().trains()
    fault(story)
    story.go()
    attempt = story.job.status.attempts[0]
    assert ((attempt.reason, attempt.rank), story.generation, story.restarts) == (cause, 2, 1)


def test_a_worker_that_fails_on_a_pod_of_several_processes_is_named_by_its_global_rank() -> None:
    story = Story("workers: {processesPerNode: 4}").trains()
    story.worker_ends(1, signal=11, who=6)
    story.worker_ends(0, 1)
    story.go()
    assert story.job.status.attempts[0].rank == 6
    assert story.job.status.gang.processes_per_node == 4


TERMINAL = {
    "bad data fails the job at once": (ExitCode.BAD_DATA, "BadData"),
    "a bad configuration fails the job at once": (ExitCode.BAD_CONFIG, "BadConfig"),
    "numbers that going back does not mend fail the job at once": (ExitCode.NUMERIC, "NumericFailure"),
}


@pytest.mark.parametrize(("code", "reason"), TERMINAL.values(), ids=TERMINAL.keys())
def test_terminal_exit_codes(code: int, reason: str) -> None:
    story = Story().trains()
    story.wait(60)
    story.worker_ends(0, 1)
    story.worker_ends(1, code, message="train.jsonl:3: no field 'text'")
    plan = story.go()
    assert (plan.create, plan.delete) == ((), ())
    assert (story.phase, story.holds, story.restarts) == ("Failed", {"Failed", "Stalled"}, 0)
    assert story.say() == f"{reason}: train.jsonl:3: no field 'text'"
    assert story.status["completionTime"] == "2026-01-01T12:01:00Z"
    assert story.status["attempts"][0]["exitCode"] == code
    assert [story.order(rank).action for rank in (0, 1)] == ["Finish", "Finish"]


FREE = {
    "an eviction": lambda s: s.change(1, disruption="EvictionByEvictionAPI", deleting=True),
    "a preemption by the scheduler": lambda s: s.change(1, disruption="PreemptionByScheduler", phase="Failed"),
    "a gang that saved because it was asked to": lambda s: (s.worker_saves(1), s.worker_saves(0)),
    "a port that was taken meanwhile": lambda s: s.worker_ends(0, ExitCode.PORT_IN_USE, who=-1),
}


@pytest.mark.parametrize("fault", FREE.values(), ids=[f"{name} costs no restart" for name in FREE])
def test_what_nobody_is_to_blame_for_costs_nothing(fault) -> None:
    story = Story("recovery: {maxRestarts: 0}").trains()
    fault(story)
    story.go()
    story.wait(1)
    story.go()
    assert (story.generation, story.restarts, len(story.attempts)) == (2, 0, 1)
    assert story.recovers().generation == 2


def test_a_lost_pod_is_replaced_under_a_new_name_and_the_survivor_keeps_its_place() -> None:
    story = Story().trains()
    story.change(1, deleting=True, node="node-1")
    plan = story.go()
    assert plan.create == (NewPod(1, 2),)
    assert [pod.name for pod in story.pods.values()] == [
        "sentiment-aaaaa-0-1",
        "sentiment-aaaaa-1-1",
        "sentiment-aaaaa-1-2",
    ]
    assert story.order(0).action == "Wait"
    assert story.order(0).generation == 2, "the survivor ends generation 1"
    story.pods_start()
    story.go()
    assert [member.uid for member in story.job.status.gang.members] == ["pod-1", "pod-3"]


def test_a_pod_that_dies_before_the_gang_is_complete_is_replaced_under_the_next_generation() -> None:
    story = Story().trains()
    story.vanish(1)
    story.go()
    story.change(1, phase="Failed", reason="UnexpectedAdmissionError", message="no device")
    plan = story.go()
    assert plan.create == (NewPod(1, 3),)
    assert (story.generation, story.attempts) == (3, ["PodDeleted", "PodFailed"])
    assert story.job.status.attempts[1].start_time is None


def test_a_pod_that_vanishes_before_it_started_is_simply_made_again() -> None:
    story = Story()
    story.go()
    story.vanish(1)
    assert story.go().create == (NewPod(1, 1),)
    assert (story.attempts, story.restarts) == ([], 0)


def test_a_member_that_has_succeeded_is_not_missed_when_its_pod_goes() -> None:
    story = Story().trains()
    story.workers_succeed(1)
    story.change(1, deleting=True)
    story.go()
    assert story.generation == 1
    story.workers_succeed(0)
    story.go()
    assert story.phase == "Succeeded"


def test_a_generation_is_minted_above_any_that_an_agent_has_started() -> None:
    story = Story().trains()
    story.report(0, generation=7, state=AgentState.RUNNING)
    story.vanish(1)
    story.go()
    assert story.generation == 8


def test_restarts_are_counted_by_reason_and_each_reason_has_a_budget_of_its_own() -> None:
    story = Story("recovery: {maxRestarts: 1}").trains()
    for fault in (lambda: story.worker_ends(0, signal=11), lambda: story.vanish(1)):
        story.wait(100)
        fault()
        story.go()
        story.wait(1)
        story.recovers()
    assert story.status["restarts"] == document("""
      total: 2
      byReason:
      - {reason: PodDeleted, count: 1, used: 1, windowStart: "2026-01-01T12:03:21Z", lastStep: 1}
      - {reason: WorkerKilled, count: 1, used: 1, windowStart: "2026-01-01T12:01:41Z", lastStep: 1}
    """)
    story.worker_ends(0, signal=11)
    story.worker_ends(1, 1)
    plan = story.go()
    assert plan.create == ()
    assert (story.phase, story.restarts, story.holds) == ("Failed", 2, {"Failed", "Stalled"})
    assert story.say() == (
        "RestartsExhausted: gave up after 1 restarts for WorkerKilled without getting further (recovery.maxRestarts); "
        "last: rank 0 ended by signal SIGSEGV"
    )
    assert story.attempts == ["WorkerKilled", "PodDeleted", "WorkerKilled"]


def fails(story: Story, *, step: int, code: int = ExitCode.STALE) -> None:
    """Rank 0 fails after ``step`` steps."""
    story.wait(100)
    story.report(0, heartbeat=Heartbeat(Phase.TRAINING, step))
    story.worker_ends(0, code)
    story.worker_ends(1, code)
    story.go()


def commits(story: Story, step: int) -> None:
    story.report(0, checkpoint=Checkpoint(step, "s3://b/p", 1, "2026-01-01T00:00:00Z"))
    story.go()


def test_a_checkpoint_of_a_later_step_makes_a_budget_whole() -> None:
    story = Story("recovery: {maxRestarts: 1}").trains()
    for step in (120, 170, 220):
        commits(story, step - 20)
        fails(story, step=step)
        assert story.status["restarts"]["byReason"][0]["used"] == 1
        story.recovers()
    assert story.restarts == 3
    commits(story, 220)
    fails(story, step=230)
    assert story.say().startswith("RestartsExhausted"), (
        "220 was done before; it is no later step than the last failure's"
    )


def test_no_budget_is_made_whole_by_what_was_there_before_the_failure() -> None:
    story = Story("recovery: {maxRestarts: 2}").trains()
    commits(story, 100)
    for _ in range(3):
        fails(story, step=120)
        if story.phase != "Failed":
            story.recovers()
    assert story.say().startswith("RestartsExhausted")


def test_without_restarts_there_is_none_however_far_the_job_got() -> None:
    story = Story("recovery: {maxRestarts: 0}").trains()
    commits(story, 100)
    fails(story, step=120)
    assert story.say().startswith("RestartsExhausted")


def test_the_budget_is_whole_again_after_its_window() -> None:
    story = Story("recovery: {maxRestarts: 1, windowSeconds: 3600}").trains()
    for _ in range(3):
        story.worker_ends(0, signal=11)
        story.worker_ends(1, 1)
        story.go()
        story.recovers()
        story.wait(3600)
    (entry,) = story.status["restarts"]["byReason"]
    assert (story.phase, story.restarts, entry["count"], entry["used"]) == ("Running", 3, 3, 1)
    assert entry["windowStart"] == "2026-01-01T14:00:00Z"


def test_what_is_left_of_a_budget_is_known_to_a_new_operator_process() -> None:
    """Everything is in status: a story whose memory of reports is lost goes on counting."""
    story = Story("recovery: {maxRestarts: 2}").trains()
    for _ in range(2):
        fails(story, step=50)
        story.heard.clear()
        story.pods_start()
        story.recovers()
    fails(story, step=50)
    assert story.say().startswith("RestartsExhausted")


# What comes back wherever the gang starts from.


def test_the_same_python_error_three_times_in_a_row_at_one_step_ends_the_job() -> None:
    story = Story().trains()
    for _ in range(3):
        story.wait(100)
        story.report(0, heartbeat=Heartbeat(Phase.TRAINING, 41))
        story.worker_ends(0, 1, message="IndexError: list index out of range")
        story.worker_ends(1, 1, message="RuntimeError: [gloo/transport/tcp/pair.cc:537] Connection closed by peer")
        story.go()
        if story.phase != "Failed":
            story.recovers()
    assert story.say() == (
        "WorkerFailed: 3 times in a row without getting beyond step 41: rank 0 ended with exit code 1: IndexError: list index out of range"
    )
    assert (story.restarts, story.holds) == (2, {"Failed", "Stalled"})


NOT_THE_SAME = {
    "it never began to train": [(41, 1, "IndexError"), (None, 1, "OSError"), (None, 1, "OSError")],
    "it got further": [(41, 1, "IndexError"), (41, 1, "IndexError"), (42, 1, "IndexError")],
    "another end came between": [(41, 1, ""), (41, ExitCode.STALE, ""), (41, 1, ""), (41, 1, "")],
    "the agent died, which is no error of Python": [(41, None, ""), (41, None, ""), (41, None, "")],
}


@pytest.mark.parametrize("ends", NOT_THE_SAME.values(), ids=NOT_THE_SAME.keys())
def test_it_is_not_the_same_again_when(ends: list[tuple[int | None, int | None, str]]) -> None:
    story = Story().trains()
    for step, code, message in ends:
        story.wait(100)
        phase = Phase.INITIALIZING if step is None else Phase.TRAINING
        for rank in (0, 1):
            story.report(rank, heartbeat=Heartbeat(phase, step or 0))
        story.worker_ends(0, code, message=message, who=0 if code else -1)
        story.worker_ends(1, code, message=message, who=1 if code else -1)
        story.go()
        story.recovers()
    assert story.restarts == len(ends)


def test_what_nobody_is_to_blame_for_does_not_interrupt_a_row() -> None:
    story = Story().trains()
    for code in (1, ExitCode.SAVED, 1, ExitCode.SAVED, 1):
        fails(story, step=41, code=code)
        if story.phase != "Failed":
            story.recovers()
    assert story.say().startswith("WorkerFailed: 3 times in a row without getting beyond step 41: ")


def fails_before_the_first_step(story: Story, *, times: int, memory: bool = False) -> None:
    story.go()
    story.pods_start()
    for _ in range(times):
        story.go()
        story.wait(100)
        if memory:
            story.change(0, containers=(OOM_NOW,))
        story.worker_ends(0, None if memory else 1, message="OSError: no such host", who=-1 if memory else 0)
        story.worker_ends(1, 1, message=GLOO if memory else "OSError: no such host")
        story.go()
        story.wait(300)
    assert story.job.status.attempts[-1].last_step is None


def test_what_fails_before_the_first_step_may_be_the_networks_and_is_tried_as_often_as_the_budget_allows() -> None:
    story = Story("recovery: {maxRestarts: 4}")
    fails_before_the_first_step(story, times=4)
    assert story.phase == "Recovering"
    fails_before_the_first_step(story, times=1)
    assert story.say().startswith("RestartsExhausted")


def test_memory_that_runs_out_before_the_first_step_of_a_recipe_does_so_again_and_of_a_script_nobody_knows() -> None:
    for story, phase in ((Story(), "Failed"), (Story(base=SCRIPT), "Recovering")):
        fails_before_the_first_step(story, times=2, memory=True)
        assert (story.phase, story.attempts) == (phase, ["OutOfMemory"] * 2)


def runs_out_of_memory(story: Story) -> None:
    story.wait(100)
    story.report(0, heartbeat=Heartbeat(Phase.TRAINING, 41))
    story.change(0, containers=(OOM_NOW,))
    story.worker_ends(0, who=-1)
    story.worker_ends(1, 1)
    story.go()


def test_memory_that_runs_out_twice_at_one_step_ends_the_job_and_says_how_to_go_on() -> None:
    story = Story().trains()
    commits(story, 40)
    runs_out_of_memory(story)
    story.recovers()
    runs_out_of_memory(story)
    assert (story.phase, story.restarts) == ("Failed", 1)
    prefix = "s3://checkpoints/team-a/team-a/sentiment-aaaaabbb"
    assert story.say().startswith(
        "OutOfMemory: 2 times in a row without getting beyond step 41: pod sentiment-aaaaa-0-1 was killed at "
    )
    assert story.say().endswith(
        f"; a new job with more of it goes on from step 40 with checkpoint: {{resumeFrom: {prefix}}}"
    )


def test_memory_that_runs_out_before_anything_was_saved_leaves_nothing_to_go_on_from() -> None:
    story = Story().trains()
    runs_out_of_memory(story)
    story.recovers()
    runs_out_of_memory(story)
    assert story.phase == "Failed"
    assert "resumeFrom" not in story.say()


def test_only_the_last_ten_attempts_are_kept() -> None:
    story = Story("recovery: {maxRestarts: 100}").trains()
    for _ in range(12):
        story.wait(100)
        story.worker_ends(0, ExitCode.STALE)
        story.go()
        story.recovers()
    assert [attempt.generation for attempt in story.job.status.attempts] == list(range(3, 13))


def test_a_container_killed_for_memory_is_told_with_what_to_do() -> None:
    story = Story().trains()
    story.change(1, containers=(OOM_NOW,), memory_limit=str(3 * 2**30))
    story.report(
        1, state=AgentState.FAILED, exits=[Exit(1, -1, None, None, "the agent process ended while this generation ran")]
    )
    story.go()
    attempt = story.job.status.attempts[0]
    assert (attempt.reason, attempt.pod, attempt.exit_code) == ("OutOfMemory", "sentiment-aaaaa-1-1", 137)
    assert (
        attempt.message
        == "pod sentiment-aaaaa-1-1 was killed at its memory limit of 3.00 GiB; raise workers.resources.memory"
    )


def test_a_worker_that_the_kernel_took_for_memory_is_told_with_limit_and_peak_though_its_container_runs_on() -> None:
    story = Story().trains()
    gang_dies = Exit(1, 1, 1, None, GLOO)
    killed = Exit(1, 0, None, 9, "", memory=Memory(limit_bytes=3 * 2**30, peak_bytes=3 * 2**30 - 2**28))
    story.report(1, state=AgentState.FAILED, exits=[gang_dies])
    story.report(0, state=AgentState.FAILED, exits=[killed])
    story.go()
    attempt = story.job.status.attempts[0]
    assert (attempt.reason, attempt.rank, attempt.signal) == ("OutOfMemory", 0, 9)
    assert attempt.message == (
        "rank 0 was killed at the memory limit of pod sentiment-aaaaa-0-1 of 3.00 GiB; its peak was 2.75 GiB; "
        "raise workers.resources.memory"
    )


def test_a_container_once_killed_for_memory_is_not_blamed_for_later_generations() -> None:
    """``lastState`` of a container keeps OOMKilled for ever."""
    story = Story().trains()
    story.change(1, containers=(OOM_NOW,))
    story.worker_ends(1, who=-1)
    story.go()
    assert story.generation == 2
    story.go()
    assert story.generation == 2, "its agent has not even started generation 2"
    assert story.recovers().generation == 2
    story.change(1, containers=(OOM_NOW,))
    story.worker_ends(1, ExitCode.STALE)
    story.go()
    assert story.attempts == ["OutOfMemory", "Stale"]


NCCL_ABORT = "[rank1]:[E ProcessGroupNCCL.cpp:2057] NCCL watchdog thread terminated with exception"
OF_RANK_0 = {
    "a broken device": (lambda s: s.worker_ends(0, 1, message="CUDA error: uncorrectable ECC error"), "DeviceError"),
    "a pod that is gone": (lambda s: s.vanish(0), "PodDeleted"),
    "an error of the program": (lambda s: s.worker_ends(0, 1, message="ValueError: wrong"), "WorkerFailed"),
}


@pytest.mark.parametrize(("happens", "reason"), OF_RANK_0.values(), ids=OF_RANK_0.keys())
def test_a_peer_that_dies_of_a_signal_is_not_taken_for_out_of_memory_because_it_once_was(happens, reason) -> None:
    story = Story().trains()
    story.change(1, containers=(OOM_NOW,))
    story.worker_ends(1, who=-1)
    story.go()
    story.recovers()
    story.change(1, containers=(OOM_NOW,))
    happens(story)
    story.worker_ends(1, signal=6, message=NCCL_ABORT)
    story.wait(1)
    story.go()
    assert story.attempts == ["OutOfMemory", reason]


def test_a_member_that_no_operator_process_has_heard_yet_is_not_taken_for_dead() -> None:
    story = Story().trains()
    story.heard.clear()
    story.wait(3600)
    plan = story.go()
    assert (story.generation, story.attempts, plan.create) == (1, [], ())
    story.workers_train()
    story.go()
    assert story.phase == "Running"


def test_reports_of_lower_generations_say_nothing_of_the_present_one() -> None:
    story = Story().trains()
    story.worker_ends(0, 1)
    story.worker_ends(1, 1)
    story.go()
    assert story.generation == 2
    story.go()
    assert (story.generation, story.job.status.gang.ready) == (2, 0)


def test_an_agent_that_stopped_without_being_told_to_has_failed() -> None:
    story = Story().trains()
    story.report(0, state=AgentState.STOPPED)
    story.report(1, state=AgentState.STOPPED)
    story.go()
    assert (story.generation, story.attempts) == (2, ["WorkerFailed"])
    assert story.job.status.attempts[0].message == "the agent of pod sentiment-aaaaa-0-1 reports Stopped and no reason"


def test_exits_of_former_generations_are_no_failure_of_this_one() -> None:
    story = Story().trains()
    story.worker_ends(0, 1)
    story.worker_ends(1, 1)
    story.go()
    old = Exit(1, 0, ExitCode.BAD_DATA)
    story.report(0, generation=2, state=AgentState.FAILED, exits=[old, Exit(2, 0, 1)])
    story.report(1, generation=2, state=AgentState.FAILED, exits=[old, Exit(2, 1, 1)])
    story.go()
    assert (story.phase, story.attempts) == ("Recovering", ["WorkerFailed", "WorkerFailed"])


def test_quick_failures_in_a_row_wait_longer_and_longer_and_a_long_run_ends_the_series() -> None:
    story = Story("recovery: {maxRestarts: 100}").trains()
    waits = []
    for _ in range(4):
        story.wait(10)
        story.worker_ends(0, ExitCode.STALE)
        plan = story.go()
        waits.append(plan.look_again_seconds)
        if plan.look_again_seconds:
            assert (
                story.say()
                == f"BackingOff: all pods are ready; waiting {plan.look_again_seconds:.0f} s after repeated failures"
            )
            assert story.job.status.gang.members == []
            story.wait(plan.look_again_seconds)
        story.recovers()
    assert waits == [None, 2.0, 4.0, 8.0]
    story.wait(60)
    story.worker_ends(0, ExitCode.STALE)
    assert story.go().look_again_seconds is None


def test_a_gang_that_gets_further_each_time_never_waits() -> None:
    story = Story("recovery: {maxRestarts: 100}").trains()
    waits = []
    for step in (10, 20, 30, 30, 30):
        story.report(0, heartbeat=Heartbeat(Phase.TRAINING, step))
        story.worker_ends(0, ExitCode.STALE)
        waits.append(story.go().look_again_seconds)
        story.wait(waits[-1] or 0)
        story.recovers()
    assert waits == [None, None, None, None, 2.0], "the last but one was the first in vain"


def test_the_wait_after_quick_failures_ends_at_five_minutes() -> None:
    story = Story("recovery: {maxRestarts: 100}").trains()
    longest = 0.0
    for _ in range(12):
        story.worker_ends(0, ExitCode.STALE)
        wait = story.go().look_again_seconds or 0.0
        longest = max(longest, wait)
        story.wait(wait)
        story.recovers()
    assert longest == 300.0


def test_more_nodes_than_rank_0_alone_must_succeed() -> None:
    story = Story(nodes=3).trains()
    story.workers_succeed(0, 1)
    story.go()
    assert (story.phase, story.job.status.gang.ready) == ("Running", 3)
    story.worker_ends(2, ExitCode.STALE)
    story.go()
    assert (story.phase, story.generation) == ("Recovering", 2)
