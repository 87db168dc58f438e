"""A gang whose size spec has changed while it trains: regrouped in the new size, from a step that all ranks save together.

A gang that is to grow trains on until the pods that it lacks are there, which are made behind it as spares are. As soon as the next
generation could start at once, ``gang.stopTime`` is committed, and members are ordered to save and to stop. The generation ends when all of
them have, or when that takes too long. What spec asks for by then is the size of the next one, also if that is the old size again.
"""

from datetime import timedelta

from finetune_api.status import Gang
from finetune_operator.plan.failure import Failure, FailureClass
from finetune_operator.plan.gang import choose_pods, is_resized, next_generation, with_members
from finetune_operator.plan.leaving import SAVE_SECONDS, has_ended
from finetune_operator.plan.observation import Observation, instant, timestamp
from finetune_operator.plan.pending import waiting_for
from finetune_operator.plan.spares import ended_growth

RESIZED = "Resized"


def told_to_stop(observed: Observation, gang: Gang) -> Gang:
    """Return the gang with the time at which its members are told to save and stop, if that is now or was before."""
    if gang.stop_time is not None or not is_resized(observed, gang):
        return gang
    wanted = next_generation(observed, gang)
    complete = with_members(observed, wanted, choose_pods(observed, wanted))
    return gang if complete is None else gang.model_copy(update={"stop_time": timestamp(observed.now)})


def find_end(observed: Observation, gang: Gang) -> tuple[Failure | None, float | None]:
    """Return the end of a gang that was told to stop, or None and in how many seconds it has had its time."""
    assert gang.stop_time is not None
    left = (instant(gang.stop_time) + timedelta(seconds=SAVE_SECONDS) - observed.now).total_seconds()
    if left > 0 and not all(has_ended(observed, gang, member) for member in gang.members):
        return None, left
    message = f"regrouped: workers.nodes was {gang.nodes} and is {observed.job.spec.workers.nodes}"
    return Failure(FailureClass.KNOWN, RESIZED, message, pod="", heard_at=observed.now), None


def describe_resize(observed: Observation, gang: Gang) -> str | None:
    """Return what is being done about another size than the gang's, or None."""
    nodes = observed.job.spec.workers.nodes
    if gang.stop_time is not None:
        return f"generation {gang.generation} saves, to be regrouped: workers.nodes is {nodes}"
    if not is_resized(observed, gang):
        return None
    wanted = next_generation(observed, gang)
    ended = ended_growth(observed, gang)
    if gang.growth_held_until is not None:
        why = f"pods for it were given back to jobs that wait, next try at {gang.growth_held_until}"
    elif ended:
        why = f"pod {ended[0].name} ended: {ended[0].reason or ended[0].phase} {ended[0].message}".strip()
    else:
        why = waiting_for(observed, choose_pods(observed, wanted), wanted.nodes).message
    return f"generation {gang.generation} trains on {gang.nodes} nodes; workers.nodes is {nodes}: {why}"
