"""P7: job created → first optimizer step, against bare torchrun with the same trainer, recipe and store on the same machine.

Two nodes of one rank each, in turn: a FineTuneJob on the test cluster (creation as the API server is asked, first step as rank 0 prints it), and
two ``torchrun`` processes on loopback (from exec to the same line). Prints one table and keeps it beside this file.

    make venv && PATH=… python benchmarks/bench_first_step.py [--runs 5]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.cluster.cluster import Cluster  # noqa: E402
from tests.cluster.console import ClusterError  # noqa: E402
from tests.cluster.installation import install_on  # noqa: E402
from tests.cluster.jobs import Job, submit  # noqa: E402
from tests.cluster.training_inputs import make_namespace, recipe_spec, upload_inputs  # noqa: E402

NAMESPACE = "bench-first-step"
RESULT = Path(__file__).with_suffix(".md")
FIRST_STEP = "step 1/"
LIMIT_SECONDS = 180.0


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with _cluster() as cluster, tempfile.TemporaryDirectory() as folder:
        install_on(cluster)
        make_namespace(cluster, NAMESPACE)
        upload_inputs(cluster, Path(folder))
        job_seconds, bare_seconds = [], []
        for run in range(runs + 1):
            job, bare = _job(cluster, run), _bare(cluster, Path(folder), run)
            if run:  # the first of each warms file caches
                job_seconds.append(job)
                bare_seconds.append(bare)
        cluster.kubectl("delete", "namespace", NAMESPACE, "--wait")
    table = _table(job_seconds, bare_seconds)
    sys.stdout.write(table)
    RESULT.write_text(table)


def _spec(cluster: Cluster) -> dict[str, Any]:
    spec = recipe_spec(cluster, steps=2)
    spec["workers"]["resources"]["cpu"] = "1"
    return spec


def _job(cluster: Cluster, run: int) -> float:
    created = time.time()
    job = submit(cluster, NAMESPACE, f"run-{run}", _spec(cluster))
    job.wait_for_phase("Succeeded", LIMIT_SECONDS)
    seconds = _printed_at(job) - created
    job.delete()
    return seconds


def _printed_at(job: Job) -> float:
    pod = job.pods()[0]["metadata"]["name"]
    said = job.cluster.kubectl("logs", "-n", NAMESPACE, pod, "-c", "trainer", "--timestamps")
    line = next(line for line in said.splitlines() if FIRST_STEP in line)
    return datetime.fromisoformat(line.split(" ", 1)[0][:26]).replace(tzinfo=UTC).timestamp()


def _bare(cluster: Cluster, folder: Path, run: int) -> float:
    case = folder / f"bare-{run}"
    case.mkdir()
    spec = _spec(cluster)
    (case / "recipe.json").write_text(json.dumps(spec["recipe"]))
    storage = {"prefix": f"s3://tests/bare/{os.getpid()}-{run}", "endpoint": cluster.s3.endpoint}
    job_file = {"namespace": "bare", "name": "bare", "uid": str(run), "jobServer": "", "storage": storage}
    (case / "job.json").write_text(json.dumps(job_file))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.time()
    processes = [_torchrun(cluster, case, rank, port) for rank in range(2)]
    try:
        first = processes[0].stdout
        assert first is not None
        for line in first:
            if FIRST_STEP in line:
                seconds = time.time() - began
                break
        else:
            raise ClusterError("bare torchrun ended before its first step")
        first.read()
        return seconds
    finally:
        for process in processes:
            process.wait(LIMIT_SECONDS)


def _torchrun(cluster: Cluster, case: Path, rank: int, port: int) -> subprocess.Popen[str]:
    scratch = case / f"scratch-{rank}"
    scratch.mkdir()
    environment = {
        **os.environ,
        **cluster.s3.environment(),
        "PYTHONPATH": f"{ROOT / 'crds'}:{ROOT / 'trainer'}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "FINETUNE_RECIPE_FILE": str(case / "recipe.json"),
        "FINETUNE_JOB_FILE": str(case / "job.json"),
        "FINETUNE_GENERATION": "1",
        "FINETUNE_WORLD_SIZE": "2",
        "FINETUNE_SCRATCH_FOLDER": str(scratch),
        "FINETUNE_STAGING_FOLDER": str(scratch / "staging"),
    }
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1"]
    where = ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "finetune_trainer"]
    command = [sys.executable, *torchrun, *where]
    output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.DEVNULL, text=True)


@contextlib.contextmanager
def _cluster() -> Iterator[Cluster]:
    try:
        cluster, is_ours = Cluster.attach(), False
    except ClusterError:
        cluster, is_ours = Cluster.start(nodes=2), True
    try:
        yield cluster
    finally:
        if is_ours:
            cluster.stop()


def _table(job: list[float], bare: list[float]) -> str:
    ratio = statistics.median(job) / statistics.median(bare)
    rows = [("FineTuneJob, kubectl create → first step", job), ("bare torchrun, exec → first step", bare)]
    lines = ["| P7, two nodes, seconds | n | min | median | max |", "|---|---|---|---|---|"]
    lines += [f"| {n} | {len(v)} | {min(v):.1f} | {statistics.median(v):.1f} | {max(v):.1f} |" for n, v in rows]
    return "\n".join([*lines, "", f"Ratio of medians: {ratio:.2f} (goal: at most 1.2)", ""])


if __name__ == "__main__":
    main()
