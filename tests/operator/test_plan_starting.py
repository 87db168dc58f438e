"""Members that are heard, and do not start what they are told to."""

from dataclasses import replace

from finetune_api.protocol import AgentState, Doing, Heartbeat, Phase, Stalled
from finetune_operator.plan.observation import NewPod
from finetune_operator.plan.starting import START_SECONDS
from tests.operator.story import Story


def wedged(nodes: int = 1) -> Story:
    """Generation 1 has failed, generation 2 has its members, and nobody has started it."""
    story = Story(nodes=nodes).trains().listens()
    for rank in range(nodes):
        story.worker_ends(rank, signal=9)
    story.go()
    story.go()
    assert story.generation == 2
    assert story.job.status.gang.members
    return story


def test_a_pod_whose_last_worker_cannot_be_killed_is_replaced_elsewhere() -> None:
    story = wedged()
    story.passes(int(START_SECONDS) - 1, 0)
    assert (story.generation, story.attempts) == (2, ["WorkerKilled"])
    story.passes(1, 0)
    assert (story.generation, story.attempts) == (3, ["WorkerKilled", "NotStarted"])
    attempt = story.job.status.attempts[-1]
    assert (attempt.pod, attempt.node) == ("sentiment-aaaaa-0-1", "node-0")
    assert attempt.message == (
        "the agent of pod sentiment-aaaaa-0-1 (rank 0) is heard, and has not started generation 2 within 120 s: most often a process of the "
        "one before cannot be killed, for it hangs in a driver or a file system"
    )
    assert [(entry.node, entry.reason) for entry in story.job.status.gang.avoid_nodes] == [("node-0", "NotStarted")]
    assert story.pod(0).name == "sentiment-aaaaa-0-3"
    assert [pod.deleting for pod in story.pods.values()] == [True, False]


def test_of_two_it_is_the_one_that_does_not_start_and_not_the_one_that_waits_for_it() -> None:
    story = wedged(2)
    waits = {"heartbeat": Heartbeat(Phase.INITIALIZING, 0), "exits": []}
    story.report(1, generation=2, state=AgentState.RUNNING, **waits)
    story.report(1, stalled=Stalled(1, Phase.INITIALIZING, 0, 90.0, Doing.WAITING))
    plan = story.look()
    assert plan.look_again_seconds is not None
    story.passes(int(START_SECONDS), 0, 1)
    assert story.attempts[-1] == "NotStarted"
    assert story.job.status.attempts[-1].pod == "sentiment-aaaaa-0-1"
    assert (story.pod(0).name, story.pod(1).name) == ("sentiment-aaaaa-0-3", "sentiment-aaaaa-1-1")


def test_who_takes_long_and_starts_is_left_alone() -> None:
    story = wedged(2)
    story.passes(int(START_SECONDS) - 1, 0, 1)
    story.workers_train()
    story.passes(int(START_SECONDS), 0, 1)
    assert (story.generation, story.phase) == (2, "Running")


def test_who_was_not_heard_for_a_while_has_its_time_again_to_be_told() -> None:
    story = wedged()
    story.wait(10 * START_SECONDS)
    story.hearing = replace(story.hearing, at=story.now)
    uid = story.pod(0).uid
    story.heard[uid] = replace(story.heard[uid], at=story.now, steady_since=story.now)
    story.passes(int(START_SECONDS) - 1, 0)
    assert story.generation == 2
    story.passes(1, 0)
    assert story.generation == 3


def test_a_new_operator_gives_everybody_time() -> None:
    story = wedged()
    story.wait(10 * START_SECONDS)
    story.report(0)
    story.listens()
    story.passes(int(START_SECONDS) - 1, 0)
    assert story.generation == 2
    story.passes(1, 0)
    assert story.generation == 3


def test_a_spare_takes_the_place_of_one_that_does_not_start() -> None:
    story = Story("workers: {spares: 1}", nodes=1).trains().listens()
    story.pods_start(1)
    story.go()
    story.worker_ends(0, signal=9)
    story.go()
    plan = story.passes(int(START_SECONDS), 0, 1)
    assert story.attempts[-1] == "NotStarted"
    assert [member.pod for member in story.job.status.gang.members] == ["sentiment-aaaaa-1-1"]
    assert plan.create in ((), (NewPod(1, 3, ("node-0",)),))
