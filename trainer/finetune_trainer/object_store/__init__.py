"""Objects in S3: one protocol, the real store behind boto3, and one in memory that obeys the same cases."""

from finetune_trainer.object_store.memory import MemoryObjectStore
from finetune_trainer.object_store.protocol import (
    CHUNK_BYTES,
    Ambiguous,
    NoBucket,
    ObjectInfo,
    ObjectMissing,
    ObjectStore,
    ObjectTooShort,
    PreconditionFailed,
    Stored,
    UploadStopped,
    split_uri,
)
from finetune_trainer.object_store.s3 import S3ObjectStore
from finetune_trainer.object_store.s3_connection import RETRY_SECONDS

__all__ = [
    "CHUNK_BYTES",
    "RETRY_SECONDS",
    "Ambiguous",
    "MemoryObjectStore",
    "NoBucket",
    "ObjectInfo",
    "ObjectMissing",
    "ObjectStore",
    "ObjectTooShort",
    "PreconditionFailed",
    "S3ObjectStore",
    "Stored",
    "UploadStopped",
    "split_uri",
]
