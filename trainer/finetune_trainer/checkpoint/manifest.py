"""The manifest of a checkpoint: everything but the numbers themselves, as JSON (docs/checkpoint-format.md).

The layout is one list of intervals per object, four integers each, in the order of the bytes. The three states of an
interval (fp32, exp_avg, exp_avg_sq) follow one another, so that one entry tells where each of them lies.

A thousand ranks times hundreds of parameters make tens of megabytes of very regular numbers: a large manifest is compressed.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_trainer import object_store
from finetune_trainer.checkpoint.head import FORMAT_VERSION, Unreadable
from finetune_trainer.checkpoint.trained_on import Sources, sources_from_json, sources_to_json

CHUNK_BYTES = object_store.CHUNK_BYTES
STATES = ("fp32", "exp_avg", "exp_avg_sq")
ITEM_BYTES = 4
MANIFEST_NAME = "manifest.json"
COMPRESSED_FROM_BYTES = 2**20
DECOMPRESSED_LIMIT_BYTES = 2**30
_GZIP_MAGIC = b"\x1f\x8b"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Position:
    """Where training stands: ``samples_consumed`` and the ranges of samples skipped, as half-open intervals.

    ``recent_losses`` are those of the newest steps, oldest first: what is a spike is decided from them (see spikes).
    """

    step: int
    samples_consumed: int
    skipped_ranges: tuple[tuple[int, int], ...] = ()
    recent_losses: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A trainable parameter, flattened: ``numel`` numbers."""

    name: str
    numel: int


@dataclass(frozen=True, slots=True)
class Interval:
    """``count`` numbers of a parameter from ``start``; their fp32 values begin at byte ``offset`` of the object."""

    parameter: int
    start: int
    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One object, what it holds and what each of its chunks of ``CHUNK_BYTES`` hashes to."""

    name: str
    size_bytes: int
    sha256: tuple[str, ...]
    intervals: tuple[Interval, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint. ``scalars`` is what ``deepspeed_state`` made of the engine, opaque here."""

    position: Position
    generation: int
    world_size: int
    zero_stage: int
    recipe_digest: str
    parameters: tuple[Parameter, ...]
    scalars: Json
    shards: tuple[Shard, ...]
    sources: Sources = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.size_bytes for shard in self.shards)


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest."""
    document = {
        "version": FORMAT_VERSION,
        **position_to_json(manifest.position),
        "generation": manifest.generation,
        "worldSize": manifest.world_size,
        "zeroStage": manifest.zero_stage,
        "recipe": manifest.recipe_digest,
        **sources_to_json(manifest.sources),
        "chunkBytes": CHUNK_BYTES,
        "states": list(STATES),
        "scalars": manifest.scalars,
        "parameters": [[parameter.name, parameter.numel] for parameter in manifest.parameters],
        "shards": [shard_to_json(shard) for shard in manifest.shards],
    }
    body = json.dumps(document, separators=(",", ":")).encode()
    return body if len(body) < COMPRESSED_FROM_BYTES else gzip.compress(body, compresslevel=6, mtime=0)


def decode(body: bytes) -> Manifest:
    """Return the manifest that bytes say.

    Raises:
        Unreadable: they are none, or one of a version to come.
    """
    try:
        document: Json = json.loads(_decompressed(body))
        layout = (document["version"], document["chunkBytes"], tuple(document["states"]))
        if layout != (FORMAT_VERSION, CHUNK_BYTES, STATES):
            raise Unreadable(f"version, chunk size and states are {layout!r}")
        return Manifest(
            position=position_from_json(document),
            generation=document["generation"],
            world_size=document["worldSize"],
            zero_stage=document["zeroStage"],
            recipe_digest=document["recipe"],
            parameters=tuple(Parameter(name, numel) for name, numel in document["parameters"]),
            scalars=document["scalars"],
            shards=tuple(shard_from_json(shard) for shard in document["shards"]),
            sources=sources_from_json(document),
        )
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def _decompressed(body: bytes) -> bytes:
    if not body.startswith(_GZIP_MAGIC):
        return body
    reader = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    text = reader.decompress(body, DECOMPRESSED_LIMIT_BYTES)
    if not reader.eof:
        raise ValueError("it ends in the middle, or is larger than any manifest")
    return text


def position_to_json(position: Position) -> Json:
    """Return a position's part of a document."""
    return {
        "step": position.step,
        "samplesConsumed": position.samples_consumed,
        "skippedRanges": [list(pair) for pair in position.skipped_ranges],
        "recentLosses": list(position.recent_losses),
    }


def position_from_json(document: Json) -> Position:
    """Return the position that a document tells."""
    return Position(
        step=document["step"],
        samples_consumed=document["samplesConsumed"],
        skipped_ranges=tuple((first, last) for first, last in document["skippedRanges"]),
        recent_losses=tuple(document.get("recentLosses", ())),
    )


def shard_to_json(shard: Shard) -> Json:
    """Return a shard's part of the manifest."""
    intervals = [[i.parameter, i.start, i.count, i.offset] for i in shard.intervals]
    return {"name": shard.name, "sizeBytes": shard.size_bytes, "sha256": list(shard.sha256), "intervals": intervals}


def shard_from_json(document: Json) -> Shard:
    """Return the shard that a part of a manifest describes."""
    return Shard(
        name=document["name"],
        size_bytes=document["sizeBytes"],
        sha256=tuple(document["sha256"]),
        intervals=tuple(Interval(*numbers) for numbers in document["intervals"]),
    )


def digest(body: bytes | memoryview) -> str:
    """Return the SHA-256 of bytes, in hex."""
    return hashlib.sha256(body).hexdigest()


def chunk_count(shard: Shard) -> int:
    """Return how many chunks a shard of this size has."""
    return -(-shard.size_bytes // CHUNK_BYTES)


def same_parameters(one: Sequence[Parameter], other: Sequence[Parameter]) -> bool:
    """Return whether two models train the same parameters, in whatever order they list them."""
    return sorted((p.name, p.numel) for p in one) == sorted((p.name, p.numel) for p in other)
