"""Checkpoints of a DeepSpeed engine in S3, committed by one conditional write (docs/checkpoint-format.md)."""
