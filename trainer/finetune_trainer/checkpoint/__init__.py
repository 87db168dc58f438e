"""Checkpoints of a DeepSpeed engine in S3, committed by one conditional write (docs/checkpoint-format.md).

Nothing is imported here: what the objects say (``head``, ``manifest``, ``commit``, ``retention``, ``pruning``) must be readable
where there is no torch, which the rest of the package needs.
"""
