"""What a job wishes of its checkpoints, in the trainer's terms: pods are made with it, and every order to run brings the newest."""

from finetune_api.job import Checkpoint
from finetune_api.protocol import CheckpointWish
from finetune_api.quantity import quantity_value


def checkpoint_wish(asked: Checkpoint) -> CheckpointWish:
    """Return what ``spec.checkpoint`` says of saving."""
    interval, rate = asked.interval, asked.upload_bytes_per_second
    return CheckpointWish(
        interval_steps=interval.steps,
        interval_seconds=interval.seconds,
        interval_auto=interval.auto is not None,
        keep=asked.keep,
        keep_best=asked.keep_best,
        upload_bytes_per_second=int(quantity_value(rate)) if rate is not None else None,
    )
