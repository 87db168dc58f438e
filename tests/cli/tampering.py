"""Copies of a job's checkpoints that something has happened to."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from finetune_trainer.checkpoint.manifest import CHUNK_BYTES
from tests.storage.seaweedfs import S3Server

BUCKET = "jobs"

client_of = cache(S3Server.client)  # making one takes longer than what it is asked for


@dataclass(frozen=True)
class Copy:
    """A copy of a job's HEAD and checkpoints under a prefix of its own."""

    server: S3Server
    name: str

    @classmethod
    def of(cls, server: S3Server, source: str, name: str) -> "Copy":
        copy, original = cls(server, name), cls(server, source)
        for key in original.keys(""):
            copy.put(key, original.get(key))
        return copy

    @property
    def prefix(self) -> str:
        return f"s3://{BUCKET}/{self.name}"

    def keys(self, below: str = "") -> list[str]:
        """What there is of HEAD and checkpoints."""
        pages = (
            client_of(self.server)
            .get_paginator("list_objects_v2")
            .paginate(Bucket=BUCKET, Prefix=f"{self.name}/{below}")
        )
        keys = [entry["Key"].removeprefix(f"{self.name}/") for page in pages for entry in page.get("Contents", ())]
        return [key for key in keys if key == "HEAD" or key.startswith("checkpoints/")]

    def get(self, key: str) -> bytes:
        body: bytes = client_of(self.server).get_object(Bucket=BUCKET, Key=f"{self.name}/{key}")["Body"].read()
        return body

    def put(self, key: str, body: bytes) -> None:
        client_of(self.server).put_object(Bucket=BUCKET, Key=f"{self.name}/{key}", Body=body)

    def delete(self, key: str) -> None:
        client_of(self.server).delete_object(Bucket=BUCKET, Key=f"{self.name}/{key}")

    @property
    def head(self) -> Any:
        return json.loads(self.get("HEAD"))

    @property
    def manifest_key(self) -> str:
        """That of the newest checkpoint."""
        return str(self.head["kept"][0]["manifest"])

    def shard_key(self, rank: int) -> str:
        return self.manifest_key.replace("manifest.json", f"rank-{rank:05}.safetensors")

    def change(self, key: str, change: Callable[[bytes], bytes]) -> None:
        self.put(key, change(self.get(key)))

    def change_head(self, **fields: Any) -> None:
        self.put("HEAD", json.dumps(self.head | fields).encode())

    def change_manifest(self, change: Callable[[Any], None]) -> None:
        """Change the newest manifest and let HEAD vouch for it, as a broken writer would."""
        manifest = json.loads(self.get(self.manifest_key))
        change(manifest)
        body = json.dumps(manifest).encode()
        key = self.manifest_key
        self.put(key, body)
        head = self.head
        head["kept"][0]["sha256"] = hashlib.sha256(body).hexdigest()
        self.put("HEAD", json.dumps(head).encode())

    def change_shard(self, rank: int, change: Callable[[bytes], bytes]) -> None:
        """Change a shard and let manifest and HEAD vouch for it."""
        self.change(self.shard_key(rank), change)
        body = self.get(self.shard_key(rank))

        def vouch(manifest: Any) -> None:
            chunks = [body[start : start + CHUNK_BYTES] for start in range(0, len(body), CHUNK_BYTES)]
            manifest["shards"][rank]["sha256"] = [hashlib.sha256(chunk).hexdigest() for chunk in chunks]

        self.change_manifest(vouch)
