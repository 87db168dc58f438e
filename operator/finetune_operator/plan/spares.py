"""Spares: warm pods beyond the gang's size, which take a lost rank's place at once (see ``gang.choose_pods``).

Those by which a gang is to grow (see ``resizing``) are among them until they are members. All are made behind a gang that has its members, so that no gang waits for its own spares. Losing one ends no generation. One that ends by
itself is not made again before the next generation: it would end again, and again.
"""

from collections.abc import Iterator
from itertools import count

from finetune_api.status import Gang
from finetune_operator.plan.gang import idle_pods, wanted_behind
from finetune_operator.plan.observation import NewPod, Observation
from finetune_operator.plan.suspects import nodes_to_avoid
from finetune_operator.views import PodView


def missing_spares(observed: Observation, gang: Gang) -> tuple[NewPod, ...]:
    """Return the pods to create so that as many as are wanted stand behind a gang that has its members."""
    members = {member.uid for member in gang.members}
    ended = [pod for pod in observed.pods if pod.uid not in members and _has_ended_for_nothing(gang, pod)]
    missing = wanted_behind(observed, gang) - len(idle_pods(observed, gang)) - len(ended)
    places, avoid = _free_places(observed, gang), nodes_to_avoid(gang)
    return tuple(NewPod(next(places), gang.generation, avoid) for _ in range(missing))


def standing_by(observed: Observation, gang: Gang) -> int | None:
    """Return how many spares are warm, or None for a job without spares."""
    if observed.job.spec.workers.spares == 0:
        return None
    warm = sum(any(c.running and not c.is_init for c in pod.containers) for pod in idle_pods(observed, gang))
    return min(warm, observed.job.spec.workers.spares)


def _has_ended_for_nothing(gang: Gang, pod: PodView) -> bool:
    return pod.ended and not pod.deleting and pod.generation == gang.generation


def _free_places(observed: Observation, gang: Gang) -> Iterator[int]:
    """Yield places above the gang's, whose names no pod has: one that is stuck on a dead node keeps its own."""
    taken = {pod.rank for pod in observed.pods}
    return (place for place in count(gang.nodes) if place not in taken)
