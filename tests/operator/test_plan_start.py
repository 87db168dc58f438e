"""From a job that was just created to a gang that trains."""

import pytest

from finetune_operator.plan.observation import NewPod, Problem
from finetune_operator.views import ContainerView
from tests.operator.documents import SCRIPT
from tests.operator.story import RUNNING, Story, document


def test_a_new_job_mints_generation_1_and_creates_one_pod_for_each_rank() -> None:
    story = Story()
    plan = story.look()
    assert plan.create == (NewPod(0, 1), NewPod(1, 1))
    assert plan.delete == ()
    assert plan.status.to_wire() == document("""
      observedGeneration: 1
      phase: Pending
      gang: {generation: 1, nodes: 2, processesPerNode: 1, ready: 0, mintTime: "2026-01-01T12:00:00Z", members: [], standIns: [], avoidNodes: []}
      attempts: []
      conditions:
      - {type: Ready, status: "False", reason: Creating, message: "ranks 0, 1 of 2: the pod is being created", lastTransitionTime: "2026-01-01T12:00:00Z", observedGeneration: 1}
      - {type: Reconciling, status: "True", reason: Creating, message: "ranks 0, 1 of 2: the pod is being created", lastTransitionTime: "2026-01-01T12:00:00Z", observedGeneration: 1}
      - {type: Stalled, status: "False", reason: NotStalled, message: "nobody's help is needed", lastTransitionTime: "2026-01-01T12:00:00Z", observedGeneration: 1}
      - {type: Suspended, status: "False", reason: NotSuspended, message: "spec.suspend is false", lastTransitionTime: "2026-01-01T12:00:00Z", observedGeneration: 1}
      - {type: Complete, status: "False", reason: NotComplete, message: "the job has not succeeded", lastTransitionTime: "2026-01-01T12:00:00Z", observedGeneration: 1}
      - {type: Failed, status: "False", reason: NotFailed, message: "the job has not failed", lastTransitionTime: "2026-01-01T12:00:00Z", observedGeneration: 1}
      - {type: CheckpointsDelayed, status: "False", reason: NotDelayed, message: "no save fails or has to wait", lastTransitionTime: "2026-01-01T12:00:00Z", observedGeneration: 1}
      - {type: CheckpointFallback, status: "False", reason: NoFallback, message: "the gang started from the newest checkpoint, or there is a newer one by now", lastTransitionTime: "2026-01-01T12:00:00Z", observedGeneration: 1}
      - {type: Straggler, status: "False", reason: NoStraggler, message: "no rank is known to hold up the others", lastTransitionTime: "2026-01-01T12:00:00Z", observedGeneration: 1}
    """)


def test_the_same_observation_gives_the_same_plan_and_creates_nothing_twice() -> None:
    story = Story()
    story.go()
    first = story.go()
    assert first.create == ()
    assert story.go().status == first.status


def test_members_are_committed_once_every_agent_has_reported_with_the_master_that_rank_0_offers() -> None:
    story = Story()
    story.go()
    story.pods_start(1)
    story.go()
    assert story.status["gang"]["members"] == []
    assert [story.order(rank).action for rank in (0, 1)] == ["Wait", "Wait"]
    story.pods_start(0)
    story.wait(5)
    story.go()
    assert story.status == document("""
      observedGeneration: 1
      phase: Starting
      startTime: "2026-01-01T12:00:05Z"
      gang:
        generation: 1
        nodes: 2
        processesPerNode: 1
        ready: 0
        mintTime: "2026-01-01T12:00:00Z"
        startTime: "2026-01-01T12:00:05Z"
        masterAddress: 10.0.0.0
        masterPort: 29500
        members: [{rank: 0, pod: sentiment-aaaaa-0-1, uid: pod-1}, {rank: 1, pod: sentiment-aaaaa-1-1, uid: pod-2}]
        standIns: []
        avoidNodes: []
      attempts: []
    """)


def test_a_pod_whose_address_the_api_server_does_not_know_yet_has_the_one_its_agent_says() -> None:
    story = Story()
    story.go()
    story.pods_start()
    story.change(0, address="")
    story.go()
    assert story.job.status.gang.master_address == "10.0.0.0"


def test_a_gang_is_running_when_all_members_have_left_initializing() -> None:
    story = Story()
    story.go()
    story.pods_start()
    story.go()
    story.workers_train(1)
    story.go()
    assert story.say() == "Starting: generation 1: 1 of 2 nodes have started"
    story.workers_train()
    story.go()
    assert story.say() == "Running: generation 1 trains on 2 nodes"
    assert (story.phase, story.status["gang"]["ready"], story.holds) == ("Running", 2, {"Ready"})


def test_a_script_need_not_tell_its_phase_to_be_running() -> None:
    story = Story(base=SCRIPT)
    story.go()
    story.pods_start()
    story.go()
    for rank in (0, 1):
        story.report(rank, generation=1, state="Running")
    story.go()
    assert story.phase == "Running"


WAITING = {
    "a pod that no node can take: its rank and the scheduler's words": (
        {"unschedulable": "0/3 nodes are available: 3 Insufficient cpu."},
        "Unschedulable: rank 1 of 2: pod sentiment-aaaaa-1-1 cannot be scheduled: 0/3 nodes are available: 3 Insufficient cpu.",
        {"Reconciling"},
    ),
    "a claim that there is not: stalled, for somebody has to make it": (
        {"unschedulable": '0/3 nodes are available: persistentvolumeclaim "data" not found. not found'},
        'ClaimMissing: rank 1 of 2: pod sentiment-aaaaa-1-1 cannot be scheduled: 0/3 nodes are available: persistentvolumeclaim "data" not found. not found',
        {"Stalled"},
    ),
    "a registry that does not answer": (
        {"containers": (ContainerView("agent", True, waiting_reason="RegistryUnavailable"),)},
        "ImagePullFailed: rank 1 of 2: the image of container agent of pod sentiment-aaaaa-1-1 cannot be pulled: RegistryUnavailable",
        {"Stalled"},
    ),
    "an init container that fails": (
        {"containers": (ContainerView("agent", True, waiting_reason="CrashLoopBackOff", last_exit_code=1, last_exit_reason="Error"),)},
        "StartFailed: rank 1 of 2: container agent of pod sentiment-aaaaa-1-1 does not start: CrashLoopBackOff (ended with 1: Error)",
        {"Stalled"},
    ),
    "an image that cannot be pulled: stalled, for somebody has to act": (
        {"containers": (ContainerView("trainer", False, waiting_reason="ImagePullBackOff", waiting_message="not found"),)},
        "ImagePullFailed: rank 1 of 2: the image of container trainer of pod sentiment-aaaaa-1-1 cannot be pulled: not found",
        {"Stalled"},
    ),
    "a secret that is missing: stalled, and it costs no restart": (
        {"containers": (ContainerView("trainer", False, waiting_reason="CreateContainerConfigError", waiting_message='secret "s3-credentials" not found'),)},
        'SecretMissing: rank 1 of 2: container trainer of pod sentiment-aaaaa-1-1 cannot be configured: secret "s3-credentials" not found',
        {"Stalled"},
    ),
    "another thing that a container refers to is missing": (
        {"containers": (ContainerView("trainer", False, waiting_reason="CreateContainerConfigError", waiting_message="no user"),)},
        "ContainerConfigError: rank 1 of 2: container trainer of pod sentiment-aaaaa-1-1 cannot be configured: no user",
        {"Stalled"},
    ),
    "an image name that is no image name": (
        {"containers": (ContainerView("trainer", False, waiting_reason="InvalidImageName", waiting_message="bad"),)},
        "InvalidImage: rank 1 of 2: the image name of container trainer of pod sentiment-aaaaa-1-1 is invalid: bad",
        {"Stalled"},
    ),
    "a container that ends as soon as it starts, such as an image without Python": (
        {"containers": (ContainerView("trainer", False, waiting_reason="CrashLoopBackOff", last_exit_code=127, last_exit_reason="Error"),)},
        "StartFailed: rank 1 of 2: container trainer of pod sentiment-aaaaa-1-1 does not start: CrashLoopBackOff (ended with 127: Error)",
        {"Stalled"},
    ),
    "a container that is being created": (
        {"node": "node-1", "containers": (ContainerView("trainer", False, waiting_reason="ContainerCreating"),)},
        "ContainerCreating: rank 1 of 2: pod sentiment-aaaaa-1-1 is being started on node-1",
        {"Reconciling"},
    ),
    "an agent that has not reported": (
        {"phase": "Running", "containers": (RUNNING,)},
        "WaitingForAgent: rank 1 of 2: the agent of pod sentiment-aaaaa-1-1 has not reported yet",
        {"Reconciling"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("pod", "said", "holds"), WAITING.values(), ids=WAITING.keys())
def test_what_a_gang_waits_for_is_told_with_its_ranks(pod: dict, said: str, holds: set[str]) -> None:
    story = Story()
    story.go()
    story.pods_start(0)
    story.change(1, **pod)
    story.go()
    assert (story.say(), story.holds, story.phase) == (said, holds, "Pending")
    assert (story.generation, story.restarts, story.attempts) == (1, 0, [])
    story.pods_start(1)
    story.go()
    assert (story.phase, story.holds) == ("Starting", {"Reconciling"}), "it heals by itself"


def test_the_most_telling_reason_is_told_for_all_ranks_that_share_it_and_many_ranks_are_counted() -> None:
    story = Story(nodes=8)
    story.go()
    for rank in range(1, 8):
        story.change(rank, unschedulable="no room")
    story.go()
    assert (
        story.say()
        == "Unschedulable: ranks 1, 2, 3, 4 and 3 more of 8: pod sentiment-aaaaa-1-1 cannot be scheduled: no room"
    )
    story.change(7, containers=(ContainerView("trainer", False, waiting_reason="ErrImagePull"),), unschedulable="")
    story.go()
    assert story.say().startswith("ImagePullFailed: rank 7 of 8")


def test_a_quota_that_refuses_pods_is_told() -> None:
    story = Story()
    story.go()
    story.vanish(1)
    story.obstacle = Problem("QuotaExceeded", "the API server refuses the pod: exceeded quota: team-a")
    plan = story.go()
    assert story.say() == "QuotaExceeded: rank 1 of 2: the API server refuses the pod: exceeded quota: team-a"
    assert plan.create == (NewPod(1, 1),), "it is tried again"


PROBLEMS = {reason: Problem(reason, f"why it is {reason}") for reason in ("UnknownProfile", "EndpointNotAllowed")}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=[f"{name} costs no pod and heals" for name in PROBLEMS])
def test_a_spec_that_only_the_operator_can_see_to_be_wrong_stalls(problem: Problem) -> None:
    story = Story()
    story.problem = problem
    plan = story.go()
    assert (plan.create, plan.delete, story.job.status.gang) == ((), (), None)
    assert (story.phase, story.holds, story.say()) == ("Pending", {"Stalled"}, f"{problem.reason}: {problem.message}")
    assert story.go().status == plan.status
    story.problem = None
    plan = story.go()
    assert plan.create == (NewPod(0, 1), NewPod(1, 1))
    assert story.holds == {"Reconciling"}


def test_a_problem_that_shows_while_the_job_trains_does_not_touch_the_gang() -> None:
    story = Story().trains()
    story.problem = PROBLEMS["UnknownProfile"]
    plan = story.go()
    assert (plan.create, plan.delete, story.phase) == ((), (), "Running")


def test_a_problem_that_shows_while_a_pod_must_be_replaced_stalls_and_heals() -> None:
    story = Story().trains()
    story.problem = PROBLEMS["UnknownProfile"]
    story.vanish(1)
    plan = story.go()
    assert plan.create == (), "a pod of an unknown profile cannot be rendered"
    assert (story.holds, story.say()) == ({"Stalled"}, "UnknownProfile: why it is UnknownProfile")
    story.problem = None
    assert story.go().create == (NewPod(1, 2),)
    assert story.recovers().restarts == 1


def test_a_job_that_is_being_deleted_is_left_to_the_garbage_collector() -> None:
    story = Story().trains()
    metadata = story.job.metadata.model_copy(update={"deletion_timestamp": "2026-01-01T12:00:00Z"})
    story.job = story.job.model_copy(update={"metadata": metadata})
    story.vanish(1)
    plan = story.look()
    assert (plan.status, plan.create, plan.delete) == (story.job.status, (), ())


def test_a_gang_that_cannot_be_placed_takes_the_size_that_spec_asks_for_now() -> None:
    story = Story(nodes=4)
    story.go()
    for rank in range(4):
        story.change(rank, unschedulable="no room")
    story.go()
    story.edit(workers=story.job.spec.workers.model_copy(update={"nodes": 2}))
    plan = story.go()
    assert (story.generation, story.job.status.gang.nodes) == (2, 2)
    assert [pod.rank for pod in plan.delete] == [2, 3]
