"""Spares: warm pods beyond the gang's size, which take a lost rank's place at once (see ``gang.choose_pods``).

Those by which a gang is to grow (see ``resizing``) are among them until they are members. All are made behind a gang that has its members,
so that no gang waits for its own spares. Losing one ends no generation. A spare that ends by itself is not made again before the next
generation: it would end again, and again. One that a gang needs to grow is, as that gang may train for days in its old size; but not
before ``AGAIN_SECONDS`` after it was made.
"""

from collections.abc import Iterator
from datetime import timedelta
from itertools import count

from finetune_api.status import Gang
from finetune_operator.plan.gang import growth, idle_pods, wanted_behind
from finetune_operator.plan.observation import NewPod, Observation, instant
from finetune_operator.plan.suspects import nodes_to_avoid
from finetune_operator.views import PodView

AGAIN_SECONDS = 60.0


def missing_spares(observed: Observation, gang: Gang) -> tuple[NewPod, ...]:
    """Return the pods to create so that as many as are wanted stand behind a gang that has its members."""
    missing = wanted_behind(observed, gang) - len(idle_pods(observed, gang)) - len(_ended(observed, gang))
    places, avoid = _free_places(observed, gang), nodes_to_avoid(gang)
    return tuple(NewPod(next(places), gang.generation, avoid) for _ in range(missing))


def ended_growth(observed: Observation, gang: Gang) -> tuple[PodView, ...]:
    """Return the pods that a gang needs to grow and that have ended by themselves, while no spare is there instead."""
    lacking = growth(observed, gang) - len(idle_pods(observed, gang))
    return tuple(_ended(observed, gang)[: max(0, lacking)])


def growth_to_replace(observed: Observation, gang: Gang) -> tuple[PodView, ...]:
    """Return those of them whose time to be made again has come. They are deleted for it: else they would pile up."""
    return tuple(pod for pod in ended_growth(observed, gang) if _seconds_left(observed, pod) <= 0)


def look_again_seconds(observed: Observation, gang: Gang) -> float | None:
    """Return in how many seconds the first of them may be made again."""
    left = (_seconds_left(observed, pod) for pod in ended_growth(observed, gang))
    return min((seconds for seconds in left if seconds > 0), default=None)


def _seconds_left(observed: Observation, pod: PodView) -> float:
    return (instant(pod.created) + timedelta(seconds=AGAIN_SECONDS) - observed.now).total_seconds()


def standing_by(observed: Observation, gang: Gang) -> int | None:
    """Return how many spares are warm, or None for a job without spares."""
    if observed.job.spec.workers.spares == 0:
        return None
    warm = sum(any(c.running and not c.is_init for c in pod.containers) for pod in idle_pods(observed, gang))
    return min(warm, observed.job.spec.workers.spares)


def _ended(observed: Observation, gang: Gang) -> list[PodView]:
    """Return the pods made behind this very gang that have ended by themselves."""
    members = {member.uid for member in gang.members}
    made = [pod for pod in observed.pods if pod.generation == gang.generation and pod.uid not in members]
    return [pod for pod in made if pod.ended and not pod.deleting]


def _free_places(observed: Observation, gang: Gang) -> Iterator[int]:
    """Yield places above the gang's, whose names no pod has: one that is stuck on a dead node keeps its own."""
    taken = {pod.rank for pod in observed.pods}
    return (place for place in count(gang.nodes) if place not in taken)
