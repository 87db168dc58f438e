"""P1 on the real cluster: a worker, an agent, a pod is killed, or a node is cut off → the next optimizer step of the whole gang.

A recipe on two nodes, the real operator, in one cluster on this machine. Members are hit in turn, rank 0 too, at random moments. Times are those that
kubelets gave to what rank 0 prints (a step needs all ranks) and those at which a watch on the job told of the generation.
A node that is cut off is seen by nobody before its agent is late; ``detected`` is the time until the next generation is minted. How plain torchrun
recovers from the death of a worker is in bench_recovery.md.

    make venv && PATH=… python benchmarks/bench_gang_recovery.py [--kills 50] [--cuts 10]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.cluster.cluster import Cluster  # noqa: E402
from tests.cluster.installation import install_on  # noqa: E402
from tests.cluster.jobs import Job, submit  # noqa: E402
from tests.cluster.training_inputs import make_namespace, recipe_spec, upload_inputs  # noqa: E402

NAMESPACE = "bench-recovery"
RESULT = Path(__file__).with_suffix(".md")
SETTLE_SECONDS = 3.0
LIMIT_SECONDS = 180.0
PHASES = ("detected", "members committed", "restored", "first step", "in all")

# Says when, and kills the one process of that name in the pod.
KILL = """
import os, pathlib, signal, sys, time
found = [int(f.parent.name) for f in pathlib.Path("/proc").glob("[0-9]*/comm") if f.read_text().startswith(sys.argv[1])]
assert len(found) == 1, found
print(time.time(), flush=True)
os.kill(found[0], signal.SIGKILL)
"""

Hit = Callable[[Job, str], contextlib.AbstractContextManager[float]]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cuts", type=int, default=10)
    arguments = parser.parse_args()
    cases: list[tuple[str, Hit, int, int]] = [
        ("worker, pod lives", _kill("worker "), 0, arguments.kills),
        ("agent, pod lives", _kill("agent"), 0, arguments.kills),
        ("pod", _delete_pod, 0, arguments.kills),
        ("node cut off, a spare", _cut_off, 1, arguments.cuts),
        ("node cut off", _cut_off, 0, arguments.cuts),
    ]
    with _cluster() as cluster, tempfile.TemporaryDirectory() as folder:
        install_on(cluster)
        make_namespace(cluster, NAMESPACE)
        upload_inputs(cluster, Path(folder))
        rows: dict[str, list[list[float]]] = {}
        for name, hit, spares, times in cases:
            if times:
                rows[name] = _case(cluster, name, hit, spares, times)
                RESULT.write_text(_table(rows))  # the next may take an hour
        cluster.kubectl("delete", "namespace", NAMESPACE, "--wait")
    sys.stdout.write(_table(rows))


def _case(cluster: Cluster, name: str, hit: Hit, spares: int, times: int) -> list[list[float]]:
    spec = recipe_spec(cluster, steps=10_000_000)
    spec["checkpoint"] = {"interval": {"steps": 20}}
    spec["recovery"] = {"maxRestarts": 10_000}
    spec["workers"] |= {"spares": spares, "resources": {"cpu": "500m", "memory": "2Gi"}}
    job = submit(cluster, NAMESPACE, "".join(c if c.isalpha() else "-" for c in name), spec)
    try:
        return [_recovery(job, hit, spares, rank=number % 2) for number in range(times)]
    finally:
        job.delete()


def _recovery(job: Job, hit: Hit, spares: int, rank: int) -> list[float]:
    """Hit a member; return when each phase was over, in seconds since."""
    trained = job.wait("it trains", lambda s: _trains(s, spares), LIMIT_SECONDS)
    generation, step = trained["gang"]["generation"], trained["checkpoint"]["step"]
    job.wait("a later checkpoint", lambda s: s["checkpoint"]["step"] > step, LIMIT_SECONDS)
    time.sleep(SETTLE_SECONDS + random.random())
    with _Watch(job) as watch, hit(job, trained["gang"]["members"][rank]["pod"]) as at:
        status = job.wait("it trains again", lambda s: _resumed(s, generation + 1), LIMIT_SECONDS)
        first = next(member["pod"] for member in status["gang"]["members"] if member["rank"] == 0)
        restored, stepped = _printed(job, first, status["gang"]["generation"])
        return [
            moment - at for moment in (watch.minted(generation + 1), watch.complete(generation + 1), restored, stepped)
        ]


def _trains(status: dict[str, Any], spares: int) -> bool:
    gang = status.get("gang", {})
    ready = status.get("phase") == "Running" and (gang.get("spares") or 0) >= spares
    return ready and _resumed(status, gang["generation"]) and status.get("checkpoint", {}).get("step", 0) > 0


def _resumed(status: dict[str, Any], generation: int) -> bool:
    return status.get("resumed", {}).get("generation", 0) >= generation


# What is done to a member.


def _kill(process: str) -> Hit:
    @contextlib.contextmanager
    def hit(job: Job, pod: str) -> Iterator[float]:
        yield float(job.run_in(pod, "python3", "-c", KILL, process).split()[0])

    return hit


@contextlib.contextmanager
def _delete_pod(job: Job, pod: str) -> Iterator[float]:
    at = time.time()
    job.cluster.kubectl("delete", "pod", pod, "-n", NAMESPACE, "--grace-period=0", "--force", "--wait=false")
    yield at


@contextlib.contextmanager
def _cut_off(job: Job, pod: str) -> Iterator[float]:
    node = job.cluster.get("pod", pod, NAMESPACE)["spec"]["nodeName"]
    at = time.time()
    job.cluster.cut_node(node)
    try:
        yield at
    finally:
        job.cluster.heal_node(node)
        job.cluster.wait_for_ready(node)


# What can be seen of it.


class _Watch:
    """When each generation of a job was seen to be minted, and to have members."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._minted: dict[int, float] = {}
        self._complete: dict[int, float] = {}

    def __enter__(self) -> Self:
        fields = "{.status.gang.generation} {.status.gang.members[*].uid}"
        command = [
            "kubectl",
            "get",
            "ftj",
            self._job.name,
            "-n",
            NAMESPACE,
            "--watch",
            "-o",
            "jsonpath=" + fields + "{'\\n'}",
        ]
        self._process = subprocess.Popen(
            command, env=self._job.cluster.environment(), stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            generation, *member = line.split()
            self._minted.setdefault(int(generation), time.time())
            if member:
                self._complete.setdefault(int(generation), time.time())

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._reader.join()

    def minted(self, generation: int) -> float:
        """When a generation, or a later one, was there."""
        return min(at for number, at in self._minted.items() if number >= generation)

    def complete(self, generation: int) -> float:
        """When the newest generation since had its members."""
        return max(at for number, at in self._complete.items() if number >= generation)


def _printed(job: Job, pod: str, generation: int) -> tuple[float, float]:
    """Return when rank 0 of a generation had restored, and when it had done its first step."""
    until = time.monotonic() + LIMIT_SECONDS
    while True:
        said = job.cluster.kubectl("logs", "-n", NAMESPACE, pod, "-c", "trainer", "--timestamps", "--tail=400")
        lines = said.splitlines()
        starts = [n for n, line in enumerate(lines) if f"generation {generation}: starting after step" in line]
        steps = [n for n, line in enumerate(lines) if starts and n > starts[0] and "] step " in line]
        if steps:
            return _time(lines[starts[0]]), _time(lines[steps[0]])
        if time.monotonic() > until:
            raise TimeoutError(said)
        time.sleep(0.2)


def _time(line: str) -> float:
    return datetime.fromisoformat(line.split(" ", 1)[0][:26]).replace(tzinfo=UTC).timestamp()


@contextlib.contextmanager
def _cluster() -> Iterator[Cluster]:
    """A third node is where a lost pod goes."""
    cluster = Cluster.start(nodes=3)
    try:
        yield cluster
    finally:
        cluster.stop()


def _table(rows: dict[str, list[list[float]]]) -> str:
    lines = [
        "| P1 on the cluster, seconds: p50 (p99) | n | " + " | ".join(PHASES) + " |",
        "|---" * (len(PHASES) + 2) + "|",
    ]
    for name, runs in rows.items():
        figures = [f"{statistics.median(v):.2f} ({_percentile(v, 99):.2f})" for v in _durations(runs)]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(figures) + " |")
    goals = "p50 at most 1 s, p99 at most 3 s for a worker; 8 s and 15 s for an agent or pod; for a node the same after detection, 2 s with a spare"
    return "\n".join([*lines, "", f"Goals: {goals}.", ""])


def _durations(runs: list[list[float]]) -> list[list[float]]:
    """Return how long each phase took, in each run; the last is all."""
    parts = [[run[number] - (run[number - 1] if number else 0.0) for run in runs] for number in range(len(runs[0]))]
    return [*parts, [run[-1] for run in runs]]


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


if __name__ == "__main__":
    main()
