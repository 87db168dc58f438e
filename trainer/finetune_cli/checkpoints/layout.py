"""Does a manifest fit itself, and a shard's header the manifest? Pure: values in, faults out.

A safetensors header and the intervals of a manifest say the same twice, for two readers. Both must tell where each number lies, and all
intervals together must hold every number of every parameter exactly once.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from finetune_trainer.checkpoint.manifest import ITEM_BYTES, STATES, Interval, Manifest, Shard, chunk_count
from finetune_trainer.safetensors_header import BadHeader, Tensor, parse_header

INTERVAL_ITEM_BYTES = len(STATES) * ITEM_BYTES


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it should be: in which object, at which bytes (half-open; None: the object as a whole), what."""

    uri: str
    problem: str
    first: int | None = None
    end: int | None = None


def layout_faults(manifest: Manifest, manifest_uri: str) -> Iterator[Fault]:
    """Yield where a manifest contradicts itself."""
    held: dict[int, list[Interval]] = defaultdict(list)
    for shard in manifest.shards:
        for problem in _shard_problems(manifest, shard):
            yield Fault(manifest_uri, f"contradicts itself about {shard.name}: {problem}")
        for interval in shard.intervals:
            held[interval.parameter].append(interval)
    for index, parameter in enumerate(manifest.parameters):
        for problem in _coverage_problems(held[index], parameter.numel):
            yield Fault(manifest_uri, f"{problem} of {parameter.name}")


def header_faults(manifest: Manifest, shard: Shard, header: bytes, uri: str) -> Iterator[Fault]:
    """Yield where a shard's own header, its first bytes, says something else than the manifest."""
    try:
        found = parse_header(header)
    except BadHeader as error:
        yield Fault(uri, f"is no safetensors file: {error}", 0, len(header))
        return
    expected = dict(_expected_tensors(manifest, shard))
    for name in sorted(expected.keys() - found.keys()):
        yield Fault(uri, f"its header lacks {name}", 0, len(header))
    for name in sorted(found.keys() - expected.keys()):
        yield Fault(
            uri, f"its header has {name}, of which the manifest knows nothing", found[name].begin, found[name].end
        )
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            yield Fault(
                uri,
                f"its header describes {name} otherwise than the manifest",
                expected[name].begin,
                expected[name].end,
            )


def _expected_tensors(manifest: Manifest, shard: Shard) -> Iterator[tuple[str, Tensor]]:
    for interval in shard.intervals:
        if interval.parameter not in range(len(manifest.parameters)):
            continue  # a fault of the manifest's own
        parameter = manifest.parameters[interval.parameter].name
        for index, state in enumerate(STATES):
            begin = interval.offset + index * interval.count * ITEM_BYTES
            end = begin + interval.count * ITEM_BYTES
            yield f"{parameter}/{state}/{interval.start}", Tensor("F32", (interval.count,), begin, end)


def _shard_problems(manifest: Manifest, shard: Shard) -> Iterator[str]:
    if len(shard.sha256) != chunk_count(shard):
        yield f"{len(shard.sha256)} hashes for {chunk_count(shard)} chunks"
    end = 0
    for interval in sorted(shard.intervals, key=lambda interval: interval.offset):
        if interval.parameter not in range(len(manifest.parameters)):
            yield f"an interval of parameter {interval.parameter}, of which there are {len(manifest.parameters)}"
        if interval.offset < end:
            yield f"intervals overlap at byte {interval.offset}"
        end = interval.offset + interval.count * INTERVAL_ITEM_BYTES
    if end > shard.size_bytes:
        yield f"intervals up to byte {end} of {shard.size_bytes}"


def _coverage_problems(intervals: list[Interval], numel: int) -> Iterator[str]:
    reached = 0
    for interval in sorted(intervals, key=lambda interval: interval.start):
        if interval.start > reached:
            yield f"no shard holds the numbers {reached} to {interval.start}"
        elif interval.start < reached:
            yield f"two shards hold the numbers {interval.start} to {min(reached, interval.start + interval.count)}"
        reached = max(reached, interval.start + interval.count)
    if reached < numel:
        yield f"no shard holds the numbers {reached} to {numel}"
    if reached > numel:
        yield f"a shard holds the numbers {numel} to {reached}, which are behind the end"
