"""What saving and resuming ask of a store at a thousand ranks, and what share of the time is left for training (P8).

No machine of this size is at hand, so the layout is computed with the code that lays out, describes and deals out real checkpoints, over
the real shapes of a model, and the goodput with Young's and Daly's model from costs that are measured elsewhere in this folder. Nothing is
timed here.

    make venv && PATH=… python benchmarks/simulate_scale.py
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for source_root in (ROOT, ROOT / "crds", ROOT / "trainer"):
    sys.path.insert(0, str(source_root))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from finetune_trainer.checkpoint.exchange import deal_out  # noqa: E402
from finetune_trainer.checkpoint.manifest import (  # noqa: E402
    CHUNK_BYTES,
    Interval,
    Manifest,
    Parameter,
    Position,
    Shard,
    decode,
    digest,
    encode,
)
from finetune_trainer.object_store.s3_upload import plan_parts  # noqa: E402
from finetune_trainer.saves import HOURS_BETWEEN_FAILURES_PER_RANK, best_interval_seconds  # noqa: E402

RESULT = Path(__file__).with_suffix(".md")
MODELS = {
    "7 B": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "70 B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
WRITTEN_BY, READ_BY = 1024, 1000
HEADER_BYTES = 64 * 1024

COPY_MIB_PER_SECOND = 9000.0
"""bench_checkpoint_stall: 229 MiB in 24 ms, one thread, host memory to host memory."""

COMMIT_MIB_PER_SECOND = 58.0
"""bench_transfer: hashing and upload by one rank, on a machine that also runs the store."""

RESTORE_MIB_PER_SECOND = 290.0
"""bench_transfer: verified reads by one rank, on the same machine."""

RESTART_SECONDS = 60.0
"""From a pod's death until the workers of the next generation have imported everything: 25 to 40 s were seen where the pod lives."""


@dataclass(frozen=True)
class Run:
    """A model on so many ranks."""

    name: str
    parameters: float
    ranks: int


def main() -> None:
    """Compute, print, keep."""
    table = "\n".join([*_layouts(), "", *_goodputs(), ""])
    sys.stdout.write(table)
    RESULT.write_text(table)


def _layouts() -> list[str]:
    lines = [
        f"| {WRITTEN_BY} ranks of ZeRO-3 → {READ_BY} | GiB | requests of a save | bytes ÷ 8 MiB + ranks | manifest, MiB | requests of a resume | bytes ÷ 8 MiB + ranks | bytes read ÷ bytes stored |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, config in MODELS.items():
        manifest = _manifest(_parameters(config), WRITTEN_BY)
        body = encode(manifest)
        assert decode(body) == manifest
        size = manifest.size_bytes
        uploads = sum(_upload_requests(shard.size_bytes) for shard in manifest.shards)
        shares = deal_out(manifest.shards, READ_BY)
        read = sum(_bytes(manifest.shards[share.shard], share.first, share.last) for mine in shares for share in mine)
        lines.append(
            f"| {name} parameters | {size / 2**30:,.0f} | {uploads + _commit_requests(WRITTEN_BY):,} "
            f"| {size // CHUNK_BYTES + WRITTEN_BY:,} | {len(body) / 2**20:.1f} "
            f"| {sum(map(len, shares)) + 2:,} | {size // CHUNK_BYTES + READ_BY:,} | {read / size:.3f} |"
        )
    return lines


def _parameters(config: LlamaConfig) -> list[Parameter]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [Parameter(name, parameter.numel()) for name, parameter in model.named_parameters()]


def _manifest(parameters: list[Parameter], ranks: int) -> Manifest:
    """Cut every parameter into equal slices, as ZeRO-3 does (deepspeed_state)."""
    shards = []
    for rank in range(ranks):
        intervals, offset = [], HEADER_BYTES
        for number, parameter in enumerate(parameters):
            step = -(-parameter.numel // ranks)
            start, end = min(parameter.numel, rank * step), min(parameter.numel, (rank + 1) * step)
            if start < end:
                intervals.append(Interval(number, start, end - start, offset))
                offset += 12 * (end - start)
        digests = tuple(digest(f"{rank}/{chunk}".encode()) for chunk in range(-(-offset // CHUNK_BYTES)))
        shards.append(Shard(f"rank-{rank:05}.safetensors", offset, digests, tuple(intervals)))
    return Manifest(Position(1, 1), 1, ranks, 3, "", tuple(parameters), {}, tuple(shards))


def _upload_requests(size: int) -> int:
    parts = len(plan_parts(size))
    return 1 if parts == 1 else parts + 2  # its creation and its completion


def _commit_requests(ranks: int) -> int:
    """Count the manifest, the reading and swapping of ``HEAD``, and the listing and deleting of a checkpoint that goes, by thousands."""
    return 3 + 2 * math.ceil((ranks + 1) / 1000)


def _bytes(shard: Shard, first: int, last: int) -> int:
    return min(last * CHUNK_BYTES, shard.size_bytes) - first * CHUNK_BYTES


def _goodputs() -> list[str]:
    lines = [
        "| P8, from measured costs | shard, MiB | still, s | committed after, s | interval, s | mean time between failures, h | goodput |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in (Run("70 B on 1,024", 70e9, 1024), Run("405 B on 16,384", 405e9, 16384)):
        shard = run.parameters * 12 / run.ranks / 2**20
        still, commit = shard / COPY_MIB_PER_SECOND, shard / COMMIT_MIB_PER_SECOND
        interval = best_interval_seconds(copy_seconds=still, commit_seconds=commit, ranks=run.ranks)
        between = HOURS_BETWEEN_FAILURES_PER_RANK * 3600 / run.ranks
        lost_per_failure = RESTART_SECONDS + shard / RESTORE_MIB_PER_SECOND + commit + interval / 2
        goodput = (1 - still / interval) * math.exp(-lost_per_failure / between)
        lines.append(
            f"| {run.name} | {shard:,.0f} | {still:.2f} | {commit:.1f} | {interval:.0f} | {between / 3600:.1f} | {goodput:.2%} |"
        )
    return [*lines, "", "Goals: at least 98.6 % on 1,024 and 97 % on 16,384."]


if __name__ == "__main__":
    main()
