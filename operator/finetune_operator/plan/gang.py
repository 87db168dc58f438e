"""Membership: who is in which incarnation of the gang.

A generation is minted empty, gets its members in one later (or the same) write once every rank has a pod whose agent has reported, and
never changes after that. It ends by minting the next. So each agent can be told from committed status alone, and two rank maps of one
generation cannot exist.

A pod keeps its rank for as long as it is used: the one that its place names, or for a spare that stood in for a lost pod the one that
``standIns`` in status remembers, since what a rank has staged in its pod's memory is of use to that rank alone.
"""

from collections.abc import Iterable, Mapping

from finetune_api.status import Gang, Member
from finetune_operator.plan.observation import NewPod, Observation, timestamp, unset_gang
from finetune_operator.plan.shape import in_shape, misshapen
from finetune_operator.plan.silence import find_loss, is_at_hand
from finetune_operator.plan.suspects import is_suspect, nodes_to_avoid, still_avoided
from finetune_operator.views import PodView


def fit_pods(observed: Observation, gang: Gang) -> list[PodView]:
    """Return the pods that a gang can be made of: in its shape, they should be running, and are neither lost nor suspect."""
    return [
        pod
        for pod in in_shape(observed.job, observed.pods)
        if pod.usable and not is_suspect(gang, pod) and find_loss(observed, gang, pod) is None
    ]


def unfit_pods(observed: Observation, gang: Gang) -> tuple[PodView, ...]:
    """Return the pods beside the members that are of another shape, lost or suspect. Deleted, they go when their nodes let them."""
    kept = {pod.uid for pod in fit_pods(observed, gang)} | {member.uid for member in gang.members}
    return tuple(pod for pod in observed.pods if pod.usable and pod.uid not in kept)


def choose_pods(observed: Observation, gang: Gang) -> dict[int, PodView]:
    """Return the pod to use for each rank that has one: its own, else a spare whose agent is at hand."""
    pods = fit_pods(observed, gang)
    chosen = _at_home(observed, gang, pods)
    taken = {pod.uid for rank, pod in chosen.items() if is_at_hand(observed, pod)}
    idle = [pod for pod in pods if pod.uid not in taken and is_at_hand(observed, pod)]
    for rank in range(gang.nodes):
        if idle and (rank not in chosen or chosen[rank].uid not in taken):
            chosen[rank] = idle.pop(0)
    return chosen


def _at_home(observed: Observation, gang: Gang, pods: Iterable[PodView]) -> dict[int, PodView]:
    """Return the best of each rank's own pods: who stood in for it before, then whose agent is at hand, then the newest."""
    stand_ins = {member.uid: member.rank for member in gang.stand_ins}
    own = [(stand_ins.get(pod.uid, pod.rank), pod) for pod in pods]
    ranked = sorted(own, key=lambda entry: (entry[1].uid in stand_ins, is_at_hand(observed, entry[1])))  # stable
    return {rank: pod for rank, pod in ranked if rank < gang.nodes}


def missing_pods(gang: Gang, chosen: Mapping[int, PodView]) -> tuple[NewPod, ...]:
    """Return the pods to create so that every rank has one."""
    avoid = nodes_to_avoid(gang)
    return tuple(NewPod(rank, gang.generation, avoid) for rank in range(gang.nodes) if rank not in chosen)


def surplus_pods(observed: Observation, gang: Gang, chosen: Mapping[int, PodView]) -> tuple[PodView, ...]:
    """Return the fit pods that are neither chosen nor members nor among those that stand behind the gang."""
    return tuple(idle_pods(observed, gang, chosen.values())[wanted_behind(observed, gang) :])


def wanted_behind(observed: Observation, gang: Gang) -> int:
    """Return how many pods stand behind the gang: its spares, and those by which it is to grow, unless it has given these back."""
    return observed.job.spec.workers.spares + (0 if gang.growth_held_until else growth(observed, gang))


def growth(observed: Observation, gang: Gang) -> int:
    """Return by how many nodes the gang is to grow."""
    return max(0, observed.job.spec.workers.nodes - gang.nodes)


def idle_pods(observed: Observation, gang: Gang, chosen: Iterable[PodView] = ()) -> list[PodView]:
    """Return the fit pods that no rank has, those whose agents are at hand first."""
    busy = {pod.uid for pod in chosen} | {member.uid for member in gang.members}
    idle = [pod for pod in fit_pods(observed, gang) if pod.uid not in busy]
    return sorted(idle, key=lambda pod: not is_at_hand(observed, pod))


def with_members(observed: Observation, gang: Gang, chosen: Mapping[int, PodView]) -> Gang | None:
    """Return the gang with its members, or None while a rank has no pod whose agent is at hand."""
    if any(rank not in chosen or not is_at_hand(observed, chosen[rank]) for rank in range(gang.nodes)):
        return None
    first = observed.heard[chosen[0].uid].report
    members = [Member(rank=rank, pod=chosen[rank].name, uid=chosen[rank].uid) for rank in range(gang.nodes)]
    return gang.model_copy(
        update={
            "members": members,
            "stand_ins": [member for member in members if chosen[member.rank].rank != member.rank],
            "master_address": chosen[0].address or first.address,
            "master_port": first.port,
            "start_time": timestamp(observed.now),
            "ready": 0,
        }
    )


def next_generation(observed: Observation, gang: Gang) -> Gang:
    """Mint the generation after ``gang``: above any that an agent has started, of the size that spec asks for now."""
    started = max((heard.report.generation for heard in observed.heard.values()), default=0)
    minted = unset_gang(observed, max(gang.generation, started) + 1)
    return minted.model_copy(
        update={"stand_ins": gang.stand_ins, "avoid_nodes": still_avoided(observed, gang), "spares": gang.spares}
    )


def next_within_reach(observed: Observation, gang: Gang) -> Gang:
    """Mint the generation after one that has ended. Once the job has trained it is no larger than that one was.

    A size that cannot be had must not cost the one that is: the gang grows when the larger one is complete (see ``grown``).
    """
    minted = next_generation(observed, gang)
    if observed.status.start_time is None:
        return minted
    nodes, held = min(minted.nodes, gang.nodes), gang.growth_held_until
    return minted.model_copy(update={"nodes": nodes, "growth_held_until": held})


def resized(observed: Observation, gang: Gang, *, at_rest: bool) -> Gang:
    """Return a gang without members in the size that spec asks for now, else one that cannot be placed could never be made smaller.

    One that has trained is not made larger here, unless it is ``at_rest`` and has no pods that would wait for more of them.
    """
    return _in_size_of(observed, gang, (next_generation if at_rest else next_within_reach)(observed, gang))


def grown(observed: Observation, gang: Gang) -> Gang:
    """Return a gang without members in the larger size that spec asks for, if it could start in that at once."""
    wanted = next_generation(observed, gang)
    if wanted.nodes <= gang.nodes or with_members(observed, wanted, choose_pods(observed, wanted)) is None:
        return gang
    return _in_size_of(observed, gang, wanted)


def _in_size_of(observed: Observation, gang: Gang, wanted: Gang) -> Gang:
    """Return a gang without members in the size of another. It keeps its number, and so what it is held for, while no pod has it.

    Pods of another shape cost it its number in any size: the pods that are made instead of them could not have their names.
    """
    is_same = (gang.nodes, gang.processes_per_node) == (wanted.nodes, wanted.processes_per_node)
    in_the_way = misshapen(observed.job, observed.pods) if is_same else observed.pods
    if any(pod.generation == gang.generation for pod in in_the_way):
        return wanted
    if is_same:
        return gang
    return wanted.model_copy(update={"generation": gang.generation})


def is_resized(observed: Observation, gang: Gang) -> bool:
    """Tell whether spec asks for another size than the gang's."""
    workers = observed.job.spec.workers
    return (gang.nodes, gang.processes_per_node) != (workers.nodes, workers.local_processes)
