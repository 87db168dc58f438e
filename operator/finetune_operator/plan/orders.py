"""What agents are told: derived from the job as it is stored and nothing else, so that any operator process says the same.

Which generation runs, and who runs it, is committed status. What of spec counts from the next start comes along: an agent takes it when
it starts that generation, and what it hears of it later changes nothing of one that runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from finetune_api.job import FineTuneJob
from finetune_api.protocol import Action, Order
from finetune_api.status import Gang, Member
from finetune_operator.plan.checkpoint_wish import checkpoint_wish
from finetune_operator.plan.leaving import SAVE_SECONDS
from finetune_operator.plan.observation import is_final


@dataclass(frozen=True, slots=True)
class Orders:
    """What the agents of one job are told: those of its members by pod uid, and the others. ``generation`` is the newest committed one."""

    generation: int
    members: Mapping[str, Order]
    others: Order

    def to(self, pod_uid: str) -> Order:
        """Return what the agent in the pod with ``pod_uid`` should be doing."""
        return self.members.get(pod_uid, self.others)


def orders_for(job: FineTuneJob) -> Orders:
    """Return what all agents of a job should be doing. They ask one by one, so this is made once for each version of the job."""
    status = job.status
    if status is None or status.gang is None:
        return Orders(0, {}, Order(action=Action.WAIT))
    gang = status.gang
    if is_final(status):
        return Orders(gang.generation, {}, Order(action=Action.FINISH, generation=gang.generation))
    told = Order(
        action=Action.RUN,
        generation=gang.generation,
        hang_seconds=job.spec.recovery.hang_seconds,
        has_checkpoint=status.checkpoint is not None,
        checkpoint=checkpoint_wish(job.spec.checkpoint) if job.spec.recipe is not None else None,
    )
    members = {member.uid: _order_for(gang, member, told) for member in gang.members}
    return Orders(gang.generation, members, Order(action=Action.WAIT, generation=gang.generation))


def _order_for(gang: Gang, member: Member, told: Order) -> Order:
    """Return the order of one member; ``told`` is what all hear when they are to run."""
    if gang.master_address is None or gang.master_port is None:
        return Order(action=Action.WAIT, generation=gang.generation)
    if gang.stop_time is not None:
        return Order(action=Action.STOP, generation=gang.generation, grace_seconds=int(SAVE_SECONDS))
    return replace(
        told,
        rank=member.rank,
        nodes=gang.nodes,
        processes_per_node=gang.processes_per_node,
        master_address=gang.master_address,
        master_port=gang.master_port,
    )
