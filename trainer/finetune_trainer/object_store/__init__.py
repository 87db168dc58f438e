"""Objects in S3: one protocol, the real store behind boto3, and one in memory that obeys the same cases."""

from finetune_trainer.object_store.memory import MemoryObjectStore
from finetune_trainer.object_store.protocol import (
    Ambiguous,
    ObjectInfo,
    ObjectMissing,
    ObjectStore,
    PreconditionFailed,
    Stored,
    split_uri,
)
from finetune_trainer.object_store.s3 import RETRY_SECONDS, S3ObjectStore

__all__ = [
    "RETRY_SECONDS",
    "Ambiguous",
    "MemoryObjectStore",
    "ObjectInfo",
    "ObjectMissing",
    "ObjectStore",
    "PreconditionFailed",
    "S3ObjectStore",
    "Stored",
    "split_uri",
]
