"""Membership: who is in which incarnation of the gang.

A generation is minted empty, gets its members in one later (or the same) write once every rank has a pod whose agent has reported, and
never changes after that. It ends by minting the next. So each agent can be told from committed status alone, and two rank maps of one
generation cannot exist.
"""

from finetune_api.status import Gang, Member
from finetune_operator.plan.observation import NewPod, Observation, timestamp, unset_gang
from finetune_operator.views import PodView


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
