"""What an agent is told: derived from committed status and nothing else, so that any operator process says the same."""

from finetune_api.job import FineTuneJob
from finetune_api.protocol import Action, Order
from finetune_operator.plan.leaving import SAVE_SECONDS
from finetune_operator.plan.observation import is_final


def order_for(job: FineTuneJob, pod_uid: str) -> Order:
    """Return what the agent in the pod with ``pod_uid`` should be doing."""
    status = job.status
    if status is None or status.gang is None:
        return Order(action=Action.WAIT)
    gang = status.gang
    if is_final(status):
        return Order(action=Action.FINISH, generation=gang.generation)
    member = next((member for member in gang.members if member.uid == pod_uid), None)
    if member is None or gang.master_address is None or gang.master_port is None:
        return Order(action=Action.WAIT, generation=gang.generation)
    if gang.stop_time is not None:
        return Order(action=Action.STOP, generation=gang.generation, grace_seconds=int(SAVE_SECONDS))
    return Order(
        action=Action.RUN,
        generation=gang.generation,
        rank=member.rank,
        nodes=gang.nodes,
        processes_per_node=gang.processes_per_node,
        master_address=gang.master_address,
        master_port=gang.master_port,
        hang_seconds=job.spec.recovery.hang_seconds,
        has_checkpoint=status.checkpoint is not None,
    )
