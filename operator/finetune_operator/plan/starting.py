"""Members whose agents are heard, and never start the generation that they are told to.

An agent starts a generation when nothing of the one before is left in its pod. A process in uninterruptible sleep, in a driver of a broken
device or on a file system whose server is gone, is left for ever, whatever signal it gets; and an agent that waits for a disk reports what
it did last. Neither is silent, so nothing else would tell that the gang waits for a member in vain.
"""

from datetime import timedelta

from finetune_api.status import Gang, Member
from finetune_operator.plan.observation import Observation, instant, soonest
from finetune_operator.plan.silence import is_at_hand

NOT_STARTED = "NotStarted"
START_SECONDS = (
    120.0  # to be told, and to end what ran before: giving hundreds of GiB back to the kernel takes tens of seconds
)


def seconds_to_start(observed: Observation, gang: Gang, member: Member) -> float | None:
    """Return for how long a member may still report an older generation, or None if it need not start this one, or is not heard."""
    pod, heard = observed.pod(member.uid), observed.heard.get(member.uid)
    if pod is None or not pod.usable or heard is None or observed.hearing is None or gang.start_time is None:
        return None
    if heard.report.generation >= gang.generation or not is_at_hand(observed, pod):
        return None
    since = max(instant(gang.start_time), observed.hearing.since, heard.since, heard.steady_since)
    return (since + timedelta(seconds=START_SECONDS) - observed.now).total_seconds()


def start_look_again_seconds(observed: Observation, gang: Gang) -> float | None:
    """Return in how many seconds the first member has had its time to start."""
    return soonest(*(seconds_to_start(observed, gang, member) for member in gang.members))
