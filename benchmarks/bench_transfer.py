"""P3: a shard up from memory and down into tensors, against boto3's own transfers with their defaults, on one S3 server.

The shard is what a rank writes: numbers, in the checkpoint's format, hashed chunk by chunk. *Up* is ``ObjectStore.upload`` from memory, with the
digests that staging has made anyway (and once more with making them here), against ``upload_file`` and ``upload_fileobj``. *Down*
is ``fill``, which verifies every chunk and puts the numbers into their tensors, against ``download_file``, which does neither.
Everything runs in turn, round after round, in one process beside the server; the CPU seconds tell who is the limit.
Prints one table and keeps it beside this file.

    make venv && PATH=… python benchmarks/bench_transfer.py [--rounds 7] [--mebibytes 256]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "trainer"), str(ROOT / "crds")]

import boto3  # noqa: E402
import torch  # noqa: E402
from tests.storage.seaweedfs import running_seaweedfs  # noqa: E402

from finetune_trainer.checkpoint.fetch import fill  # noqa: E402
from finetune_trainer.checkpoint.manifest import Manifest, Parameter, Position, Shard  # noqa: E402
from finetune_trainer.checkpoint.shard import Owned, write_shard  # noqa: E402
from finetune_trainer.object_store import CHUNK_BYTES, ObjectStore, S3ObjectStore  # noqa: E402

RESULT = Path(__file__).with_suffix(".md")
MIB = 2**20
PARAMETERS = 7
STATES = 3
BUCKET = "bench"
SHARD_URI = f"s3://{BUCKET}/rank-00000.safetensors"
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass
class Way:
    """One way to move the shard, and what each round of it took."""

    name: str
    move: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    own_cpu_seconds: list[float] = field(default_factory=list)
    server_cpu_seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mebibytes", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as (store, server):
        shard, parts = _shard(Path(folder), arguments.mebibytes * MIB)
        up, down = _ways(Path(folder), store, shard, parts)
        for number in range(arguments.rounds + 1):
            for way in random.sample([*up, *down], len(up) + len(down)):
                _measure(way, server, keep=number > 0)  # the first round warms connections and caches
    table = _table(arguments.mebibytes, up, down)
    sys.stdout.write(table)
    RESULT.write_text(table)


@contextmanager
def _server(folder: Path) -> Iterator[tuple[ObjectStore, int]]:
    """Yield a store and its server's process id."""
    with running_seaweedfs(folder / "seaweedfs") as server:
        os.environ.update(server.environment, AWS_ENDPOINT_URL_S3=server.endpoint)
        server.create_bucket(BUCKET)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        yield S3ObjectStore(server.endpoint), int(children[-1])


def _shard(folder: Path, size_bytes: int) -> tuple[Shard, list[Owned]]:
    count = size_bytes // (PARAMETERS * STATES * 4)
    torch.manual_seed(1)
    parts = [Owned(f"layer.{i}", 0, tuple(torch.randn(count) for _ in range(STATES))) for i in range(PARAMETERS)]
    path = folder / SHARD_URI.rpartition("/")[2]
    return write_shard(path, parts, {part.name: i for i, part in enumerate(parts)}), parts


def _ways(folder: Path, store: ObjectStore, shard: Shard, parts: list[Owned]) -> tuple[list[Way], list[Way]]:
    """Return the ways up and the ways down; the last of each is ours."""
    client = boto3.client("s3")
    path = folder / shard.name
    body = path.read_bytes()
    store.upload(body, SHARD_URI, digests=shard.sha256)
    parameters = tuple(Parameter(part.name, part.count) for part in parts)
    manifest = Manifest(Position(1, 1), 1, 1, 1, "", parameters, {}, (shard,))
    tensors = [Owned(part.name, 0, tuple(torch.zeros(part.count) for _ in range(STATES))) for part in parts]
    up = [
        Way("up: boto3 upload_file", lambda: client.upload_file(str(path), BUCKET, "boto3")),
        Way("up: boto3 upload_fileobj", lambda: client.upload_fileobj(io.BytesIO(body), BUCKET, "boto3")),
        Way("up: upload, hashing included", lambda: store.upload(body, f"s3://{BUCKET}/ours", digests=_digests(body))),
        Way("up: upload", lambda: store.upload(body, f"s3://{BUCKET}/ours", digests=shard.sha256)),
    ]
    down = [
        Way("down: boto3 download_file", lambda: client.download_file(BUCKET, shard.name, str(folder / "down"))),
        Way("down: fill, verified", lambda: fill(store, f"s3://{BUCKET}/", manifest, tensors)),
    ]
    return up, down


def _digests(body: bytes) -> list[str]:
    view = memoryview(body)
    return [hashlib.sha256(view[start : start + CHUNK_BYTES]).hexdigest() for start in range(0, len(body), CHUNK_BYTES)]


def _measure(way: Way, server: int, *, keep: bool) -> None:
    began, own, servers = time.perf_counter(), time.process_time(), _cpu_seconds(server)
    way.move()
    took = time.perf_counter() - began, time.process_time() - own, _cpu_seconds(server) - servers
    if keep:
        for kept, value in zip((way.seconds, way.own_cpu_seconds, way.server_cpu_seconds), took, strict=True):
            kept.append(value)


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def _table(mebibytes: int, up: list[Way], down: list[Way]) -> str:
    columns = ["n", "MiB/s, median", "min", "max", "client CPU-s", "server CPU-s"]
    lines = [
        f"| P3, {mebibytes} MiB, {os.cpu_count()} CPUs for client and server | {' | '.join(columns)} |",
        "|---|---|---|---|---|---|---|",
        *(_row(way, mebibytes) for way in (*up, *down)),
        "",
        f"Ratio of medians, up: {_ratio(up)} (goal: at least 2). Down: {_ratio(down)} (goal: at least 2).",
    ]
    return "\n".join([*lines, ""])


def _row(way: Way, mebibytes: int) -> str:
    rates = [mebibytes / seconds for seconds in way.seconds]
    cells: list[Any] = [
        way.name,
        len(rates),
        *(f"{rate:.0f}" for rate in (statistics.median(rates), min(rates), max(rates))),
        *(f"{statistics.median(seconds):.2f}" for seconds in (way.own_cpu_seconds, way.server_cpu_seconds)),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _ratio(ways: list[Way]) -> str:
    """Return how much faster our way is than boto3's best, and how much less of the client's CPU it takes."""
    *others, ours = ways
    theirs = min((way for way in others if "boto3" in way.name), key=lambda way: statistics.median(way.seconds))
    faster = statistics.median(theirs.seconds) / statistics.median(ours.seconds)
    cheaper = statistics.median(theirs.own_cpu_seconds) / statistics.median(ours.own_cpu_seconds)
    return f"{faster:.2f}, with the client's CPU seconds divided by {cheaper:.1f}"


if __name__ == "__main__":
    main()
