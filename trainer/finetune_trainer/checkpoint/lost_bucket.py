"""A job whose own bucket is gone at a start, although it has committed there: somebody deleted it, with the checkpoints.

Every start asks it several times before ``HEAD`` is read, for the plan of exports or for data that lies there too, and each
of these would take a bucket that is not there for a URI that was never right.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from finetune_trainer.errors import CheckpointsLost
from finetune_trainer.object_store import NoBucket, split_uri


@contextmanager
def gone_is_lost(prefix: str, *, has_checkpoint: bool) -> Iterator[None]:
    """Do what is to be done before ``HEAD`` is read.

    Raises:
        CheckpointsLost: the bucket of ``prefix`` does not exist, and the job is known to have committed a checkpoint.
    """
    bucket, _ = split_uri(prefix)
    try:
        yield
    except NoBucket as error:
        if not has_checkpoint or error.bucket != bucket:
            raise
        raise CheckpointsLost(
            f"{prefix}: the bucket {bucket!r} is gone, and this job has committed checkpoints there. Somebody deleted it; put it "
            "back, with HEAD and the checkpoints that it lists, from a backup"
        ) from error
