"""Save and resume through S3, against DeepSpeed's own ``save_checkpoint`` and ``load_checkpoint`` with boto3's transfers around them.

One rank on ZeRO stage 2 in FP32, and a real S3 server beside it. Ours: a save that is waited for until it is committed, and the resume of
a new incarnation with nothing in memory, from the probe and the fence on. Theirs: ``save_checkpoint`` into memory (/dev/shm, no disk is
timed) and an upload of its files with boto3's defaults; a download of them and ``load_checkpoint``. Theirs neither commits nor verifies.

    make venv && PATH=… python benchmarks/bench_resume.py [--millions 20 100] [--rounds 3]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench_checkpoint_stall import (  # first: it sets the environment and the path that the others need
    new_engine,
    one_rank_and_a_store,
    timed,
)

import boto3  # isort: skip

from finetune_api.protocol import ResumeSource  # isort: skip
from finetune_trainer.checkpoint.checkpoints import Checkpoints  # isort: skip
from finetune_trainer.checkpoint.head import Retention  # isort: skip
from finetune_trainer.checkpoint.manifest import Position  # isort: skip
from finetune_trainer.object_store import S3ObjectStore  # isort: skip

RESULT = Path(__file__).with_suffix(".md")
MEMORY = "/dev/shm"  # no disk is to be timed


@dataclass(frozen=True)
class Round:
    """Seconds."""

    our_save: float
    their_save: float
    our_resume: float
    their_resume: float


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with one_rank_and_a_store() as (bucket, endpoint):
        rows = [(millions, _measure(millions, options.rounds, bucket, endpoint)) for millions in options.millions]
    table = _table(rows)
    sys.stdout.write(table)
    RESULT.write_text(table)


def _measure(millions: int, rounds: int, bucket: str, endpoint: str) -> list[Round]:
    engine = new_engine(millions * 1_000_000, stage=2)
    engine.backward(sum(parameter.float().sum() for parameter in engine.module.parameters()))
    engine.step()
    ours, theirs = (
        _Ours(engine, f"{bucket}/{millions}", endpoint),
        _Theirs(engine, bucket, f"theirs/{millions}", endpoint),
    )
    ours.save(1)  # warms the server
    ours.resume()
    return [
        Round(
            our_save=timed(partial(ours.save, step)),
            their_save=timed(theirs.save),
            our_resume=timed(ours.resume),
            their_resume=timed(theirs.resume),
        )
        for step in range(2, rounds + 2)
    ]


class _Ours:
    def __init__(self, engine: Any, prefix: str, endpoint: str) -> None:
        self._engine, self._prefix, self._endpoint = engine, prefix, endpoint
        self._checkpoints = self._incarnation(1)
        self._checkpoints.resume()

    def save(self, step: int) -> None:
        self._checkpoints.save(Position(step, step))
        self._next = self._incarnation(step + 1)

    def resume(self) -> None:
        _, resumed = self._next.resume()
        assert resumed.source == ResumeSource.STORAGE, resumed
        self._checkpoints.close()
        self._checkpoints = self._next

    def _incarnation(self, generation: int) -> Checkpoints:
        self._staging = tempfile.TemporaryDirectory(dir=MEMORY)  # a new one: nothing is found in memory
        return Checkpoints(
            engine=self._engine,
            store=S3ObjectStore(self._endpoint),
            prefix=self._prefix,
            generation=generation,
            retention=Retention(1),
            recipe_digest="benchmark",
            staging=[Path(self._staging.name)],
        )


class _Theirs:
    def __init__(self, engine: Any, bucket: str, prefix: str, endpoint: str) -> None:
        self._engine, self._bucket, self._prefix = engine, bucket.removeprefix("s3://"), prefix
        self._client = boto3.client("s3", endpoint_url=endpoint)
        self._keys: list[str] = []

    def save(self) -> None:
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            self._engine.save_checkpoint(folder, tag="step")
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            self._keys = [str(path.relative_to(folder)) for path in files]
            for path, key in zip(files, self._keys, strict=True):
                self._client.upload_file(str(path), self._bucket, f"{self._prefix}/{key}")

    def resume(self) -> None:
        folder = tempfile.mkdtemp(dir=MEMORY)
        try:
            for key in self._keys:
                path = Path(folder, key)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._client.download_file(self._bucket, f"{self._prefix}/{key}", str(path))
            loaded, _ = self._engine.load_checkpoint(folder, tag="step")
            assert loaded is not None
        finally:
            shutil.rmtree(folder)


def _table(rows: list[tuple[int, list[Round]]]) -> str:
    lines = [
        "| medians, seconds | rounds | MiB | save, ours | save, theirs | theirs ÷ ours | resume, ours | resume, theirs | theirs ÷ ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for millions, rounds in rows:
        our_save, their_save, our_resume, their_resume = (
            statistics.median(getattr(one, name) for one in rounds)
            for name in ("our_save", "their_save", "our_resume", "their_resume")
        )
        lines.append(
            f"| {millions} M parameters | {len(rounds)} | {millions * 12e6 / 2**20:,.0f} | {our_save:.2f} | {their_save:.2f} "
            f"| {their_save / our_save:.2f} | {our_resume:.2f} | {their_resume:.2f} | {their_resume / our_resume:.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
