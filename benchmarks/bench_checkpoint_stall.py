"""P2: training time lost to a checkpoint saved beside training, against the same one saved, uploaded and committed in its way.

One rank on stage 0 in FP32, whose parameters alone make the size, and a real S3 server beside it. The work of a step is matrix products, as
many as the passes over a model of the size need (six operations for each parameter and token) with very few tokens: training it for real
would need more memory than a small machine has. In each round the same work is done three times: without a save, with one beside training
that is committed before the work ends, with one that training waits for. What is lost is the time beyond the first. "Still" is for how long
training waited: what a device that computes by itself would lose. On two cores the rest is what copying, hashing, uploading and the S3
server take from the step.

    make venv && PATH=… python benchmarks/bench_checkpoint_stall.py [--millions 20 100 500] [--rounds 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
ROOT = Path(__file__).resolve().parents[1]
for source_root in (ROOT, ROOT / "crds", ROOT / "trainer"):
    sys.path.insert(0, str(source_root))

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tests.storage.seaweedfs import running_seaweedfs  # noqa: E402
from torch import nn  # noqa: E402

from finetune_trainer.checkpoint.checkpoints import Checkpoints  # noqa: E402
from finetune_trainer.checkpoint.head import Retention  # noqa: E402
from finetune_trainer.checkpoint.manifest import Position  # noqa: E402
from finetune_trainer.object_store import S3ObjectStore  # noqa: E402

RESULT = Path(__file__).with_suffix(".md")
LARGEST_PARAMETER = 25_000_000
TOKENS_PER_STEP = 128
"""Far fewer than anybody trains with: the more there are, the longer the passes beside which the numbers are copied."""
SIDE = 1024
WORK_MARGIN = 1.5
"""The work of a round lasts so many times the save that training waits for: the one beside training must end within it."""


@dataclass(frozen=True)
class Round:
    """Seconds."""

    still: float
    lost_beside: float
    lost_waiting: float
    committed_after: float


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[20, 100, 500])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the rank: in a pod there are as many as it has CPUs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with one_rank_and_a_store() as (bucket, endpoint):
        rows = [_measure(millions, options.rounds, bucket, endpoint) for millions in options.millions]
    table = _table(rows, options.threads)
    sys.stdout.write(table)
    RESULT.write_text(table)


@contextlib.contextmanager
def one_rank_and_a_store() -> Iterator[tuple[str, str]]:
    """Make this process a rank of one beside a real S3 server; yield a bucket's URI and the server's endpoint."""
    with tempfile.TemporaryDirectory() as name, running_seaweedfs(Path(name, "s3")) as server:
        os.environ.update(server.environment)
        dist.init_process_group("gloo", init_method=f"file://{name}/group", rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        yield server.create_bucket("bench"), server.endpoint


def _measure(millions: int, rounds: int, bucket: str, endpoint: str) -> tuple[int, list[Round], int]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as staging:
        checkpoints = Checkpoints(
            engine=new_engine(millions * 1_000_000, stage=0),
            store=S3ObjectStore(endpoint),
            prefix=f"{bucket}/{millions}",
            generation=1,
            retention=Retention(1),
            recipe_digest="benchmark",
            staging=[Path(staging)],
        )
        checkpoints.resume()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        checkpoints.save(Position(1, 1))  # warms the buffers and the server
        products = max(1, 6 * millions * 1_000_000 * TOKENS_PER_STEP // (2 * SIDE**3))
        measured = [_round(checkpoints, 10 * number, products) for number in range(1, rounds + 1)]
        extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return millions, measured, extra // 1024


def new_engine(numbers: int, *, stage: int) -> Any:
    """Return an engine in FP32 that trains so many numbers."""
    model = nn.ParameterList(
        nn.Parameter(torch.full((min(LARGEST_PARAMETER, numbers - at),), 0.5))
        for at in range(0, numbers, LARGEST_PARAMETER)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}},
    )
    return engine


def _round(checkpoints: Checkpoints, step: int, products: int) -> Round:
    """Measure one round; a step's passes are so many products."""
    waited = timed(lambda: checkpoints.save(Position(step, step)))
    steps = 1 + int(WORK_MARGIN * waited / timed(lambda: _steps(1, products)))
    alone = timed(lambda: _steps(steps, products))
    ended: list[Any] = []

    def between() -> None:
        checkpoints.wait_for_copy()  # as the engine does before each update
        ended.extend(checkpoints.ended())

    def beside() -> None:
        checkpoints.begin_save(Position(step + 1, step + 1))
        _steps(steps, products, between)

    with_one_beside = timed(beside)
    ended.extend(checkpoints.wait())
    assert ended[0].error is None, ended

    def waiting() -> None:
        checkpoints.save(Position(step + 2, step + 2))
        _steps(steps, products)

    return Round(ended[0].stall_seconds, with_one_beside - alone, timed(waiting) - alone, ended[0].seconds)


_MATRIX = torch.rand(SIDE, SIDE)


def _steps(count: int, products: int, between: Callable[[], object] = lambda: None) -> None:
    for _ in range(count):
        for _ in range(products):
            torch.mm(_MATRIX, _MATRIX)
        between()


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that work takes."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _table(rows: list[tuple[int, list[Round], int]], threads: int) -> str:
    lines = [
        f"| P2, threads: {threads}, medians, seconds | rounds | MiB | still | lost, saved beside | lost, waited for | committed after | still ÷ waited | lost ÷ waited | extra RSS, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for millions, rounds, extra in rows:
        still, beside, waiting, after = (
            statistics.median(getattr(one, name) for one in rounds)
            for name in ("still", "lost_beside", "lost_waiting", "committed_after")
        )
        lines.append(
            f"| {millions} M parameters | {len(rounds)} | {millions * 12e6 / 2**20:,.0f} | {still:.3f} | {beside:.2f} | {waiting:.2f} "
            f"| {after:.2f} | {still / waiting:.2%} | {beside / waiting:.1%} | {extra} |"
        )
    return "\n".join([*lines, "", "Goal: at most 1 %.", ""])


if __name__ == "__main__":
    main()
