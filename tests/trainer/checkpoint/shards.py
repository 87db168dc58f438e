"""Shards as files, for tests that read them with other programs."""

from finetune_trainer.checkpoint.manifest import Shard
from finetune_trainer.checkpoint.shard import chunk_digests, copy_in, lay_out


def write_shard(path, owned, parameter_index):
    """Write what a rank would upload, and return its description."""
    layout = lay_out(owned, parameter_index)
    body = bytearray(layout.size_bytes)
    copy_in(layout, owned, memoryview(body))
    path.write_bytes(body)
    return Shard(path.name, layout.size_bytes, chunk_digests(memoryview(body)), layout.intervals)
