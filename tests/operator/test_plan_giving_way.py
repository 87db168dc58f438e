"""Gangs that can be placed in part only: who gives back what, and that all of them end."""

import random
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from finetune_api.contract import ExitCode
from finetune_api.protocol import Action
from finetune_operator.plan.giving_way import PATIENCE_SECONDS, Turn, is_waiting, turn_of
from finetune_operator.plan.observation import NewPod, Problem
from tests.operator.documents import NOON
from tests.operator.story import Story

NO_ROOM = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."


def half_placed(spec: str = "") -> Story:
    """Rank 0 has a node, rank 1 fits nowhere."""
    story = Story(spec)
    story.go()
    story.pods_start(0)
    story.change(1, unschedulable=NO_ROOM)
    story.go()
    assert story.say().startswith("Unschedulable: rank 1 of 2")
    return story


# The user's deadline.


def test_past_its_deadline_a_gang_gives_everything_back_and_comes_again() -> None:
    story = half_placed("pendingDeadlineSeconds: 60")
    assert story.look().look_again_seconds == 15, "somebody before it in the line may come to wait"
    story.wait(59)
    assert story.go().delete == ()
    story.wait(1)
    plan = story.go()
    assert [pod.name for pod in plan.delete] == ["sentiment-aaaaa-0-1", "sentiment-aaaaa-1-1"]
    assert (plan.create, plan.look_again_seconds) == ((), 15)
    assert (story.phase, story.holds, story.generation) == ("Pending", {"Reconciling"}, 2)
    assert (
        story.say()
        == "PendingDeadlineExceeded: not complete after pendingDeadlineSeconds (60 s); all pods are given back, next try at 2026-01-01T12:01:15Z"
    )
    attempt = story.job.status.attempts[0]
    assert (attempt.reason, attempt.start_time, attempt.pod, attempt.last_step) == (
        "PendingDeadlineExceeded", None, None, None,
    )  # fmt: skip
    story.vanish_all()
    story.wait(14)
    assert (story.go().create, story.go().status) == ((), story.job.status)
    story.wait(1)
    assert story.go().create == (NewPod(0, 2), NewPod(1, 2))
    story.pods_start()
    story.go()
    story.workers_train()
    story.go()
    assert (story.say(), story.restarts) == ("Running: generation 2 trains on 2 nodes", 0)


def test_a_gang_that_can_never_be_placed_comes_ever_more_rarely_and_never_fails() -> None:
    story = half_placed("{pendingDeadlineSeconds: 60, recovery: {maxRestarts: 0}}")
    held = []
    for _ in range(20):
        story.wait(60)
        held.append(story.go().look_again_seconds)
        story.vanish_all()
        story.wait(held[-1])
        story.go()
        story.pods_start(0)
        story.change(1, unschedulable=NO_ROOM)
        story.go()
    assert held[:4] == [15, 75, 210, 300]
    assert set(held[3:]) == {300}
    assert [attempt.generation for attempt in story.job.status.attempts] == [1, 20], "the first and the newest"


WAITS_IN_VAIN = {
    "an image that cannot be pulled": lambda s: s.change(1, node="node-1"),
    "an agent that never reports": lambda s: s.change(1, phase="Running", node="node-1"),
    "a quota": lambda s: (s.vanish(1), setattr(s, "obstacle", Problem("QuotaExceeded", "exceeded quota"))),
}


@pytest.mark.parametrize("what", WAITS_IN_VAIN.values(), ids=WAITS_IN_VAIN.keys())
def test_the_deadline_counts_whatever_a_gang_waits_for(what) -> None:
    story = Story("pendingDeadlineSeconds: 60")
    story.go()
    story.pods_start(0)
    what(story)
    assert story.go().look_again_seconds is not None
    story.wait(60)
    assert "sentiment-aaaaa-0-1" in [pod.name for pod in story.go().delete]


def test_the_deadline_counts_anew_for_each_incarnation_and_not_while_the_job_trains_or_is_suspended() -> None:
    story = Story("pendingDeadlineSeconds: 60").trains()
    story.wait(3600)
    story.vanish(1)
    assert story.go().create == (NewPod(1, 2),)
    story.wait(59)
    assert story.go().delete == ()
    story.edit(suspend=True)
    story.go()
    story.vanish_all()
    story.go()
    story.wait(3600)
    story.edit(suspend=False)
    assert len(story.go().create) == 2
    story.wait(59)
    assert story.go().delete == ()
    story.wait(1)
    assert len(story.go().delete) == 2


def held_for(seconds: float) -> Story:
    """A gang that is held for want of the store, and is tried again in so many seconds; its deadline is shorter."""
    story = Story("pendingDeadlineSeconds: 60").trains()
    story.wait(100)
    for _ in range(20):
        story.worker_ends(0, ExitCode.STORAGE_UNAVAILABLE, message="503 SlowDown")
        story.worker_ends(1, 1)
        wait = story.go().look_again_seconds
        assert wait is not None
        if wait >= seconds:
            return story
        story.wait(wait)
        story.report(0)
        story.report(1)
        story.go()
        story.workers_train()
        story.go()
        story.wait(10)
    raise AssertionError("it is never held for so long")


def test_the_deadline_does_not_count_while_a_gang_is_held() -> None:
    story = held_for(120).listens()
    story.wait(70)
    story.report(0)
    story.report(1)
    again = story.go().look_again_seconds
    assert again is not None
    assert again > 0
    before = story.job.status
    story.heard = {}  # by another operator process
    story.listens()
    plan = story.go()
    assert (plan.create, plan.delete, story.condition("Ready").reason) == ((), (), "StorageUnavailable")
    assert story.job.status == before


def test_the_deadline_counts_from_when_a_held_gang_may_start() -> None:
    story = held_for(120)
    left = story.go().look_again_seconds
    assert left is not None
    story.vanish(1)
    story.go()
    story.wait(left + 59)
    assert story.go().delete == ()
    story.wait(1)
    assert [pod.rank for pod in story.go().delete] == [0, 1]


def test_the_deadline_does_not_count_while_a_gang_waits_after_failures() -> None:
    story = Story("{pendingDeadlineSeconds: 60, recovery: {maxRestarts: 100}}").trains()
    for _ in range(8):
        story.worker_ends(0, signal=11)
        story.worker_ends(1, 1)
        wait = story.go().look_again_seconds
        if wait:
            story.wait(wait)
            story.go()
    story.worker_ends(0, signal=11)
    story.worker_ends(1, 1)
    assert story.go().look_again_seconds == 256
    assert story.say().startswith("BackingOff")
    story.wait(100)
    assert story.go().look_again_seconds == 156


def test_a_gang_that_recovers_gives_its_survivors_back_too() -> None:
    story = Story("pendingDeadlineSeconds: 60").trains()
    story.vanish(1)
    story.go()
    story.wait(60)
    plan = story.go()
    assert [pod.name for pod in plan.delete] == ["sentiment-aaaaa-0-1", "sentiment-aaaaa-1-2"]
    assert (story.phase, story.restarts) == ("Recovering", 1)


def test_without_a_deadline_and_without_others_a_gang_waits_for_ever() -> None:
    story = half_placed()
    story.wait(10**6)
    assert (story.go().delete, story.generation) == ((), 1)


# The line.


def test_half_a_gang_gives_way_as_soon_as_somebody_before_it_cannot_be_placed() -> None:
    story = half_placed()
    story.flags = {"senior_waits": True}
    plan = story.go()
    assert len(plan.delete) == 2
    assert (
        story.say()
        == "GaveWay: placed in part only, while a job that goes first cannot be placed either; all pods are given back, next try at 2026-01-01T12:00:15Z"
    )
    assert (story.attempts, story.phase, story.holds) == (["GaveWay"], "Pending", {"Reconciling"})


def test_the_first_in_the_line_waits_until_its_patience_is_over() -> None:
    story = half_placed()
    story.flags = {"junior_waits": True}
    story.wait(PATIENCE_SECONDS - 1)
    assert story.go().delete == ()
    story.wait(1)
    assert (len(story.go().delete), story.attempts) == (2, ["GaveWay"])


GIVES_NOTHING = {
    "a gang of which nothing is placed": lambda s: s.change(0, unschedulable=NO_ROOM, node=""),
    "a gang of which all is placed": lambda s: s.change(1, unschedulable="", node="node-1"),
    "a gang whose second pod nobody has looked at yet": lambda s: s.change(1, unschedulable=""),
    "a gang that is complete": lambda s: s.pods_start(1) or s.change(1, unschedulable=""),
}


@pytest.mark.parametrize("what", GIVES_NOTHING.values(), ids=GIVES_NOTHING.keys())
def test_who_does_not_give_way(what) -> None:
    story = half_placed()
    story.flags = {"senior_waits": True, "junior_waits": True}
    what(story)
    story.wait(PATIENCE_SECONDS)
    assert (story.go().delete, story.generation) == ((), 1)


def test_half_a_quota_is_given_back_too() -> None:
    story = Story()
    story.go()
    story.vanish(1)
    story.flags = {"senior_waits": True}
    story.obstacle = Problem("QuotaExceeded", "the API server refuses the pod: exceeded quota")
    assert [pod.name for pod in story.go().delete] == ["sentiment-aaaaa-0-1"]


def body_of(story: Story, name: str, created: int, **more: str) -> dict[str, Any]:
    created_at = f"2026-01-01T12:00:{created:02}Z"
    metadata = {"namespace": "team-a", "name": name, "creationTimestamp": created_at} | more
    status = story.job.status.to_wire() if story.job.status else None
    return {
        "metadata": metadata,
        "spec": {"suspend": story.job.spec.suspend, "workers": {"nodes": story.job.spec.workers.nodes}},
        "status": status,
    }


def test_who_has_trained_goes_first_and_then_who_is_older() -> None:
    trained = Story().trains()
    trained.vanish(1)
    trained.go()
    new = half_placed()
    line = [body_of(new, "b", 5), body_of(new, "c", 4), body_of(new, "a", 5), body_of(trained, "late", 9)]
    assert [body["metadata"]["name"] for body in sorted(line, key=turn_of)] == ["late", "c", "a", "b"]


def test_who_waits() -> None:
    story = half_placed()
    pods = tuple(story.pods.values())
    assert is_waiting(body_of(story, "a", 0), pods, refused=False)
    assert not is_waiting(body_of(story, "a", 0), pods[:1], refused=False)
    assert is_waiting(body_of(story, "a", 0), pods[:1], refused=True)
    story.edit(suspend=True)
    assert not is_waiting(body_of(story, "a", 0), pods, refused=False)
    story.edit(suspend=False)
    assert not is_waiting(body_of(story, "a", 0, deletionTimestamp="2026-01-01T12:00:00Z"), pods, refused=False)
    ended = body_of(story, "a", 0)
    ended["status"]["completionTime"] = "2026-01-01T12:00:00Z"
    assert not is_waiting(ended, pods, refused=False), "the pods of a job that has failed may stay for their logs"
    running = Story("workers: {spares: 1}").trains()
    running.change(2, unschedulable=NO_ROOM)
    assert not is_waiting(body_of(running, "a", 0), tuple(running.pods.values()), refused=False), "only for a spare"
    running.vanish(1)
    running.go()
    assert not is_waiting(body_of(running, "a", 0), tuple(running.pods.values()), refused=False), "still only for it"


# All of them together: some places, a scheduler that fills them in any order, and jobs that each fit alone.


class Crowd:
    """Jobs that want the same places. Time goes in steps; who acts first in a step is random, and who does not act at all."""

    def __init__(self, places: int, sizes: list[int], seed: int) -> None:
        self.places, self.dice = places, random.Random(seed)
        self.stories = [Story(nodes=size) for size in sizes]
        self.work = [self.dice.randint(1, 40) for _ in sizes]  # seconds of training that each still needs

    def run_until_all_have_ended(self, *numbers: int, seconds: range) -> None:
        for second in seconds:
            for number in self.dice.sample(range(len(self.stories)), len(self.stories)):
                if self.dice.random() < 0.8:  # everything may be slow
                    self.act(number, second)
                self.schedule()
            if all(has_ended(self.stories[number]) for number in numbers):
                return
        raise AssertionError([(story.say(), story.generation) for story in self.stories])

    def act(self, number: int, second: int) -> None:
        """Pods that must go are gone, those that were placed report, workers train on, and the operator looks at the job."""
        story = self.stories[number]
        story.pods = {uid: pod for uid, pod in story.pods.items() if pod.usable}
        for pod in story.pods.values():
            if pod.node:
                story.report(pod.rank)
        if story.job.status and story.job.status.gang.members and not has_ended(story):
            self.work[number] -= 1
            if self.work[number] <= 0:
                story.workers_succeed()
        story.now = NOON + timedelta(seconds=second)
        own, waiting = turn_of(self.body(number)), self.turns_of_waiting(number)
        story.flags = {
            "senior_waits": any(turn < own for turn in waiting),
            "junior_waits": any(turn > own for turn in waiting),
        }
        story.go()

    def body(self, number: int) -> dict[str, Any]:
        return body_of(self.stories[number], str(number), number)

    def turns_of_waiting(self, but: int) -> list[Turn]:
        bodies = [(self.body(number), story) for number, story in enumerate(self.stories) if number != but]
        return [turn_of(body) for body, story in bodies if is_waiting(body, story.pods.values(), refused=False)]

    def schedule(self) -> None:
        """Fill free places with pods in any order; tell the rest that there is no room."""
        alive = [(story, pod) for story in self.stories if not has_ended(story) for pod in story.pods.values()]
        free = self.places - sum(bool(pod.node) for _, pod in alive)
        assert free >= 0
        waiting = [(story, pod) for story, pod in alive if pod.usable and not pod.node]
        for story, pod in self.dice.sample(waiting, len(waiting)):
            if free > 0:
                story.change(pod.uid, node=f"node-{free}", unschedulable="")
            else:
                story.change(pod.uid, unschedulable=NO_ROOM)
            free -= 1


def has_ended(story: Story) -> bool:
    return story.job.status is not None and story.phase == "Succeeded"


@settings(max_examples=40, deadline=None, phases=[Phase.generate])
@given(places=st.integers(1, 8), sizes=st.lists(st.integers(1, 8), min_size=2, max_size=6), seed=st.integers(0, 2**32))
def test_jobs_that_each_fit_alone_all_end(places: int, sizes: list[int], seed: int) -> None:
    crowd = Crowd(places, [min(size, places) for size in sizes], seed)
    crowd.run_until_all_have_ended(*range(len(sizes)), seconds=range(int(PATIENCE_SECONDS)))


@settings(max_examples=5, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32))
def test_the_oldest_job_that_never_fits_starves_nobody(seed: int) -> None:
    Crowd(4, [9, 3, 4, 2], seed).run_until_all_have_ended(1, 2, 3, seconds=range(0, 4000, 5))


# Growth.


def half_grown(spares: int = 0, nodes: int = 4, lacking: int = 1) -> Story:
    """It trains on two nodes and is to have more; of the pods behind it the last fit nowhere, and its spares are a day old."""
    story = Story(f"workers: {{spares: {spares}}}").trains()
    for spare in range(2, 2 + spares):
        story.pods_start(spare)
    story.wait(86400)
    story.edit(workers=story.job.spec.workers.model_copy(update={"nodes": nodes}))
    story.go()
    behind = range(2, nodes + spares)
    story.pods_start(*behind[:-lacking])
    for rank in behind[-lacking:]:
        story.change(rank, unschedulable=NO_ROOM)
    story.go()
    return story


def test_half_a_growth_gives_way_to_whoever_waits_and_comes_again() -> None:
    story = half_grown()
    assert story.look().look_again_seconds == 15
    assert story.go().delete == ()
    story.flags = {"senior_waits": True}
    plan = story.go()
    assert (plan.delete, plan.create) == ((), ()), "not before the API server has it"
    plan = story.go()
    assert ([pod.rank for pod in plan.delete], plan.create) == ([2, 3], ())
    assert (story.phase, story.generation, story.attempts) == ("Running", 1, [])
    assert story.say() == (
        "Resizing: generation 1 trains on 2 nodes; workers.nodes is 4: "
        "pods for it were given back to jobs that wait, next try at 2026-01-02T12:02:00Z"
    )
    story.vanish(2)
    story.vanish(3)
    story.flags = {}
    assert (story.go().create, story.look().look_again_seconds) == ((), 120)
    story.wait(119)
    assert story.go().create == ()
    story.wait(1)
    assert [place.rank for place in story.go().create] == [2, 3]
    assert story.job.status.gang.growth_held_until is None
    story.pods_start(2)
    story.pods_start(3)
    story.go()
    assert story.order(0).action == Action.STOP, "to be regrouped in four"


def test_the_first_of_those_that_grow_keeps_its_half_until_its_patience_is_over() -> None:
    story = half_grown()
    story.flags = {"junior_waits": True}
    story.wait(PATIENCE_SECONDS - 1)
    assert story.go().delete == ()
    story.wait(1)
    story.go()
    assert [pod.rank for pod in story.go().delete] == [2, 3]


GROWS_ON = {
    "nobody else waits": lambda s: setattr(s, "flags", {}),
    "nothing of it is placed": lambda s: s.change(2, node="", phase="Pending", unschedulable=NO_ROOM),
    "all of it is placed": lambda s: s.change(3, unschedulable="", node="node-9"),
}


@pytest.mark.parametrize("what", GROWS_ON.values(), ids=GROWS_ON.keys())
def test_which_growth_does_not_give_way(what) -> None:
    story = half_grown()
    story.flags = {"senior_waits": True, "junior_waits": True}
    what(story)
    story.wait(PATIENCE_SECONDS)
    assert (story.go().delete, story.generation) == ((), 1)


def test_spares_are_no_growth_and_stay() -> None:
    story = half_grown(spares=1, nodes=5, lacking=2)
    story.flags = {"junior_waits": True}
    assert story.go().delete == story.go().delete == (), "a growth is as old as its own pods"
    story.flags = {"senior_waits": True}
    story.go()
    left = story.go().delete
    assert len(left) == 3
    for pod in left:
        story.vanish(pod.rank)
    assert story.go().create == ()
    assert [pod.node for pod in story.pods.values() if pod.rank >= 2] == ["node-2"], "one stands by"


def test_a_growth_that_lacks_a_spare_only_is_whole() -> None:
    story = half_grown(spares=1)
    story.flags = {"senior_waits": True, "junior_waits": True}
    assert story.order(0).action == Action.STOP, "to be regrouped in four"
    story.go()
    assert (story.go().delete, story.job.status.gang.growth_held_until) == ((), None)
    assert not is_waiting(body_of(story, "a", 1), tuple(story.pods.values()), refused=False)


def test_a_growth_that_is_taken_back_is_not_held_any_more() -> None:
    story = half_grown()
    story.flags = {"senior_waits": True}
    story.go()
    story.edit(workers=story.job.spec.workers.model_copy(update={"nodes": 2}))
    story.go()
    assert (story.job.status.gang.growth_held_until, story.say()) == (None, "Running: generation 1 trains on 2 nodes")


def test_who_grows_goes_last_in_the_line() -> None:
    growing, new = half_grown(), half_placed()
    pods = tuple(growing.pods.values())
    assert min([body_of(growing, "a", 1), body_of(new, "b", 9)], key=turn_of)["metadata"]["name"] == "b"
    assert is_waiting(body_of(growing, "a", 1), pods, refused=False)
    growing.flags = {"senior_waits": True}
    growing.go()
    assert not is_waiting(body_of(growing, "a", 1), pods, refused=False), "what is held holds up nobody"


def grow(crowd: Crowd, number: int, nodes: int) -> None:
    story = crowd.stories[number]
    story.edit(workers=story.job.spec.workers.model_copy(update={"nodes": nodes}))


def pass_time(crowd: Crowd, seconds: range) -> None:
    for second in seconds:
        for number in range(len(crowd.stories)):
            crowd.act(number, second)
            crowd.schedule()


@settings(max_examples=5, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32))
def test_a_job_that_will_never_have_room_to_grow_starves_nobody(seed: int) -> None:
    crowd = Crowd(5, [2, 3, 2], seed)
    crowd.work[0] = 10**6
    for other in crowd.stories[1:]:
        other.edit(suspend=True)
    pass_time(crowd, range(10))
    grow(crowd, 0, 9)
    pass_time(crowd, range(10, 20))
    assert len(crowd.stories[0].pods) == 9, "it holds all there is"
    for other in crowd.stories[1:]:
        other.edit(suspend=False)
    crowd.run_until_all_have_ended(1, 2, seconds=range(20, 20 + int(PATIENCE_SECONDS)))
    assert crowd.stories[0].generation == 1, "and trained on"


@settings(max_examples=5, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32))
def test_of_two_that_could_each_grow_alone_the_older_does_and_then_the_other(seed: int) -> None:
    crowd = Crowd(6, [2, 2], seed)
    crowd.work = [600, 10**6]
    pass_time(crowd, range(10))
    for number in (1, 0):
        grow(crowd, number, 4)
        crowd.act(number, 10)
    behind = [pod for story in crowd.stories for pod in story.pods.values() if pod.rank == 2]
    for story, pod in zip(crowd.stories, behind, strict=True):  # each gets half
        story.change(pod.uid, node="node-9")
    pass_time(crowd, range(10, 120))
    assert [story.job.status.gang.nodes for story in crowd.stories] == [4, 2]
    crowd.run_until_all_have_ended(0, seconds=range(120, 1200))
    pass_time(crowd, range(1200, 1600))
    assert crowd.stories[1].job.status.gang.nodes == 4
