"""The cache: what the watches, lists and answers say of jobs and pods, in whatever order they say it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.cache import REMEMBER_SECONDS, Cache, JobKey
from finetune_operator.views import pod_view
from tests.operator.documents import JOB_UID, job_body

KEY = JobKey(("team-a", "sentiment"))


def job(version: int, uid: str = JOB_UID, **status: Any) -> dict[str, Any]:
    return job_body(uid=uid, resourceVersion=str(version), managedFields=["much"], annotations={"much": "more"}) | {
        "status": status
    }


def pod(
    version: int, uid: str = "pod-1", *, phase: str = "Pending", job_uid: str = JOB_UID, **metadata: Any
) -> dict[str, Any]:
    owner = {"kind": "FineTuneJob", "name": "sentiment", "uid": job_uid, "controller": True}
    labels = {"finetune.dev/rank": "0", "finetune.dev/generation": "1"}
    base = {
        "name": f"p-{uid}",
        "namespace": "team-a",
        "uid": uid,
        "resourceVersion": str(version),
        "labels": labels,
        "ownerReferences": [owner],
    }
    return {"metadata": base | metadata, "status": {"phase": phase}}


def test_what_nobody_reads_is_not_kept() -> None:
    cache = Cache()
    assert cache.observe_job(job(1)) == KEY
    assert cache.job(KEY)["metadata"].keys() == {
        "name",
        "namespace",
        "uid",
        "generation",
        "resourceVersion",
        "creationTimestamp",
    }


def test_an_older_state_changes_nothing_whoever_tells_it() -> None:
    cache = Cache()
    cache.observe_job(job(10, phase="new"))
    cache.observe_job(job(9, phase="old"))
    cache.observe_pod(pod(10, phase="Running"))
    cache.observe_pod(pod(9))
    assert cache.job(KEY)["status"] == {"phase": "new"}
    assert cache.pod("pod-1").phase == "Running"


def test_what_a_watch_repeats_of_a_state_that_an_answer_has_shown_leaves_it_as_it_is() -> None:
    cache = Cache()
    key = cache.observe_job(job_body(resourceVersion="7"))
    known = cache.job(key)
    cache.observe_job(job_body(resourceVersion="7"))
    assert cache.job(key) is known, "else what has been made from it would be made again"


def test_resource_versions_are_compared_as_numbers() -> None:
    cache = Cache()
    cache.observe_job(job(99, phase="old"))
    cache.observe_job(job(100, phase="new"))
    assert cache.job(KEY)["status"] == {"phase": "new"}


def test_what_is_deleted_is_gone_and_a_late_answer_does_not_bring_it_back() -> None:
    cache = Cache()
    cache.observe_job(job(1))
    cache.observe_pod(pod(1))
    cache.observe_job(job(3), deleted=True)
    assert cache.observe_pod(pod(3), deleted=True) == KEY
    cache.observe_job(job(2))
    cache.observe_pod(pod(2))
    assert (cache.job(KEY), cache.pods_of(JOB_UID), cache.pod_uids()) == (None, (), set())


def test_a_job_of_the_same_name_takes_the_place_of_the_old_one() -> None:
    cache = Cache()
    cache.observe_job(job(1))
    cache.observe_job(job(3), deleted=True)
    cache.observe_job(job(4, uid="new"))
    cache.observe_job(job(2))
    cache.observe_job(job(3), deleted=True)
    assert cache.job(KEY)["metadata"]["uid"] == "new"


def test_a_job_whose_end_no_watch_has_shown_is_replaced_by_a_newer_one_and_does_not_come_back() -> None:
    cache = Cache()
    cache.observe_job(job(1))
    cache.observe_job(job(4, uid="new"))
    cache.observe_job(job(2))
    assert cache.job(KEY)["metadata"]["uid"] == "new"


def test_members_are_known_whether_their_pods_are_there_or_not() -> None:
    cache = Cache()
    cache.observe_job(job(1, gang={"generation": 2, "members": [{"rank": 0, "uid": "a"}, {"rank": 1, "uid": "b"}]}))
    cache.observe_job(job(2, uid="new", gang={"generation": 1}))
    assert cache.member_uids() == set(), "of the newest version alone"
    cache.observe_job(job(3, uid="new", gang={"generation": 1, "members": [{"rank": 0, "uid": "c"}]}))
    assert cache.member_uids() == {"c"}


def test_pods_of_a_job_come_oldest_first_and_only_its_own() -> None:
    cache = Cache()
    cache.observe_pod(pod(1, "b", creationTimestamp="2026-01-01T00:00:02Z"))
    cache.observe_pod(pod(1, "a", creationTimestamp="2026-01-01T00:00:01Z"))
    cache.observe_pod(pod(1, "c", job_uid="another", creationTimestamp="2026-01-01T00:00:00Z"))
    assert [view.uid for view in cache.pods_of(JOB_UID)] == ["a", "b"]
    assert cache.pods_of("unknown") == ()
    assert cache.pods_of("unknown") == (), "asking leaves nothing behind"


def test_a_sweep_removes_what_vanished_while_no_watch_was_looking_and_says_whose_it_was() -> None:
    cache = Cache()
    cache.observe_job(job(1))
    cache.observe_pod(pod(1))
    cache.observe_pod(pod(1, "pod-2"))
    cache.begin_sweep()
    cache.observe_job(job(1))
    cache.observe_pod(pod(1, "pod-2"))
    assert cache.end_sweep() == {KEY}
    assert cache.pod_uids() == {"pod-2"}
    assert cache.job(KEY) is not None


def test_a_sweep_removes_jobs_too() -> None:
    cache = Cache()
    cache.observe_job(job(1))
    cache.begin_sweep()
    assert cache.end_sweep() == {KEY}
    assert list(cache.jobs()) == []


def test_a_sweep_leaves_what_could_not_be_listed() -> None:
    cache = Cache()
    cache.observe_job(job(1))
    cache.observe_pod(pod(1))
    cache.begin_sweep()
    assert cache.end_sweep(spared=[KEY[0]]) == set()
    assert (len(list(cache.jobs())), cache.pod_uids()) == (1, {"pod-1"})


def test_what_a_watch_shows_during_a_sweep_survives_it_even_if_the_list_is_older() -> None:
    cache = Cache()
    cache.begin_sweep()
    cache.observe_pod(pod(5, "young"))
    cache.observe_job(job(5))
    assert cache.end_sweep() == set()
    assert cache.pod_uids() == {"young"}


def test_what_ends_while_a_list_is_under_way_stays_gone() -> None:
    cache = Cache()
    cache.observe_pod(pod(1))
    cache.begin_sweep()
    cache.observe_pod(pod(2), deleted=True)
    cache.observe_pod(pod(1))  # the list was taken just before
    cache.end_sweep()
    assert cache.pod_uids() == set()


def test_a_sweep_that_was_broken_off_removes_nothing() -> None:
    cache = Cache()
    cache.observe_pod(pod(1))
    cache.begin_sweep()
    cache.begin_sweep()
    cache.observe_pod(pod(1))
    assert cache.end_sweep() == set()
    assert cache.pod_uids() == {"pod-1"}


def test_uids_that_are_gone_are_remembered_longer_than_an_answer_is_under_way_but_not_for_ever() -> None:
    now = 0.0
    cache = Cache(lambda: now)
    cache.observe_pod(pod(2), deleted=True)
    for _ in range(3):  # watches that begin anew and anew
        cache.begin_sweep()
        cache.end_sweep()
    cache.observe_pod(pod(1))
    assert cache.pod_uids() == set()
    now = REMEMBER_SECONDS
    cache.begin_sweep()
    cache.end_sweep()
    assert cache._gone == {}


@given(st.permutations(range(1, 6)), st.integers(0, 5))
def test_the_newest_state_wins_in_any_order(order: list[int], deleted_at: int) -> None:
    cache = Cache()
    for version in order:
        cache.observe_pod(pod(version, phase=f"phase-{version}"), deleted=version == deleted_at == 5)
    assert (cache.pod("pod-1").phase if cache.pod("pod-1") else None) == (None if deleted_at == 5 else "phase-5")


# What is seen of a pod.

NO_PODS_OF_OURS = {
    "without an owner": {"ownerReferences": []},
    "owned by something else": {"ownerReferences": [{"kind": "Job", "name": "x", "uid": "y", "controller": True}]},
    "whose owner does not control it": {"ownerReferences": [{"kind": "FineTuneJob", "name": "x", "uid": "y"}]},
    "without labels": {"labels": {}},
    "with a rank that is no number": {"labels": {"finetune.dev/rank": "first", "finetune.dev/generation": "1"}},
    "with a generation that is no number": {"labels": {"finetune.dev/rank": "0", "finetune.dev/generation": "x"}},
    "with numbers that are not ASCII": {"labels": {"finetune.dev/rank": "²", "finetune.dev/generation": "1"}},
}


@pytest.mark.parametrize("metadata", NO_PODS_OF_OURS.values(), ids=NO_PODS_OF_OURS.keys())
def test_a_pod_is_none_of_ours(metadata: dict[str, Any]) -> None:
    assert pod_view(pod(1, **metadata)) is None
    assert Cache().observe_pod(pod(1, **metadata)) is None


def test_what_is_seen_of_a_pod() -> None:
    body = pod(7, phase="Running", creationTimestamp="2026-01-01T00:00:00Z", deletionTimestamp="2026-01-01T00:01:00Z")
    body["spec"] = {"nodeName": "node-1"}
    body["status"] |= {
        "podIP": "10.0.0.1",
        "reason": "Evicted",
        "message": "low on memory",
        "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no room"},
            {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"},
        ],
        "initContainerStatuses": [
            {"name": "agent", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "nope"}}}
        ],
        "containerStatuses": [
            {
                "name": "trainer",
                "restartCount": 2,
                "state": {"terminated": {"exitCode": 1, "reason": "Error", "message": "bye"}},
                "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            }
        ],
    }
    view = pod_view(body)
    assert (view.node, view.address, view.deleting, view.usable, view.scheduled) == (
        "node-1",
        "10.0.0.1",
        True,
        False,
        False,
    )
    assert (view.unschedulable, view.disruption, view.reason, view.message) == (
        "no room",
        "EvictionByEvictionAPI",
        "Evicted",
        "low on memory",
    )
    agent, trainer = view.containers
    assert (agent.is_init, agent.waiting_reason, agent.waiting_message) == (True, "ImagePullBackOff", "nope")
    assert (trainer.exit_code, trainer.exit_reason, trainer.exit_message) == (1, "Error", "bye")
    assert (trainer.last_exit_code, trainer.last_exit_reason, trainer.restart_count, trainer.running) == (
        137,
        "OOMKilled",
        2,
        False,
    )


# Nodes, as far as pods show them.


def conditions(ready: tuple[str, str], containers: str) -> list[dict[str, str]]:
    return [
        {"type": "Ready", "status": ready[0], "reason": ready[1]},
        {"type": "ContainersReady", "status": containers, "reason": "" if containers == "True" else ready[1]},
    ]


READY = {
    "a pod that runs": (conditions(("True", ""), "True"), False),
    "a pod whose node is not ready, as the node lifecycle controller marks it": (
        conditions(("False", ""), "True"),
        True,
    ),
    "a pod whose containers are not ready, as the kubelet says it": (
        conditions(("False", "ContainersNotReady"), "False"),
        False,
    ),
    "a pod that has ended": (conditions(("False", "PodCompleted"), "False"), False),
    "a pod with a readiness gate that somebody has added": (
        conditions(("False", "ReadinessGatesNotReady"), "True"),
        False,
    ),
    "a pod that is not there yet": ([], False),
}


@pytest.mark.parametrize(("said", "lost"), READY.values(), ids=READY.keys())
def test_a_node_that_is_not_ready_shows_in_its_pods(said: list[dict[str, str]], lost: bool) -> None:
    body = pod(1)
    body["status"]["conditions"] = said
    view = pod_view(body)
    assert view is not None
    assert view.node_lost == lost


def test_when_a_container_began_to_run_and_since_when_a_pod_has_no_sandbox_shows_too() -> None:
    body, since = pod(1), "2026-01-01T00:00:00Z"
    sandbox = {"type": "PodReadyToStartContainers", "status": "False", "lastTransitionTime": since}
    body["status"]["conditions"] = [sandbox]
    view = pod_view(body)
    assert view is not None
    assert (view.no_sandbox_since, view.trainer_started) == (since, "")
    sandbox["status"] = "True"
    body["status"]["containerStatuses"] = [{"name": "trainer", "state": {"running": {"startedAt": since}}}]
    view = pod_view(body)
    assert view is not None
    assert (view.no_sandbox_since, view.trainer_started) == ("", since)


NODES = {
    "none": ("a b", False),
    "the only one there is": ("a*", False),
    "one of two": ("a* b", False),
    "two of four": ("a* b* c d", False),
    "two of three": ("a* b* c", True),
    "all": ("a* b*", True),
    "one that has a pod which is well": ("a* a b*", False),
}


@pytest.mark.parametrize(("nodes", "most"), NODES.values(), ids=NODES.keys())
def test_most_nodes_are_lost(nodes: str, most: bool) -> None:
    cache = Cache()
    for number, node in enumerate(nodes.split()):
        body = pod(1, f"pod-{number}", phase="Running") | {"spec": {"nodeName": node.rstrip("*")}}
        body["status"]["conditions"] = conditions(("False" if "*" in node else "True", ""), "True")
        cache.observe_pod(body)
    assert cache.most_nodes_lost() == most


def test_pods_that_have_ended_say_nothing_of_their_nodes() -> None:
    cache = Cache()
    for number, phase in enumerate(("Running", "Running", "Succeeded")):
        body = pod(1, f"pod-{number}", phase=phase) | {"spec": {"nodeName": f"node-{number}"}}
        body["status"]["conditions"] = conditions(("False", ""), "True")
        cache.observe_pod(body)
    assert cache.most_nodes_lost()


# What the watches owe


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def listed(time: Time) -> Cache:
    """A cache that has had a list, 100 seconds before the watches begin."""
    cache = Cache(time)
    cache.begin_sweep()
    cache.observe_job(job(10))
    cache.observe_pod(pod(11))
    assert not cache.is_synced
    cache.end_sweep()
    assert cache.is_synced
    time.now = 100.0
    return cache


def test_what_a_list_has_shown_is_owed_until_the_watch_shows_it(listed: Cache) -> None:
    assert listed.unshown_seconds() == 100
    listed.observe_job(job(10), by_watch=True)
    assert listed.unshown_seconds() == 100, "the pod is owed still"
    listed.observe_pod(pod(12), by_watch=True)
    assert listed.unshown_seconds() == 0


def shown(cache: Cache, time: Time) -> Cache:
    cache.observe_job(job(10), by_watch=True)
    cache.observe_pod(pod(11), by_watch=True)
    time.now = 200.0
    return cache


def test_an_answer_to_a_write_of_ours_is_owed_too(listed: Cache, time: Time) -> None:
    cache = shown(listed, time)
    cache.observe_job(job(20))
    time.now = 250.0
    cache.observe_job(job(21))
    time.now = 260.0
    assert cache.unshown_seconds() == 60, "since the first that was not shown"
    cache.observe_job(job(21), by_watch=True)
    assert cache.unshown_seconds() == 0


def test_a_list_that_shows_what_the_watch_has_shown_owes_nothing(listed: Cache, time: Time) -> None:
    cache = shown(listed, time)
    cache.observe_job(job(10))
    cache.observe_pod(pod(10))
    assert cache.unshown_seconds() == 0


def test_a_watch_that_is_behind_and_moves_is_late_by_when_it_moved_last(listed: Cache, time: Time) -> None:
    cache = shown(listed, time)
    cache.observe_job(job(30))
    time.now = 290.0
    cache.observe_job(job(20), by_watch=True)
    time.now = 300.0
    assert cache.unshown_seconds() == 10
    assert cache.job(KEY)["metadata"]["resourceVersion"] == "30"


@pytest.mark.parametrize("how", ["shown as deleted", "answered as gone", "gone from the lists"])
def test_what_is_gone_owes_nothing(listed: Cache, time: Time, how: str) -> None:
    cache = shown(listed, time)
    cache.observe_pod(pod(20))
    time.now = 300.0
    assert cache.unshown_seconds() == 100
    if how == "shown as deleted":
        cache.observe_pod(pod(21), deleted=True, by_watch=True)
    elif how == "answered as gone":
        cache.forget_pod("pod-1")
    else:
        cache.begin_sweep()
        cache.observe_job(job(10))
        cache.end_sweep()
    assert cache.unshown_seconds() == 0
