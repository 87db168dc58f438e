"""The shape of pods: what of spec they are made with. A suspension that nobody saw, in which it was changed, is made up for."""

from collections.abc import Callable

import pytest

from finetune_api.contract import SHAPE_ANNOTATION, ExitCode
from finetune_api.job import Resources, parse_job
from finetune_api.protocol import Action, Saves
from finetune_operator.plan.observation import NewPod, Problem
from finetune_operator.plan.shape import shape_of
from tests.operator.documents import SCRIPT, a_job
from tests.operator.simulation import Cluster
from tests.operator.story import Story

# What the digest is of.


def test_the_digest_of_a_job_is_the_same_in_every_version() -> None:
    """Else an upgrade would take down every gang."""
    assert shape_of(a_job()) == "6e0a7adf04203227"
    assert shape_of(a_job("workers: {resources: {gpus: 2, memory: 6Gi}, profile: fabric}")) == "bf0bcf5da3a79194"


SHAPES = {
    "more memory": "workers: {resources: {memory: 6Gi}}",
    "fewer cores": "workers: {resources: {cpu: 500m}}",
    "two GPUs": "workers: {resources: {gpus: 2}, processesPerNode: 1}",
    "another profile": "workers: {profile: fabric}",
    "more processes": "workers: {processesPerNode: 2}",
    "more room for checkpoints on their way": "checkpoint: {stagingMemory: 2Gi}",
}


@pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES.keys())
def test_another_shape(spec: str) -> None:
    assert shape_of(a_job(spec)) != shape_of(a_job())


SAME = {
    "what is the default, written out": "workers: {resources: {cpu: '1', memory: 4Gi, gpus: 0}, processesPerNode: 1, profile: default}",
    "more nodes": "workers: {nodes: 7, spares: 2}",
    "whatever else changes": "{checkpoint: {keep: 5, interval: {steps: 5}}, recovery: {maxRestarts: 1}, suspend: true}",
}


@pytest.mark.parametrize("spec", SAME.values(), ids=SAME.keys())
def test_the_same_shape(spec: str) -> None:
    assert shape_of(a_job(spec)) == shape_of(a_job())


# A gang that trains.


def reshape(story: Story, memory: str = "6Gi") -> Story:
    """What is left of ``suspend: true`` with more memory and of ``suspend: false`` after it, where nobody looked between them."""
    workers = story.job.spec.workers.model_copy(update={"resources": Resources(memory=memory)})
    story.edit(suspend=True, workers=workers)
    story.edit(suspend=False)
    return story


def test_a_suspension_that_nobody_saw_is_made_up_for() -> None:
    story = reshape(Story("recovery: {maxRestarts: 0}").trains())
    plan = story.go()
    assert ([pod.rank for pod in plan.delete], plan.create) == ([0, 1], ())
    assert (story.generation, story.phase, story.holds) == (1, "Suspended", {"Suspended", "Reconciling"})
    assert story.say() == "Reshaping: 2 pods are saving and leaving: they were made before spec asked for another shape"
    assert [story.order(rank).generation for rank in (0, 1)] == [1, 1], "the agents may save in peace"
    story.vanish(0)
    plan = story.go()
    assert (plan.delete, plan.create, story.generation) == ((), (), 1)
    story.vanish(1)
    plan = story.go()
    assert (plan.create, plan.delete, story.job.status.gang.members) == ((NewPod(0, 2), NewPod(1, 2)), (), [])
    assert (story.restarts, story.attempts, "Suspended" in story.holds) == (0, [], False)
    assert story.recovers().generation == 2
    assert story.go().delete == ()


def test_a_gang_that_has_done_its_work_meanwhile_has_succeeded() -> None:
    story = Story().trains()
    story.workers_succeed()
    reshape(story).go()
    assert (story.phase, story.attempts) == ("Succeeded", [])


def test_nothing_is_said_any_more_of_the_saves_of_before() -> None:
    story = Story().trains()
    story.report(0, saves=Saves(saving_step=120, saving_since="2026-01-01T12:00:00Z", put_off=1))
    story.go()
    assert story.condition("CheckpointsDelayed").status == "True"
    reshape(story).go()
    story.vanish_all()
    story.go()
    assert (story.generation, story.job.status.saves.saving_step) == (2, None)
    assert story.condition("CheckpointsDelayed").status == "False"


def test_so_is_one_of_more_processes_which_needs_other_pods_and_not_only_another_gang() -> None:
    story = Story().trains()
    story.edit(workers=story.job.spec.workers.model_copy(update={"processes_per_node": 2}))
    assert len(story.go().delete) == 2
    assert story.order(0).action == Action.RUN, "nobody is regrouped into pods of the old shape"
    story.vanish_all()
    story.go()
    assert (story.generation, story.job.status.gang.processes_per_node) == (2, 2)
    assert story.recovers().order(0).processes_per_node == 2


def test_what_has_begun_comes_to_its_end_also_if_the_old_shape_is_asked_for_again() -> None:
    story = reshape(Story().trains())
    story.go()
    story.vanish(0)
    reshape(story, "4Gi")
    plan = story.go()
    assert (plan.create, story.generation, story.say()) == ((), 1, "Suspending: 1 pods are saving and leaving")
    story.vanish(1)
    assert len(story.go().create) == 2
    assert (story.generation, story.attempts) == (2, [])


def test_an_operator_that_dies_between_its_word_and_its_deed_has_said_what_it_does() -> None:
    story = reshape(Story().trains())
    plan = story.look()
    story.job = story.job.model_copy(update={"status": plan.status})
    story.vanish(1)
    assert [pod.rank for pod in story.go().delete] == [0]
    story.vanish(0)
    story.go()
    assert (story.generation, story.attempts) == (2, [])


def test_one_pod_of_another_shape_is_enough() -> None:
    story = Story().trains()
    story.change(1, shape="another")
    assert [pod.rank for pod in story.go().delete] == [0, 1]


def test_pods_of_an_older_operator_fit() -> None:
    story = Story().trains()
    for rank in (0, 1):
        story.change(rank, shape="")
    reshape(story)
    assert (story.go().delete, story.phase, story.generation) == ((), "Running", 1)


def test_while_the_suspension_is_seen_all_is_as_ever() -> None:
    story = Story().trains()
    story.edit(suspend=True, workers=story.job.spec.workers.model_copy(update={"profile": "fabric"}))
    story.go()
    assert story.say() == "Suspending: 2 pods are saving and leaving"
    story.vanish_all()
    story.go()
    assert story.say() == "Suspended: spec.suspend is true; no pod is kept"


def test_a_pod_that_is_stuck_on_a_dead_node_is_not_waited_for() -> None:
    story = reshape(Story().trains().listens())
    story.go()
    story.vanish(0)
    story.change(1, node_lost=True)
    story.wait(20)
    assert story.go().create == (NewPod(0, 2), NewPod(1, 2))
    assert story.look().create == (), "its name is another one"


@pytest.mark.parametrize("base", [None, SCRIPT], ids=["a recipe", "a script"])
def test_a_job_that_has_ended_keeps_its_pods(base: str | None) -> None:
    story = (Story(base=base) if base else Story()).trains()
    story.workers_succeed()
    story.go()
    plan = reshape(story).go()
    assert (plan.delete, plan.create, story.phase) == ((), (), "Succeeded")


# Pods that are no members.


def test_a_gang_that_is_not_complete_gets_pods_of_other_names_at_once() -> None:
    story = Story()
    story.go()
    story.pods_start(0)
    story.go()
    plan = reshape(story).go()
    assert plan.create == (NewPod(0, 2), NewPod(1, 2)), "the names of generation 1 are taken until those are gone"
    assert [pod.name for pod in plan.delete] == ["sentiment-aaaaa-0-1", "sentiment-aaaaa-1-1"]
    for _ in range(3):
        plan = story.go()
        assert (plan.create, plan.delete, story.generation) == ((), (), 2)
    story.pods_start()
    story.go()
    assert [member.pod for member in story.job.status.gang.members] == ["sentiment-aaaaa-0-2", "sentiment-aaaaa-1-2"]
    assert (story.restarts, story.attempts) == (0, [])


def test_nor_does_one_that_recovers_start_with_pods_of_before() -> None:
    story = Story().trains()
    story.vanish(1)
    assert story.go().create == (NewPod(1, 2),)
    story.pods_start(1)
    plan = reshape(story).go()
    assert (story.generation, plan.create) == (3, (NewPod(0, 3), NewPod(1, 3)))
    assert [pod.name for pod in plan.delete] == ["sentiment-aaaaa-0-1", "sentiment-aaaaa-1-2"]
    assert story.attempts == ["PodDeleted"]


def test_a_gang_that_is_held_for_want_of_the_store_stays_so() -> None:
    story = Story().trains()
    story.wait(100)
    for rank in (0, 1):
        story.worker_ends(rank, ExitCode.STORAGE_UNAVAILABLE)
    story.go()
    plan = reshape(story).go()
    assert (plan.create, len(plan.delete)) == ((NewPod(0, 2), NewPod(1, 2)), 2)
    assert (story.generation, story.condition("Ready").reason) == (2, "StorageUnavailable")


def test_spares_of_another_shape_are_made_anew() -> None:
    story = Story("workers: {spares: 1}").trains()
    story.pods_start(2)
    story.go()
    story.change(2, shape="another")
    plan = story.go()
    assert ([pod.rank for pod in plan.delete], plan.create) == ([2], (NewPod(3, 1),))
    story.vanish(0)
    story.go()
    assert story.job.status.gang.members == [], "one that is of another shape stands in for nobody"


def test_a_shape_that_cannot_be_had_is_told_and_heals() -> None:
    story = reshape(Story().trains())
    story.go()
    story.vanish_all()
    story.problem = Problem("UnknownProfile", "there is no such profile")
    plan = story.go()
    assert (plan.create, story.holds, story.condition("Stalled").reason) == ((), {"Stalled"}, "UnknownProfile")
    story.problem = None
    assert len(story.go().create) == 2
    assert story.recovers().attempts == []


# Whole, against an API server.


def miss_a_suspension(cluster: Cluster, **workers: object) -> None:
    cluster.edit(suspend=True, workers=cluster.job["spec"]["workers"] | workers)
    cluster.edit(suspend=False)


@pytest.mark.parametrize("restarts", [False, True], ids=["for a moment", "while no operator runs"])
async def test_a_job_that_is_suspended(restarts: bool) -> None:
    cluster = Cluster()
    await cluster.settle()
    miss_a_suspension(cluster, resources={"memory": "6Gi"}, processesPerNode=2)
    if restarts:
        cluster.restart_operator()
    await cluster.settle()
    assert (cluster.phase, cluster.generation, cluster.status.get("attempts", [])) == ("Running", 2, [])
    limits = [pod["spec"]["containers"][0]["resources"]["limits"]["memory"] for pod in cluster.pods()]
    assert limits == [str(8 * 2**30)] * 2, "6Gi, and 1Gi each of staging and of shared memory"
    assert cluster.status["gang"]["processesPerNode"] == 2
    shapes = {pod["metadata"]["annotations"][SHAPE_ANNOTATION] for pod in cluster.pods()}
    assert shapes == {shape_of(parse_job(cluster.job))}
    cluster.check()


LARGE = """
profiles:
  default: {image: "registry.example/finetune-trainer:0.1.0"}
  large: {image: "registry.example/large:1"}
"""


def images(cluster: Cluster) -> set[str]:
    return {
        pod["spec"]["containers"][0]["image"] for pod in cluster.pods() if "deletionTimestamp" not in pod["metadata"]
    }


async def an_assembly(cluster: Cluster) -> None:
    """One pod is there, and its agent talks; the other is not."""
    await cluster.reconcile()
    cluster.watch()
    cluster.start_pod(cluster.pods()[0]["metadata"]["uid"])
    cluster.watch()


async def a_gang(cluster: Cluster) -> None:
    await cluster.settle()


@pytest.mark.parametrize("before", [an_assembly, a_gang])
async def test_pods_of_another_profile_are_no_peers_of_those_that_follow_them(before: Callable) -> None:
    cluster = Cluster()
    cluster.restart_operator(LARGE)
    await before(cluster)
    miss_a_suspension(cluster, profile="large")
    cluster.watch()
    await cluster.reconcile()
    cluster.watch()
    await cluster.settle()
    assert (cluster.phase, images(cluster)) == ("Running", {"registry.example/large:1"})
