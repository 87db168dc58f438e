"""Which rank is slow: it steps steadily, and holds up all the others.

All ranks need the same time for a step, so what is compared is what a step takes of each rank alone (``Pace``, medians over the newest
steps, which agents send). A rank is a straggler when that is half as much again as its peers', by enough of a step to matter. Nothing is
restarted for it: the numbers are right, and whether a slow node is worth a restart is a person's to say.

Medians change slowly, a straggler stays one until it is nearly as fast as the rest, and the condition stands for a minute at least,
either way: so it costs few writes of status, on however noisy a machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from finetune_api.protocol import Pace
from finetune_api.status import Condition, Gang, Member
from finetune_operator.plan.checkpoints import Aspect
from finetune_operator.plan.observation import Observation, instant

SLOW = 1.5  # times what it takes of the peers
NEARLY_AS_FAST = 1.2
SHARE_OF_A_STEP = 0.1  # by which it must exceed that of the peers
STEADY_SECONDS = 60.0

NO_STRAGGLER = Aspect(holds=False, reason="NoStraggler", message="no rank is known to hold up the others")


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank, where it is, and how fast against its peers."""

    member: Member
    pace: Pace
    peers_seconds: float

    @property
    def ratio(self) -> float:
        """How many times as long as its peers it takes."""
        return self.pace.busy_seconds / self.peers_seconds if self.peers_seconds else 1.0

    @property
    def matters(self) -> bool:
        """Whether the others wait noticeably."""
        return self.pace.busy_seconds - self.peers_seconds >= SHARE_OF_A_STEP * self.pace.step_seconds


def straggle(observed: Observation, gang: Gang | None, known: Condition | None) -> Aspect:
    """Return whether a rank of ``gang`` holds up the others."""
    ranks = _ranks(observed, gang) if gang is not None else []
    if not ranks:
        return NO_STRAGGLER
    if known is not None and (observed.now - instant(known.last_transition_time)).total_seconds() < STEADY_SECONDS:
        return Aspect(known.status == "True", known.reason, known.message)
    if known is not None and known.status == "True" and any(_is_still(rank, known) for rank in ranks):
        return Aspect(holds=True, reason=known.reason, message=known.message)
    slowest = max(ranks, key=lambda rank: rank.ratio)
    return _slow(observed, slowest) if slowest.ratio > SLOW and slowest.matters else NO_STRAGGLER


def _ranks(observed: Observation, gang: Gang) -> list[Rank]:
    """Return all ranks; nothing while the pace of one is not known."""
    found = [(member, pace) for member in gang.members for pace in _paces(observed, gang, member)]
    if len(found) < max(2, gang.nodes * gang.processes_per_node):
        return []
    return [Rank(member, pace, _peers_seconds(found, pace)) for member, pace in found]


def _paces(observed: Observation, gang: Gang, member: Member) -> Sequence[Pace]:
    said = observed.said(gang, member)
    return said.paces if said is not None else ()


def _peers_seconds(found: Sequence[tuple[Member, Pace]], own: Pace) -> float:
    return median(pace.busy_seconds for _, pace in found if pace is not own)


def _is_still(rank: Rank, known: Condition) -> bool:
    return known.message.startswith(_name(rank)) and rank.ratio > NEARLY_AS_FAST


def _slow(observed: Observation, slowest: Rank) -> Aspect:
    pod = observed.pod(slowest.member.uid)
    message = (
        f"{_name(slowest)}(pod {slowest.member.pod}, node {pod.node if pod and pod.node else 'unknown'}) holds up the others: a step takes "
        f"{slowest.pace.busy_seconds:.3g} s of it alone, {slowest.ratio:.1f} times as much as of its peers ({slowest.peers_seconds:.3g} s)"
    )
    return Aspect(holds=True, reason="SlowRank", message=message)


def _name(rank: Rank) -> str:
    return f"rank {rank.pace.rank} "
