"""``finetune checkpoints verify``: reads whole checkpoints, byte for byte, and names each fault."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_cli.checkpoints.chunks import read_chunk, side_by_side
from finetune_cli.checkpoints.kept import read_manifest
from finetune_cli.checkpoints.layout import Fault, header_faults, layout_faults
from finetune_cli.errors import Damaged
from finetune_cli.output import say, size
from finetune_trainer.checkpoint.head import Kept
from finetune_trainer.checkpoint.manifest import Manifest, Shard, chunk_count
from finetune_trainer.object_store import ObjectStore
from finetune_trainer.safetensors_header import LENGTH_BYTES, BadHeader, header_end

MISSING = "is missing"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What reading a checkpoint found."""

    kept: Kept
    faults: tuple[Fault, ...]


def verify_all(store: ObjectStore, prefix: str, kept: Iterable[Kept]) -> list[Verdict]:
    """Read checkpoints, one after the other."""
    return [Verdict(each, tuple(verify(store, prefix, each))) for each in kept]


def verify(store: ObjectStore, prefix: str, kept: Kept) -> Iterator[Fault]:
    """Read a checkpoint whole and yield its faults."""
    manifest_uri = f"{prefix}/{kept.manifest}"
    try:
        manifest = read_manifest(store, prefix, kept)
    except Damaged as error:
        yield Fault(manifest_uri, str(error).removeprefix(f"{manifest_uri} "))
        return
    if manifest.position.step != kept.step:
        yield Fault(manifest_uri, f"is of step {manifest.position.step}, HEAD says {kept.step}")
    yield from layout_faults(manifest, manifest_uri)
    for shard in manifest.shards:
        yield from _shard_faults(store, f"{prefix}/{kept.folder}{shard.name}", manifest, shard)


def size_faults(store: ObjectStore, prefix: str, kept: Kept, manifest: Manifest) -> Iterator[Fault]:
    """Yield the objects of a checkpoint that are missing or of another size: what can be told without reading them."""
    for shard in manifest.shards:
        yield from _size_faults(store, f"{prefix}/{kept.folder}{shard.name}", shard)


def _size_faults(store: ObjectStore, uri: str, shard: Shard) -> Iterator[Fault]:
    info = store.head(uri)
    if info is None:
        yield Fault(uri, MISSING)
    elif info.size != shard.size_bytes:
        yield Fault(uri, f"has {info.size} bytes, the manifest says {shard.size_bytes}")


def _shard_faults(store: ObjectStore, uri: str, manifest: Manifest, shard: Shard) -> Iterator[Fault]:
    faults = list(_size_faults(store, uri, shard))
    yield from faults
    if Fault(uri, MISSING) in faults:
        return
    yield from _header_faults(store, uri, manifest, shard)
    chunks = range(min(chunk_count(shard), len(shard.sha256)))

    def fault_of(index: int) -> Fault | None:
        found = read_chunk(store, uri, shard, index)
        return found if isinstance(found, Fault) else None

    yield from (fault for fault in side_by_side(fault_of, chunks) if fault is not None)


def _header_faults(store: ObjectStore, uri: str, manifest: Manifest, shard: Shard) -> Iterator[Fault]:
    start = store.get(uri, 0, LENGTH_BYTES)
    try:
        header = store.get(uri, 0, header_end(start))
    except BadHeader as error:
        yield Fault(uri, f"is no safetensors file: {error}", 0, len(start))
        return
    yield from header_faults(manifest, shard, header, uri)


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print verdicts for people."""
    for verdict in verdicts:
        faults = len(verdict.faults)
        told = "whole" if not faults else f"BROKEN, {faults} fault{'s' if faults > 1 else ''}"
        say(f"step {verdict.kept.step}: {told} ({size(verdict.kept.size_bytes)})")
        for fault in verdict.faults:
            where = "" if fault.first is None else f" bytes {fault.first} to {fault.end}"
            say(f"  {fault.uri}{where}: {fault.problem}")


def verdicts_to_json(prefix: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return verdicts as a JSON document."""
    return {
        "prefix": prefix,
        "whole": not any(verdict.faults for verdict in verdicts),
        "checkpoints": [
            {
                "step": verdict.kept.step,
                "manifest": verdict.kept.manifest,
                "sizeBytes": verdict.kept.size_bytes,
                "whole": not verdict.faults,
                "faults": [
                    {"object": fault.uri, "firstByte": fault.first, "endByte": fault.end, "problem": fault.problem}
                    for fault in verdict.faults
                ],
            }
            for verdict in verdicts
        ],
    }
