"""Membership: who is in which incarnation of the gang.

A generation is minted empty, gets its members in one later (or the same) write once every rank has a pod whose agent has reported, and
never changes after that. It ends by minting the next. So each agent can be told from committed status alone, and two rank maps of one
generation cannot exist.
"""

from finetune_api.status import Attempt, Gang, JobStatus, Member, RestartReason, Restarts
from finetune_operator.plan.failure import Failure
from finetune_operator.plan.observation import NewPod, Observation, instant, timestamp, unset_gang
from finetune_operator.views import PodView

ATTEMPTS_KEPT = 10
QUICK_FAILURE_SECONDS = 60.0
LAST_BACKOFF_SECONDS = 300.0


def choose_pods(observed: Observation, gang: Gang) -> dict[int, PodView]:
    """Return the pod to use for each rank that has one: the newest usable one, so that survivors keep their places."""
    return {pod.rank: pod for pod in observed.pods if pod.usable and pod.rank < gang.nodes}


def missing_pods(gang: Gang, chosen: dict[int, PodView]) -> tuple[NewPod, ...]:
    """Return the pods to create so that every rank has one."""
    return tuple(NewPod(rank, gang.generation) for rank in range(gang.nodes) if rank not in chosen)


def surplus_pods(observed: Observation, gang: Gang, chosen: dict[int, PodView]) -> tuple[PodView, ...]:
    """Return the usable pods that no rank of the gang needs: places above its size, and twins of a chosen pod."""
    kept = {pod.uid for pod in chosen.values()} | {member.uid for member in gang.members}
    return tuple(pod for pod in observed.pods if pod.usable and pod.uid not in kept)


def with_members(observed: Observation, gang: Gang, chosen: dict[int, PodView]) -> Gang | None:
    """Return the gang with its members, or None while a rank has no pod whose agent has reported."""
    if any(rank not in chosen or chosen[rank].uid not in observed.heard for rank in range(gang.nodes)):
        return None
    first = observed.heard[chosen[0].uid].report
    members = [Member(rank=rank, pod=chosen[rank].name, uid=chosen[rank].uid) for rank in range(gang.nodes)]
    return gang.model_copy(
        update={
            "members": members,
            "master_address": chosen[0].address or first.address,
            "master_port": first.port,
            "start_time": timestamp(observed.now),
            "ready": 0,
        }
    )


def next_generation(observed: Observation, gang: Gang) -> Gang:
    """Mint the generation after ``gang``: above any that an agent has started, of the size that spec asks for now."""
    started = max((heard.report.generation for heard in observed.heard.values()), default=0)
    workers = observed.job.spec.workers
    return unset_gang(workers.nodes, workers.local_processes, max(gang.generation, started) + 1)


def resized(observed: Observation, gang: Gang) -> Gang:
    """Return a gang without members in the size that spec asks for now, else one that cannot be placed could never be made smaller."""
    workers = observed.job.spec.workers
    if (gang.nodes, gang.processes_per_node) == (workers.nodes, workers.local_processes):
        return gang
    return next_generation(observed, gang)


def with_attempt(observed: Observation, status: JobStatus, gang: Gang, failure: Failure) -> JobStatus:
    """Return ``status`` with the end of ``gang`` among its attempts."""
    attempt = Attempt(
        generation=gang.generation,
        start_time=gang.start_time,
        end_time=timestamp(observed.now),
        reason=failure.reason,
        message=failure.message[:2048],
        pod=failure.pod,
        node=failure.node or None,
        rank=failure.rank,
        exit_code=failure.exit_code,
        signal=failure.signal,
    )
    return status.model_copy(update={"attempts": [*status.attempts, attempt][-ATTEMPTS_KEPT:]})


def with_restart(observed: Observation, status: JobStatus, failure: Failure) -> JobStatus:
    """Return ``status`` with one more restart counted, in all, for its reason and in the present window."""
    restarts = status.restarts or Restarts()
    counts = {entry.reason: entry.count for entry in restarts.by_reason}
    counts[failure.reason] = counts.get(failure.reason, 0) + 1
    fresh = restarts.window_start is None or _window_is_over(observed, restarts)
    restarts = Restarts(
        total=restarts.total + 1,
        used=1 if fresh else restarts.used + 1,
        window_start=timestamp(observed.now) if fresh else restarts.window_start,
        by_reason=[RestartReason(reason=reason, count=count) for reason, count in sorted(counts.items())][:32],
    )
    return status.model_copy(update={"restarts": restarts})


def restarts_left(observed: Observation, status: JobStatus) -> int:
    """Return how many restarts the budget still allows in its window."""
    restarts = status.restarts or Restarts()
    used = 0 if restarts.window_start is None or _window_is_over(observed, restarts) else restarts.used
    return observed.job.spec.recovery.max_restarts - used


def _window_is_over(observed: Observation, restarts: Restarts) -> bool:
    assert restarts.window_start is not None
    age = (observed.now - instant(restarts.window_start)).total_seconds()
    return age >= observed.job.spec.recovery.window_seconds


def backoff_seconds(observed: Observation, status: JobStatus) -> float:
    """Return how long the next incarnation still has to wait: 0 after the first quick failure, then 2, 4, 8 … seconds."""
    quick = 0
    for attempt in reversed(status.attempts):
        if _lasted(attempt) >= QUICK_FAILURE_SECONDS:
            break
        quick += 1
    if quick < 2:
        return 0.0
    wait = min(LAST_BACKOFF_SECONDS, 2.0 ** (quick - 1))
    return max(0.0, wait - (observed.now - instant(status.attempts[-1].end_time)).total_seconds())


def _lasted(attempt: Attempt) -> float:
    if attempt.start_time is None:  # it never was complete
        return 0.0
    return (instant(attempt.end_time) - instant(attempt.start_time)).total_seconds()
