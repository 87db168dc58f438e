"""Agents that are not heard: who is lost, who is not, and when nobody knows."""

from dataclasses import replace
from datetime import timedelta

import pytest

from finetune_api.contract import ExitCode
from finetune_api.protocol import AgentState, Exit
from finetune_operator.plan.failure import ECHO_SECONDS
from finetune_operator.plan.observation import Hearing, NewPod, timestamp
from finetune_operator.plan.suspects import AVOIDED_AT_MOST
from tests.operator.documents import NOON, SCRIPT
from tests.operator.story import RUNNING, Story


def training(nodes: int = 2, spec: str = "", **more: str) -> Story:
    return Story(spec, nodes=nodes, **more).trains().listens()


# A node that is gone.


def test_a_silent_pod_is_replaced_elsewhere_and_the_survivors_stay() -> None:
    story = training(3)
    story.passes(29, 0, 2)
    assert story.generation == 1
    plan = story.passes(1, 0, 2)
    assert story.generation == 2
    assert plan.create == (NewPod(1, 2, ("node-1",)),)
    assert [pod.name for pod in plan.delete] == ["sentiment-aaaaa-1-1"], "so that it goes when its node is back"
    attempt = story.job.status.attempts[0]
    assert (attempt.reason, attempt.pod, attempt.node) == ("PodSilent", "sentiment-aaaaa-1-1", "node-1")
    assert (
        attempt.message
        == "the agent of pod sentiment-aaaaa-1-1 on node node-1 is silent since 2026-01-01T12:00:00Z; others are heard (rank 1)"
    )
    assert [entry.to_wire() for entry in story.job.status.gang.avoid_nodes] == [
        {"pod": "sentiment-aaaaa-1-1", "node": "node-1", "reason": "PodSilent", "time": "2026-01-01T12:00:30Z"}
    ]
    assert [(story.order(rank).action, story.order(rank).generation) for rank in (0, 2)] == [("Wait", 2)] * 2
    story.pods_start()
    story.go()
    members = [member.pod for member in story.job.status.gang.members]
    assert members == ["sentiment-aaaaa-0-1", "sentiment-aaaaa-1-2", "sentiment-aaaaa-2-1"]


def test_a_pod_on_a_node_that_is_not_ready_need_not_be_silent_for_long() -> None:
    story = training(3)
    story.passes(5, 0, 2)
    story.change(1, node_lost=True)
    story.passes(9, 0, 2)
    assert story.generation == 1
    plan = story.passes(1, 0, 2)
    assert (story.generation, plan.create) == (2, (NewPod(1, 2, ("node-1",)),))
    attempt = story.job.status.attempts[0]
    assert (attempt.reason, attempt.node) == ("NodeLost", "node-1")
    assert (
        attempt.message == "node node-1 is not ready, and the agent of pod sentiment-aaaaa-1-1 on it is silent (rank 1)"
    )


def test_a_node_that_is_not_ready_counts_although_the_peers_go_on() -> None:
    """A script's ranks need not wait for one another."""
    story = training(base=SCRIPT)
    story.change(1, node_lost=True)
    story.passes(15, 0, step=1)
    assert story.attempts == ["NodeLost"]


def test_a_node_that_is_not_ready_counts_later_while_no_agent_is_heard() -> None:
    story = training()
    story.change(1, node_lost=True)
    story.passes(29, others=False)
    assert (story.generation, story.attempts) == (1, [])
    story.passes(1, others=False)
    assert (story.generation, story.attempts) == (2, ["NodeLost"])


def test_all_pods_of_a_node_are_lost_at_once() -> None:
    story = training(4)
    for rank in (2, 3):
        story.change(rank, node="node-2", node_lost=True)
    plan = story.passes(15, 0, 1)
    assert [place.rank for place in plan.create] == [2, 3]
    assert {place.avoid for place in plan.create} == {("node-2",)}
    assert len(plan.delete) == 2
    assert (story.generation, story.attempts) == (2, ["NodeLost"])


def test_a_pod_that_was_asked_to_go_by_its_dead_node_s_eviction_is_told_as_lost() -> None:
    story = training()
    story.flags = {"most_nodes_lost": True}
    story.change(1, node_lost=True)
    story.must_go(1, "DeletionByTaintManager")
    story.passes(15, 0)
    story.go()
    assert (story.generation, story.attempts) == (2, ["NodeLost"])


# A pod that runs, and whose agent is never heard.


def replacement_runs(story: Story) -> None:
    """The pod that was made for the lost one of rank 1 runs from now on, and says nothing."""
    story.change(
        1, phase="Running", node="node-2", scheduled=True, containers=(replace(RUNNING, started=timestamp(story.now)),)
    )


def with_a_mute_replacement() -> Story:
    story = training(3)
    story.passes(30, 0, 2)
    assert story.generation == 2
    replacement_runs(story)
    return story


def test_a_replacement_that_never_says_a_word_is_replaced_elsewhere_and_no_restart_is_used() -> None:
    story = with_a_mute_replacement()
    story.passes(149, 0, 2)
    assert (story.generation, story.condition("Ready").reason) == (2, "WaitingForAgent")
    plan = story.passes(1, 0, 2)
    assert plan.create == (NewPod(1, 3, ("node-1", "node-2")),)
    assert [pod.name for pod in plan.delete] == ["sentiment-aaaaa-1-2"]
    assert story.attempts == ["PodSilent", "PodNeverHeard"]
    assert story.job.status.attempts[-1].message == (
        "pod sentiment-aaaaa-1-2 on node node-2 runs since 2026-01-01T12:00:30Z, and its agent was never heard; others are (rank 1)"
    )
    by_reason = {entry.reason: (entry.count, entry.used) for entry in story.job.status.restarts.by_reason}
    assert by_reason == {"PodSilent": (1, 1), "PodNeverHeard": (1, 0)}
    story.pods_start()
    story.passes(3, 0, 1, 2)
    assert [member.pod for member in story.job.status.gang.members][1] == "sentiment-aaaaa-1-3"


def test_one_that_its_node_cannot_set_up_is_replaced_elsewhere() -> None:
    story = training(3)
    story.passes(30, 0, 2)
    story.change(1, node="node-2", scheduled=True, no_sandbox_since=timestamp(story.now))
    story.passes(299, 0, 2)
    assert (story.generation, story.condition("Ready").reason) == (2, "ContainerCreating")
    plan = story.passes(1, 0, 2)
    assert plan.create == (NewPod(1, 3, ("node-1", "node-2")),)
    assert story.attempts == ["PodSilent", "PodNeverHeard"]
    assert story.job.status.attempts[-1].message == (
        "pod sentiment-aaaaa-1-2 on node node-2 has neither network nor volumes since 2026-01-01T12:00:30Z; its events say why (rank 1)"
    )


def test_one_that_speaks_in_time_is_kept() -> None:
    story = with_a_mute_replacement()
    story.passes(140, 0, 2)
    story.pods_start(1)
    story.passes(60, 0, 1, 2)
    assert (story.generation, story.attempts) == (2, ["PodSilent"])
    assert [member.pod for member in story.job.status.gang.members][1] == "sentiment-aaaaa-1-2"


def test_a_spare_that_is_never_heard_is_made_again_behind_its_gang() -> None:
    story = Story("workers: {spares: 1}", nodes=2).trains().listens()
    story.go()
    spare = story.pod(2)
    story.change(2, phase="Running", node="node-2", containers=(replace(RUNNING, started=timestamp(story.now)),))
    story.passes(149, 0, 1)
    assert not story.pods[spare.uid].deleting
    story.passes(11, 0, 1)
    assert story.pods[spare.uid].deleting
    assert [pod.name for pod in story.pods.values() if pod.usable and pod.rank >= 2] == ["sentiment-aaaaa-3-1"]
    assert (story.generation, story.attempts) == (1, [])


KEPT = {
    "while its image is still being pulled": lambda s: (s.change(1, containers=()), s.passes(600, 0, 2)),
    "where none of the job's agents is heard": lambda s: s.passes(600),
    "where no agent of any job is heard": lambda s: s.passes(600, others=False),
    "by a process that has not listened for so long": lambda s: (s.passes(100, 0, 2), s.listens(), s.passes(149, 0, 2)),
    "where its node's clock is behind": lambda s: (
        s.change(1, containers=(replace(RUNNING, started=timestamp(NOON)),)),
        s.passes(149, 0, 2),
    ),
}


@pytest.mark.parametrize("what", KEPT.values(), ids=KEPT.keys())
def test_a_pod_that_is_not_heard_is_kept(what) -> None:
    story = with_a_mute_replacement()
    what(story)
    assert (story.generation, story.attempts) == (2, ["PodSilent"])


def test_a_job_that_has_never_trained_waits_where_none_of_its_agents_is_heard() -> None:
    """A NetworkPolicy of its namespace, perhaps: another node would do no better."""
    for nodes in (1, 2):
        story = Story(nodes=nodes).listens()
        story.go()
        for rank in range(nodes):
            story.change(rank, phase="Running", node="node-1", containers=(replace(RUNNING, started=timestamp(NOON)),))
        story.passes(600)
        assert (story.generation, story.attempts, story.condition("Ready").reason) == (1, [], "WaitingForAgent")


def test_the_only_pod_of_a_job_that_has_trained_is_replaced_again_and_again_and_the_job_never_fails_of_it() -> None:
    story = training(1, "recovery: {maxRestarts: 2}")
    story.vanish(0)
    story.go()
    for _ in range(5):
        story.change(0, phase="Running", node="node-2", containers=(replace(RUNNING, started=timestamp(story.now)),))
        story.passes(500)
    assert (story.phase, story.attempts) == ("Recovering", ["PodDeleted", *["PodNeverHeard"] * 5])


# What is no loss.


def on_a_node_without_kubelet(story: Story) -> None:
    story.change(1, node_lost=True)
    story.passes(600, 0, 1)


NOT_LOST = {
    "an agent that is heard, though its node's kubelet is gone": (on_a_node_without_kubelet, "Running", "True"),
    "all agents at once: the operator hears nothing": (lambda s: s.passes(600, others=False), "NoAgentHeard", "Unknown"),
    "one whose peers' steps advance": (lambda s: s.passes(600, 0, step=1), "AgentSilent", "Unknown"),
    "most nodes at once, while others' agents are heard for so long": (
        lambda s: (s.flags.update(most_nodes_lost=True), s.change(1, node_lost=True), s.passes(29, 0)),
        "Running",
        "True",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("what", "reason", "ready"), NOT_LOST.values(), ids=NOT_LOST.keys())
def test_who_is_not_lost(what, reason: str, ready: str) -> None:
    story = training()
    what(story)
    assert (story.generation, story.attempts, story.phase) == (1, [], "Running")
    assert (story.condition("Ready").reason, story.condition("Ready").status) == (reason, ready)
    assert story.condition("Reconciling").status == story.condition("Stalled").status == "False"
    story.workers_train()
    story.hearing = Hearing(since=story.now, at=story.now)
    story.go()
    assert (story.say(), story.holds) == ("Running: generation 1 trains on 2 nodes", {"Ready"})


def test_what_is_unknown_is_said_with_since_when_and_stands_still() -> None:
    story = training()
    story.passes(31, others=False)
    assert (
        story.say()
        == "NoAgentHeard: no agent of any job has been heard since 2026-01-01T12:00:00Z; training needs no operator"
    )
    first = story.job.status
    story.passes(300, others=False)
    assert story.job.status == first


def test_a_gang_stands_still_when_a_step_takes_twice_as_long_as_the_one_before() -> None:
    """Steps of 40 s: nothing can be heard of the peers for longer than an agent may be silent."""
    story = training()
    for _ in range(2):
        story.passes(39, 0, 1)
        story.passes(1, 0, 1, step=1)
    story.passes(39, 0)
    assert story.condition("Ready").reason == "AgentSilent"
    story.passes(1, 0, step=1)  # rank 1 has done it too, and cannot tell
    story.passes(79, 0)
    assert story.generation == 1
    story.passes(10, 0)
    assert (story.generation, story.attempts) == (2, ["PodSilent"])


def test_a_step_that_took_very_long_does_not_hide_a_loss_for_hours() -> None:
    story = training()
    story.passes(3600, 0, 1)
    story.passes(1, 0, 1, step=1)
    story.passes(3600, 0, 1)
    story.passes(1, 0, 1, step=1)
    story.passes(310, 0)
    assert (story.generation, story.attempts) == (2, ["PodSilent"])


def test_a_member_that_has_done_its_work_is_not_missed() -> None:
    story = training()
    story.workers_succeed(1)
    plan = story.passes(600, 0)
    assert (story.generation, plan.delete, story.phase) == (1, (), "Running")
    story.workers_succeed(0)
    story.go()
    assert story.phase == "Succeeded"


# Operators come and go.


def restart_operator(story: Story) -> None:
    story.heard.clear()
    story.listens()


def test_what_is_known_of_a_gang_stands_until_a_new_operator_has_heard_it() -> None:
    story = training()
    before = story.job.status
    story.wait(3600)
    restart_operator(story)
    for _ in range(9):
        plan = story.passes(1)
        assert (plan.status, plan.create, plan.delete) == (before, (), ())
    story.workers_train()
    story.go()
    assert story.job.status == before


def test_a_new_operator_gives_every_agent_its_time_and_then_misses_the_one_that_does_not_come() -> None:
    story = training()
    story.wait(3600)
    restart_operator(story)
    story.workers_train(0)
    story.passes(44, 0)
    assert story.generation == 1
    story.passes(1, 0)
    assert (story.generation, story.attempts) == (2, ["PodSilent"])


def test_a_new_leader_gives_an_agent_on_a_node_that_is_not_ready_time_to_find_it() -> None:
    """After an outage of the control plane both may be late: the node's mark, and the way to the new leader."""
    story = training()
    story.wait(3600)
    restart_operator(story)
    story.workers_train(0)
    story.change(1, node_lost=True)
    story.passes(44, 0)
    assert story.generation == 1
    story.passes(1, 0)
    assert (story.generation, story.attempts) == (2, ["NodeLost"])


def test_an_operator_that_hears_again_after_five_minutes_restarts_nothing() -> None:
    story = training()
    story.passes(300, others=False)
    story.hearing = Hearing(since=story.now, at=story.now)  # the first message after the gap, from another job
    story.passes(10)
    story.workers_train(0)
    story.passes(5, 0)
    story.workers_train()
    story.passes(20, 0, 1)
    assert (story.generation, story.attempts, story.holds) == (1, [], {"Ready"})


def test_a_pod_that_was_lost_once_is_not_used_again_whatever_it_says_to_whichever_operator() -> None:
    story = training()
    story.wait(1)
    story.change(1, node_lost=True)
    story.hearing = replace(story.hearing, at=story.now)
    plan = story.passes(15, 0)
    lost = plan.delete[0].uid
    story.change(lost, deleting=False, node_lost=False)  # the operator had died before it could delete it
    for uid in [uid for uid, pod in story.pods.items() if pod.generation == 2]:
        del story.pods[uid]
    restart_operator(story)
    story.report(0)
    story.heard[lost] = replace(story.heard[story.pod(0).uid], at=story.now)
    plan = story.go()
    assert [pod.uid for pod in plan.delete] == [lost]
    assert plan.create == (NewPod(1, 2, ("node-1",)),)


# While a gang is assembled.


def test_a_survivor_that_falls_silent_while_its_gang_waits_is_replaced_in_the_same_generation() -> None:
    story = training(3)
    story.vanish(2)
    story.go()
    assert story.generation == 2
    plan = story.passes(30, 0)
    assert (story.generation, plan.create) == (2, (NewPod(1, 2, ("node-1",)),))
    assert [pod.name for pod in plan.delete] == ["sentiment-aaaaa-1-1"]
    assert [entry.reason for entry in story.job.status.gang.avoid_nodes] == ["PodSilent"]


def test_a_pod_that_was_made_for_this_generation_is_replaced_in_the_next() -> None:
    story = training()
    story.vanish(1)
    story.go()
    story.change(1, phase="Running", node="node-9", node_lost=True)
    plan = story.passes(15, 0)
    assert plan.create == (NewPod(1, 3, ("node-9",)),)
    assert (story.generation, story.attempts) == (3, ["PodDeleted", "NodeLost"])


def test_a_pod_that_has_not_said_its_first_word_is_never_silent() -> None:
    story = training()
    story.vanish(1)
    story.go()
    story.change(1, phase="Running", node="node-9")
    plan = story.passes(600, 0)
    assert (story.generation, plan.create, plan.delete) == (2, (), ())


def test_nobody_is_counted_on_who_has_not_been_heard_just_now() -> None:
    story = training()
    story.vanish(1)
    story.go()
    story.wait(16)
    story.pods_start(1)
    story.passes(1, 1)
    assert story.job.status.gang.members == []
    assert (
        story.say()
        == "WaitingForAgent: rank 0 of 2: the agent of pod sentiment-aaaaa-0-1 on node-0 has said nothing since 2026-01-01T12:00:00Z"
    )
    story.report(0)
    story.go()
    assert len(story.job.status.gang.members) == 2


# Suspects.


def test_a_node_is_avoided_for_an_hour() -> None:
    story = training()
    story.change(1, node_lost=True)
    story.passes(15, 0)
    story.hearing = None
    story.recovers()
    story.wait(3599)
    story.vanish(0)
    assert story.go().create[0].avoid == ("node-1",)
    story.recovers()
    story.wait(1)
    story.vanish(0)
    assert story.go().create[0].avoid == ()


def test_no_more_nodes_are_remembered_than_status_can_hold() -> None:
    story = training(nodes=20)
    for rank in range(1, 20):
        story.change(rank, node_lost=True)
    story.passes(15, 0)
    assert len(story.job.status.gang.avoid_nodes) == AVOIDED_AT_MOST


def test_a_pod_that_is_suspect_for_two_reasons_is_listed_once() -> None:
    """As after an outage of the API server, when much is seen at once: status refuses a pod twice."""
    story = training()
    story.worker_ends(0, 1, message="CUDA error: uncorrectable ECC error encountered")
    story.change(0, node_lost=True)
    story.wait(40)
    story.report(1)
    story.hearing = replace(story.hearing, at=story.now)
    story.go()
    assert [(entry.pod, entry.reason) for entry in story.job.status.gang.avoid_nodes] == [
        ("sentiment-aaaaa-0-1", "NodeLost")
    ]


BROKEN = {
    "a memory error of the GPU": "RuntimeError: CUDA error: uncorrectable ECC error encountered",
    "a link between GPUs": "CUDA error: uncorrectable NVLink error detected during the execution",
    "a GPU that is gone": "Unable to determine the device handle: GPU is lost. Reboot the system to recover this GPU",
    "no GPU where one was asked for": "RuntimeError: No CUDA-capable device is detected",
    "a GPU that PyTorch cannot see": "RuntimeError: No CUDA GPUs are available",
    "a fabric that is not up": "RuntimeError: Unexpected error from cudaGetDeviceCount(). ... Error 802: system not yet initialized",
    "a driver that is too old": "RuntimeError: The NVIDIA driver on your system is too old (found version 12020).",
    "a GPU that somebody else holds": "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "a driver that does not fit its library": "NVML: Driver/library version mismatch",
    "a port of the fabric": "node7:91:95 [0] NCCL WARN NET/IB : mlx5_0:1 Got async event : port error",
}
AN_ECHO_OR_A_BUG = {
    "a peer that is gone": "NCCL WARN NET/IB: Got completion from peer with status=12 opcode=0 (IBV_WC_RETRY_EXC_ERR)",
    "a collective that times out": "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)",
    "a remote process": "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting",
    "a kernel that is wrong": "CUDA error: an illegal memory access was encountered",
    "too little memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
    "a data set about errors": "KeyError: 'ECC'",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_device_costs_its_pod_the_node_and_the_peers_are_not_blamed(text: str) -> None:
    story = training(3)
    story.worker_ends(0, 1, message="NCCL communicator was aborted")
    story.report(
        1, generation=1, state=AgentState.FAILED, exits=[Exit(1, 1, 1, message="died", log_tail=f"...\n{text}\n...")]
    )
    plan = story.go()
    attempt = story.job.status.attempts[0]
    assert (attempt.reason, attempt.message, attempt.node) == ("DeviceError", text, "node-1")
    assert (plan.create, [pod.rank for pod in plan.delete]) == ((NewPod(1, 2, ("node-1",)),), [1])


@pytest.mark.parametrize("text", AN_ECHO_OR_A_BUG.values(), ids=AN_ECHO_OR_A_BUG.keys())
def test_no_node_is_blamed_for(text: str) -> None:
    story = training()
    story.worker_ends(1, signal=6, message=text)
    story.wait(ECHO_SECONDS)
    plan = story.go()
    assert story.attempts in (["WorkerKilled"], ["CollectiveFailed"])
    assert (plan.delete, story.job.status.gang.avoid_nodes) == ((), [])


def test_what_the_trainer_says_of_the_data_is_not_taken_for_a_broken_device() -> None:
    story = training()
    story.worker_ends(1, ExitCode.BAD_DATA, message="train.jsonl:3: 'uncorrectable ECC error' is no label")
    story.go()
    assert story.say().startswith("BadData")


# Suspending.

STUCK = {
    "its node is known to be gone": (lambda s: s.change(1, node_lost=True), 30),
    "its grace period has long been over": (lambda s: None, 91),
}


@pytest.mark.parametrize(("what", "seconds"), STUCK.values(), ids=STUCK.keys())
def test_a_pod_stuck_on_a_dead_node_keeps_no_job_from_being_suspended_and_resumed(what, seconds: int) -> None:
    story = training()
    story.edit(suspend=True)
    story.go()
    story.change(1, grace_ends=timestamp(story.now + timedelta(seconds=60)))
    story.vanish(0)
    what(story)
    story.passes(seconds, others=False)
    story.go()
    assert (
        story.say()
        == "Suspended: spec.suspend is true; no pod is kept; pod sentiment-aaaaa-1-1 is still there: node node-1 cannot be reached, or a finalizer holds it"
    )
    assert story.holds == {"Ready", "Suspended"}
    assert story.go().status == story.job.status
    story.edit(suspend=False)
    plan = story.go()
    assert plan.create == (NewPod(0, story.generation), NewPod(1, story.generation))
    assert story.generation > 1, "the name of the stuck pod is taken"


def test_a_pod_that_is_still_saving_is_waited_for_when_suspending() -> None:
    story = training()
    story.edit(suspend=True)
    story.go()
    for rank in (0, 1):
        story.change(rank, grace_ends=timestamp(story.now + timedelta(seconds=60)))
    story.passes(80, 0, 1)
    assert story.say() == "Suspending: 2 pods are saving and leaving"
