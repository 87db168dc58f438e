"""The reconciler against an API server in memory: what it asks for, and what it makes of the answers."""

import asyncio
import copy
from typing import Any

import pytest

from finetune_operator.cache import JobKey
from finetune_operator.kube.api import CONFIG_MAPS, JOBS, PODS
from finetune_operator.kube.errors import Conflict, Forbidden, Unavailable
from tests.operator.documents import job_body
from tests.operator.simulation import KEY, Cluster


def message(cluster: Cluster) -> str:
    condition = cluster.status["conditions"][0]
    return f"{condition['reason']}: {condition['message']}"


async def test_a_stale_view_of_the_job_is_a_conflict_and_creates_nothing() -> None:
    cluster = Cluster()
    cluster.edit(suspend=True)
    with pytest.raises(Conflict):
        await cluster.reconcile()
    assert cluster.pods() == []
    cluster.watch()
    await cluster.reconcile()
    assert cluster.phase == "Suspended"


async def test_a_job_that_is_gone_is_no_work() -> None:
    cluster = Cluster()
    cluster.api.remove(JOBS, *KEY)
    cluster.watch()
    assert await cluster.reconcile() is None
    assert cluster.api.writes == []


async def test_what_is_remembered_of_jobs_goes_with_those_that_no_list_shows_any_more() -> None:
    cluster = Cluster()
    await cluster.reconcile()
    reconciler = cluster.reconciler
    reconciler.keep_only(cluster.cache.job_uids())
    assert reconciler._furnished.keys() == reconciler._status._written.keys() == {cluster.job_uid}
    reconciler.keep_only(set())
    assert not reconciler._furnished
    assert not reconciler._status._written


async def test_a_job_that_vanished_unseen_gets_no_pods() -> None:
    cluster = Cluster()
    cluster.api.remove(JOBS, *KEY)
    await cluster.reconcile()
    assert cluster.api.bodies(PODS) == []


async def test_a_job_of_a_schema_that_this_version_does_not_know_is_left_alone() -> None:
    cluster = Cluster()
    cluster.edit(recipe={"from": "the future"})
    cluster.watch()
    assert await cluster.reconcile() is None
    assert cluster.api.writes == []


async def test_the_written_status_is_taken_into_the_cache_and_waiting_agents_are_told() -> None:
    cluster = Cluster()
    await cluster.reconcile()
    assert cluster.changed == [KEY]
    assert cluster.cache.job(KEY)["status"]["gang"]["generation"] == 1
    assert len(cluster.cache.pods_of(cluster.job_uid)) == 2, "created pods are known before the watch shows them"
    assert cluster.api.events, "which has shown nothing yet"


async def test_a_pod_made_by_a_process_that_died_is_found_and_kept() -> None:
    cluster = Cluster()
    await cluster.reconcile()
    cluster.restart_operator()
    for pod in list(cluster.cache.pods_of(cluster.job_uid)):
        cluster.cache._drop_pod(pod.uid)  # as if its list had been asked for just before they were made
    await cluster.reconcile()
    assert len(cluster.cache.pods_of(cluster.job_uid)) == 2
    assert set(cluster.api.pods_created.values()) == {1}


async def test_a_pod_of_that_name_that_is_not_the_job_s_is_told_and_left_alone() -> None:
    cluster = Cluster()
    stranger = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "sentiment-aaaaa-1-1", "namespace": "team-a", "uid": "stranger"},
    }
    cluster.api.store(PODS, copy.deepcopy(stranger) | {"status": {"phase": "Running"}})
    assert await cluster.reconcile() == 0.0, "tell it at once"
    assert await cluster.reconcile() == 15.0, "and try again later"
    assert message(cluster) == "NameTaken: rank 1 of 2: pod sentiment-aaaaa-1-1 exists and is not this job's; delete it"
    assert cluster.generation == 1
    cluster.api.remove(PODS, "team-a", "sentiment-aaaaa-1-1")
    await cluster.settle()
    assert cluster.phase == "Running"


def quota(pod: str) -> Forbidden:
    return Forbidden(f'POST /pods: 403 pods "{pod}" is forbidden: exceeded quota: team, limited: pods=1', status=403)


async def test_a_quota_is_told_and_does_not_keep_the_operator_busy() -> None:
    cluster = Cluster(nodes=4)
    cluster.api.refuse_pods = {str(rank): quota(f"sentiment-aaaaa-{rank}-1") for rank in (1, 2, 3)}
    await cluster.settle()
    assert message(cluster).startswith(
        "QuotaExceeded: ranks 1, 2, 3 of 4: the API server refuses the pod: POST /pods: 403"
    )
    assert cluster.generation == 1
    writes = len(cluster.api.writes)
    for _ in range(5):
        assert await cluster.reconcile() == 15.0
    assert len(cluster.api.writes) == writes
    cluster.api.refuse_pods = {}
    await cluster.settle()
    assert cluster.phase == "Running"


async def test_which_of_many_refusals_is_told_does_not_depend_on_which_answer_came_last() -> None:
    cluster = Cluster(nodes=3)
    order = iter([(3, 2, 1), (1, 2, 3), (2, 3, 1), (3, 1, 2)])

    async def create(resource, namespace, body):
        rank = int(body["metadata"]["labels"]["finetune.dev/rank"])
        for _ in range(ranks[rank]):
            await asyncio.sleep(0)
        raise quota(body["metadata"]["name"])

    cluster.api.create = create
    told = []
    for turn in order:
        ranks = dict(enumerate(turn))
        told.append(await cluster.reconcile())
    assert told == [0.0, 15.0, 15.0, 15.0]


async def test_a_refusal_in_ever_other_words_is_not_tried_again_at_once() -> None:
    cluster = Cluster()
    told = []
    for used in range(4):
        cluster.api.refuse_pods = {"1": Forbidden(f"exceeded quota: team, used: pods={used}", status=403)}
        told.append(await cluster.reconcile())
    assert told == [0.0, 15.0, 15.0, 15.0]
    assert message(cluster).endswith("used: pods=2"), "the newest words that were known when it was written"


async def test_what_the_pods_share_is_told_too_when_it_is_refused() -> None:
    cluster = Cluster()
    apply = cluster.api.apply

    async def refuse(resource, namespace, body):
        raise Forbidden("exceeded quota: objects, requested: count/configmaps=1", status=403)

    cluster.api.apply = refuse
    await cluster.settle()
    assert message(cluster).startswith(
        "QuotaExceeded: ranks 0, 1 of 2: the API server refuses what the pods share: exceeded quota: objects"
    )
    assert cluster.pods() == []
    assert await cluster.reconcile() == 15.0
    cluster.api.apply = apply
    await cluster.settle()
    assert cluster.phase == "Running"


async def test_one_failed_creation_does_not_keep_the_other_pods_from_being_made() -> None:
    cluster = Cluster(nodes=3)
    cluster.api.refuse_pods = {"0": Unavailable("no answer")}
    with pytest.raises(Unavailable):
        await cluster.reconcile()
    assert len(cluster.pods()) == 2


OTHER = JobKey(("team-a", "other"))
NO_ROOM = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no room"}]


async def half_a_gang_beside_an_older_job() -> tuple[Cluster, dict[str, Any]]:
    """Return a cluster with room for one pod of its job, and a pod of the other job for which there is none."""
    cluster = Cluster()
    await cluster.reconcile()
    cluster.watch()
    one, two = (pod["metadata"]["uid"] for pod in cluster.pods())
    cluster.change_pod(two, conditions=NO_ROOM)
    cluster.start_pod(one)
    placed = next(copy.deepcopy(pod) for pod in cluster.pods() if pod["metadata"]["uid"] == one)
    cluster.api.store(PODS, placed | {"spec": placed["spec"] | {"nodeName": "node-1"}})
    older = job_body(name="other", uid="bbbbbbbb", creationTimestamp="2026-01-01T11:59:59Z")
    cluster.api.store(JOBS, older | {"status": {"gang": {"generation": 1, "nodes": 2}}}, "ADDED")
    owner = [placed["metadata"]["ownerReferences"][0] | {"name": "other", "uid": "bbbbbbbb"}]
    others_pod = {"name": "other-0", "uid": "others", "resourceVersion": "1", "ownerReferences": owner}
    cluster.watch()
    return cluster, placed | {"metadata": placed["metadata"] | others_pod, "status": {"conditions": NO_ROOM}}


async def test_half_a_gang_sees_who_else_waits_and_gives_way_to_who_goes_first() -> None:
    cluster, waiting = await half_a_gang_beside_an_older_job()
    assert await cluster.reconcile() == 15.0
    assert cluster.generation == 1, "the other one has all it needs"
    cluster.cache.observe_pod(waiting)
    await cluster.reconciler.reconcile(OTHER)
    await cluster.reconcile()
    assert message(cluster).startswith("GaveWay: ")
    own = [pod for pod in cluster.pods() if pod["metadata"]["labels"]["finetune.dev/job"] == "sentiment"]
    assert len(own) == 2
    assert all("deletionTimestamp" in pod["metadata"] for pod in own)


@pytest.mark.parametrize("gone", [False, True], ids=["who has been placed", "who has been deleted"])
async def test_nobody_gives_way_to(gone: bool) -> None:
    cluster, waiting = await half_a_gang_beside_an_older_job()
    cluster.cache.observe_pod(waiting)
    await cluster.reconciler.reconcile(OTHER)
    if gone:
        cluster.api.remove(JOBS, *OTHER)
        cluster.watch()
    else:
        cluster.cache.observe_pod(
            waiting | {"metadata": waiting["metadata"] | {"resourceVersion": "9999"}, "status": {"phase": "Running"}}
        )
    await cluster.reconciler.reconcile(OTHER)
    await cluster.reconcile()
    assert cluster.generation == 1


async def test_deleting_what_is_gone_already_is_no_error_and_ends_there() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.edit(suspend=True)
    cluster.watch()
    for pod in list(cluster.pods()):
        cluster.remove_pod(pod["metadata"]["uid"])  # and no watch shows it
    await cluster.reconcile()
    await cluster.reconcile()
    assert message(cluster) == "Suspended: spec.suspend is true; no pod is kept"


async def test_what_pods_share_is_applied_before_the_first_of_them_and_again_when_the_spec_is_another() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.remove_pod(cluster.status["gang"]["members"][0]["uid"])
    await cluster.settle()
    assert cluster.api.writes.count("apply configmaps/sentiment-aaaaa") == 1
    cluster.edit(suspend=True)
    await cluster.settle()
    cluster.edit(suspend=False, checkpoint={"interval": {"steps": 7}})
    await cluster.settle()
    assert cluster.phase == "Running"
    assert cluster.api.writes.count("apply configmaps/sentiment-aaaaa") == 2
    (config,) = cluster.api.bodies(CONFIG_MAPS)
    assert '"intervalSteps": 7' in config["data"]["job.json"]


async def test_pods_of_other_namespaces_cannot_claim_a_place() -> None:
    cluster = Cluster()
    await cluster.settle()
    body = copy.deepcopy(cluster.pods()[0])
    body["metadata"] |= {"namespace": "team-evil", "uid": "impostor", "creationTimestamp": "999999999"}
    cluster.api.store(PODS, body, "ADDED")
    cluster.watch()
    assert cluster.cache.pod("impostor")
    cluster.remove_pod(cluster.status["gang"]["members"][1]["uid"])
    await cluster.settle()
    assert cluster.phase == "Running"
    assert "impostor" not in {member["uid"] for members in cluster.api.member_sets.values() for member in members}


async def test_an_unknown_profile_that_a_job_was_suspended_for_stalls_it_whether_that_was_seen_or_not() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.edit(workers={"nodes": 2, "profile": "gone"})
    await cluster.settle()
    assert (
        message(cluster) == "UnknownProfile: spec.workers.profile: there is no profile 'gone'; known: default, fabric"
    )
    cluster.edit(workers={"nodes": 2})
    await cluster.settle()
    assert cluster.phase == "Running"
