"""Killing the operator after any of its writes changes nothing in the end.

One life of a job (start, failure, lost pod, suspension, resumption, success, clean-up) is played once without a crash, and then again and
again, dying after the first write, the second, and so on: a new process takes over, knowing only what the API server knows.
"""

from dataclasses import replace

import pytest

from finetune_api.protocol import Checkpoint, Saves
from finetune_operator.kube.api import PODS
from finetune_operator.kube.errors import Unavailable
from finetune_operator.plan.observation import timestamp
from tests.operator.fake_api import Crash
from tests.operator.simulation import KEY, Cluster

SPEC = "{podTTLSecondsAfterFinished: 100, ttlSecondsAfterFinished: 1000}"


async def survive(cluster: Cluster) -> None:
    """Settle, with a new operator process whenever one dies."""
    while True:
        try:
            await cluster.settle()
        except Crash:
            cluster.restart_operator()
        except Unavailable:
            continue  # the queue hands the key out again
        else:
            return


async def scene(cluster: Cluster) -> str:
    """Settle, and return what is to be seen."""
    await survive(cluster)
    cluster.check()
    status = cluster.status
    conditions = sorted(c["type"] for c in status.get("conditions", ()) if c["status"] == "True")
    attempts = [(attempt["generation"], attempt["reason"]) for attempt in status.get("attempts", ())]
    pods = sorted(pod["metadata"]["name"] for pod in cluster.pods())
    # and not when: a new operator needs time to miss somebody
    restarts = {entry["reason"]: entry["used"] for entry in (status.get("restarts") or {}).get("byReason", ())}
    others = sorted(f"{plural}/{name}" for plural, _, name in cluster.api.objects if plural != "pods")
    return f"{cluster.phase} {cluster.generation} {conditions} {attempts} {restarts} {pods} {others}"


async def live(cluster: Cluster) -> list[str]:
    """Play a job's life; return what was to be seen of it on the way."""
    seen = [await scene(cluster)]
    uid = status_members(cluster)[1]
    cluster.agents[uid].worker_ends(71, message="WORLD_SIZE is 3")
    seen.append(await scene(cluster))
    cluster.wait(100)
    cluster.remove_pod(status_members(cluster)[0])
    seen.append(await scene(cluster))
    cluster.edit(suspend=True)
    seen.append(await scene(cluster))
    cluster.edit(suspend=False)
    seen.append(await scene(cluster))
    cluster.train()
    seen.append(await scene(cluster))
    cluster.wait(101)
    seen.append(await scene(cluster))
    cluster.wait(1000)
    seen.append(await scene(cluster))
    return seen


async def lose_nodes(cluster: Cluster) -> list[str]:
    """Play the life of a job with a spare that loses two nodes, the second one while it has no spare and is then suspended."""
    seen = [await scene(cluster)]
    for _ in range(2):
        cluster.cut(status_members(cluster)[1])
        await a_while(cluster)
        seen.append(await scene(cluster))
        cluster.edit(workers={"nodes": 2, "spares": 0})
        await survive(cluster)
    cluster.edit(suspend=True)
    await a_while(cluster)
    seen.append(await scene(cluster))
    cluster.edit(suspend=False)
    seen.append(await scene(cluster))
    for uid in [uid for uid, agent in cluster.agents.items() if agent.cut]:
        cluster.heal(uid)
    seen.append(await scene(cluster))
    cluster.train()
    seen.append(await scene(cluster))
    return seen


async def a_while(cluster: Cluster) -> None:
    """Everybody who can be heard is, again and again: enough for a new operator to miss who cannot."""
    for _ in range(10):
        cluster.wait(8)
        await survive(cluster)


def status_members(cluster: Cluster) -> list[str]:
    return [member["uid"] for member in cluster.status["gang"]["members"]]


UNDISTURBED = [
    "Running 1 ['Ready'] [] None ['sentiment-aaaaa-0-1', 'sentiment-aaaaa-1-1']",
    "Running 2 ['Ready'] [(1, 'WrongWorldSize')] 1 ['sentiment-aaaaa-0-1', 'sentiment-aaaaa-1-1']",
    "Running 3 ['Ready'] [(1, 'WrongWorldSize'), (2, 'PodDeleted')] 2 ['sentiment-aaaaa-0-3', 'sentiment-aaaaa-1-1']",
    "Suspended 4 ['Ready', 'Suspended'] [(1, 'WrongWorldSize'), (2, 'PodDeleted')] 2 []",
    "Running 4 ['Ready'] [(1, 'WrongWorldSize'), (2, 'PodDeleted')] 2 ['sentiment-aaaaa-0-4', 'sentiment-aaaaa-1-4']",
    "Succeeded 4 ['Complete', 'Ready'] [(1, 'WrongWorldSize'), (2, 'PodDeleted')] 2 ['sentiment-aaaaa-0-4', 'sentiment-aaaaa-1-4']",
    "Succeeded 4 ['Complete', 'Ready'] [(1, 'WrongWorldSize'), (2, 'PodDeleted')] 2 []",
    " 0 [] [] None []",
]


async def undisturbed() -> tuple[list[str], Cluster]:
    cluster = Cluster(SPEC)
    return await live(cluster), cluster


async def test_a_whole_life_without_a_crash() -> None:
    seen, cluster = await undisturbed()
    short = [line.split(" {")[0] for line in seen]
    assert [line.split(" [")[0] for line in short] == [line.split(" [")[0] for line in UNDISTURBED]
    for line, expected in zip(seen, UNDISTURBED, strict=True):
        names = expected.rsplit(" [", 1)[1]
        assert f"[{names}" in line
    assert seen[-1].endswith("[] []"), "the garbage collector has taken ConfigMap and NetworkPolicy along"
    assert set(cluster.api.pods_created.values()) == {1}


async def test_a_whole_life_with_lost_nodes_without_a_crash() -> None:
    seen = await lose_nodes(Cluster("workers: {spares: 1}"))
    gone = "'sentiment-aaaaa-1-1'"  # deleted, and there for as long as its node is away
    first, spare, refill = "'sentiment-aaaaa-0-1'", "'sentiment-aaaaa-2-1'", "'sentiment-aaaaa-3-2'"
    assert [line.split(" [", 1)[0] for line in seen] == [
        "Running 1", "Running 2", "Running 3", "Suspended 4", "Running 4", "Running 4", "Succeeded 4",
    ]  # fmt: skip
    assert f"[{first}, {gone}, {spare}, {refill}]" in seen[1]
    assert "[(1, 'NodeLost'), (2, 'PodSilent')]" in seen[2], (
        "two of three nodes: that alone may be the control plane's trouble"
    )
    assert f"[{gone}, {spare}]" in seen[3]
    assert "'Suspended'" in seen[3]
    assert "['sentiment-aaaaa-0-4', 'sentiment-aaaaa-1-4']" in seen[-1], (
        "those that were lost are gone, and nothing else"
    )


LIVES = {"fails, loses a pod, is suspended": (live, SPEC), "loses nodes": (lose_nodes, "workers: {spares: 1}")}


@pytest.mark.parametrize(("play", "spec"), LIVES.values(), ids=LIVES.keys())
@pytest.mark.parametrize("how", ["dies after", "gets no answer to", "is refused"])
async def test_an_operator_that_fails_at_any_write_reaches_the_same_end(how: str, play, spec: str) -> None:
    cluster = Cluster(spec)
    expected = await play(cluster)
    total = len(cluster.api.writes)
    assert total > 20
    for k in range(total):
        cluster = Cluster(spec)
        if how == "dies after":
            cluster.api.crash_after = k
        else:
            _fail_at(cluster, k, "lost" if how == "gets no answer to" else "refused")
        seen = await play(cluster)
        assert seen == expected, f"an operator that {how} write {k}"
        assert set(cluster.api.pods_created.values()) == {1}, "each place is filled once for each generation"


def _fail_at(cluster: Cluster, k: int, how: str) -> None:
    inner = cluster.api._write
    count = iter(range(10**9))

    def write(what: str):
        if next(count) == k:
            cluster.api.fail_next = how
        return inner(what)

    cluster.api._write = write


async def test_the_orders_of_writes_in_a_start_are_status_then_shared_objects_then_pods() -> None:
    cluster = Cluster()
    await cluster.reconcile()
    assert cluster.api.writes == [
        "status finetunejobs/sentiment",
        "apply configmaps/sentiment-aaaaa",
        "apply networkpolicies/sentiment-aaaaa",
        "create pods/sentiment-aaaaa-0-1",
        "create pods/sentiment-aaaaa-1-1",
    ]


async def test_a_life_from_start_to_success_costs_no_more_writes_than_promised() -> None:
    """Design P6: at most 6 writes and 1 for each pod, without progress."""
    cluster = Cluster()
    await cluster.settle()
    cluster.train()
    await cluster.settle()
    writes = [write for write in cluster.api.writes if not write.startswith("create pods")]
    assert cluster.phase == "Succeeded"
    assert len(cluster.api.writes) - len(writes) == 2
    assert len(writes) <= 8, writes
    assert not cluster.pods() or all(pod["status"]["phase"] == "Succeeded" for pod in cluster.pods())
    assert cluster.api.bodies(PODS) == cluster.pods()
    assert KEY == ("team-a", "sentiment")


SAVE = Saves(stall_seconds=0.1, commit_seconds=3.0, recommended_interval_seconds=60.0)


async def test_telling_how_saving_goes_costs_one_write_for_each_commit_and_no_more() -> None:
    """A save tells of itself three times: when it begins, when it is committed, and what it took."""
    cluster = Cluster()
    await cluster.settle()
    first = cluster.agents[status_members(cluster)[0]]
    before = len(cluster.api.writes)
    saves = 10
    for step in range(1, saves + 1):
        time = timestamp(cluster.now)
        first.saves_now = replace(SAVE, saving_step=step, saving_since=time)
        await cluster.settle()
        cluster.wait(3)
        first.checkpoint = Checkpoint(step, f"s3://x/step-{step}", 1, time)
        await cluster.settle()
        first.saves_now = replace(SAVE, stall_seconds=0.1 + step)
        await cluster.settle()
        cluster.wait(4)
    assert len(cluster.api.writes) - before <= saves
    cluster.wait(10)
    await cluster.settle()
    assert cluster.status["saves"] == {
        "putOff": 0,
        "reason": "",
        "message": "",
        "stallSeconds": 10.1,
        "commitSeconds": 3.0,
        "recommendedIntervalSeconds": 60,
    }
    assert cluster.status["checkpoint"]["step"] == saves


async def test_saves_that_are_put_off_all_the_time_cost_two_writes_in_all() -> None:
    """One when it begins, one when it is over; what changes in between goes with progress."""
    cluster = Cluster()
    await cluster.settle()
    first = cluster.agents[status_members(cluster)[0]]
    cluster.wait(100)
    await cluster.settle()
    before = len(cluster.api.writes)
    for step in range(10):
        for put_off in range(5):
            first.saves_now = replace(SAVE, saving_step=step, put_off=put_off)
            await cluster.settle()
    first.saves_now = SAVE
    await cluster.settle()
    assert len(cluster.api.writes) - before <= 3, "and one for the first of them, whose time had come"
