"""Checkpoints of a DeepSpeed engine in S3, committed by one conditional write (docs/checkpoint-format.md)."""

from finetune_trainer.checkpoint.checkpoints import Checkpoints
from finetune_trainer.checkpoint.manifest import Position

__all__ = ["Checkpoints", "Position"]
