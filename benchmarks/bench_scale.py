"""P5 and P6: many jobs at once, on a real API server with simulated nodes.

etcd and kube-apiserver are real, on loopback; scheduler, kubelets and agents are coroutines of this process (tests/operator/fleet.py): each pod
is bound, runs, gets a token of its own, and its agent talks to the job server of the real operator process, over two TLS connections as real
agents do. There is no controller manager and no scheduler, whose 50 pods a second would be the limit.

For each number of jobs, on an API server of its own: the same pods are created without an operator, by one client; then jobs, as fast as the API
server takes them, until all train; they train a while; the operator is killed while a tenth of the jobs fail; the API server is away
while another tenth does; all succeed. Writes are what the API server has audited of the operator, for jobs that did not fail.

Everything shares the machine, this process too: what counts is the ratio to bare creation in the same run.

    make venv && PATH=… python benchmarks/bench_scale.py [--jobs 100 1000] [--nodes 2] [--train 20] [--outage 60]
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for source_root in (ROOT, ROOT / "crds", ROOT / "operator"):
    sys.path.insert(0, str(source_root))
# The operator is a process of its own.
os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("crds", "operator"))

from tests.operator.documents import job_body, settings  # noqa: E402
from tests.operator.fleet import Fleet, Job, a_fleet  # noqa: E402
from tests.operator.kubelets import Kubelets, make_nodes, running  # noqa: E402
from tests.operator.real_api import Client, RealApi, running_api  # noqa: E402

from finetune_api.contract import JOB_LABEL  # noqa: E402
from finetune_api.job import parse_job  # noqa: E402
from finetune_operator.kube.api import PODS  # noqa: E402
from finetune_operator.plan.observation import NewPod  # noqa: E402
from finetune_operator.render.pod import render_pod  # noqa: E402

RESULT = Path(__file__).with_suffix(".md")
CLIENTS = 16  # requests to create something at one time
NAMESPACE, BARE = "jobs", "bare"
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
GOALS = """

Goals: at least 30 jobs/s and p99 at most 20 s; at most 6 writes and 1 for each pod; 200 MiB and 40 KiB for each connected pod. A tuned Kubeflow
trainer of two pods, on a machine like this with a scheduler: 10 jobs/s, p50 40 s, p99 95 s, 32 writes, 205 CPU-s until all run.
"""


@dataclass
class Figures:
    """What one run has shown, row by row."""

    rows: dict[str, str] = field(default_factory=dict)

    def tell(self, row: str, value: str) -> None:
        """Keep a row, and show it at once: a run takes minutes."""
        self.rows[row] = value
        print(f"{time.strftime('%H:%M:%S')} {row}: {value}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--nodes", type=int, default=2, help="pods of each job")
    parser.add_argument("--train", type=float, default=20.0, help="seconds to train undisturbed")
    parser.add_argument("--outage", type=float, default=60.0, help="seconds without an API server")
    arguments = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two connections for each pod, here and in the operator
    columns = [asyncio.run(_measure(count, arguments)) for count in arguments.jobs]
    table = _table([f"{count} jobs of {arguments.nodes} pods" for count in arguments.jobs], columns)
    sys.stdout.write(table)
    RESULT.write_text(table)


async def _measure(count: int, arguments: argparse.Namespace) -> Figures:
    figures = Figures()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with running_api(folder) as api, api.client() as client:
            await make_nodes(client)
            await _create_bare(api, client, figures, count, arguments.nodes)
            async with a_fleet(api, client, folder, NAMESPACE) as fleet:
                await _create(api, fleet, figures, count, arguments.nodes)
                await _train(fleet, figures, arguments.train)
                failed = _every_tenth(fleet, 3), _every_tenth(fleet, 7)
                await _kill_operator(fleet, figures, failed[0])
                await _stop_api_server(api, fleet, figures, failed[1], arguments.outage)
                await _finish(api, fleet, figures, {*failed[0], *failed[1]})
    return figures


async def _create_bare(api: RealApi, client: Client, figures: Figures, count: int, nodes: int) -> None:
    """Create the pods of so many jobs as one client does that has nothing else to do, and remove them again."""
    await client.make_namespace(BARE)
    jobs = {f"bare-{number:05d}": Job(nodes) for number in range(count)}
    phases: dict[str, str] = {}  # by pod uid

    def see(kind: str, body: dict[str, Any]) -> None:
        job, uid = jobs[body["metadata"]["labels"][JOB_LABEL]], body["metadata"]["uid"]
        phases[uid] = body["status"]["phase"] if kind != "DELETED" else "Gone"
        if kind == "ADDED":
            job.pods.add(uid)
            job.placed_at = time.monotonic() if len(job.pods) == nodes else None

    async def create(name: str) -> None:
        jobs[name].created_at = time.monotonic()
        job = parse_job(job_body(name=name, namespace=BARE, nodes=nodes))
        pods = (render_pod(job, NewPod(rank, 1), settings()) for rank in range(nodes))
        await asyncio.gather(*(client.post(PODS.path(BARE), pod) for pod in pods))

    async with running(Kubelets(client, None, on_pod=see)):
        begun, spent = time.monotonic(), _cpu_seconds(_servers(api))
        await _in_turn(create, jobs)
        await _until(lambda: all(job.placed_at for job in jobs.values()))
        _tell_creation(figures, "bare", jobs, begun)
        await _until(lambda: all(phase == "Running" for phase in phases.values()))
        figures.tell("bare: CPU-s of API server and etcd until all run", f"{_cpu_seconds(_servers(api)) - spent:.0f}")
        await client.delete(PODS.path(BARE), grace_seconds=0)
        await _until(lambda: all(phase == "Gone" for phase in phases.values()))


async def _create(api: RealApi, fleet: Fleet, figures: Figures, count: int, nodes: int) -> None:
    """Create jobs until all train."""
    servers, operator = _servers(api), [fleet.operator.pid]
    begun, spent = time.monotonic(), (_cpu_seconds(servers), _cpu_seconds(operator))
    names = [f"job-{number:05d}" for number in range(count)]
    await _in_turn(lambda name: fleet.create(job_body(name=name, nodes=nodes)), names)
    figures.tell("objects created by the client after, s", f"{time.monotonic() - begun:.1f}")
    await fleet.until("all pods exist", lambda: all(job.placed_at for job in fleet.jobs.values()), 600)
    _tell_creation(figures, "jobs", fleet.jobs, begun)
    at = await fleet.until("all train", lambda: fleet.train(names), 600)
    figures.tell("jobs: all train after, s", f"{at - begun:.1f}")
    figures.tell("jobs: CPU-s of API server and etcd until then", f"{_cpu_seconds(servers) - spent[0]:.0f}")
    figures.tell("jobs: CPU-s of the operator until then", f"{_cpu_seconds(operator) - spent[1]:.0f}")


async def _train(fleet: Fleet, figures: Figures, seconds: float) -> None:
    agents, pid = fleet.kubelets.agents, fleet.operator.pid
    requests, spent = sum(agent.requests for agent in agents.values()), _cpu_seconds([pid])
    begun = time.monotonic()
    await asyncio.sleep(seconds)
    requests, took = sum(agent.requests for agent in agents.values()) - requests, time.monotonic() - begun
    spent = _cpu_seconds([pid]) - spent
    figures.tell("training: requests to the job server, 1/s", f"{requests / took:.0f}")
    figures.tell("training: operator's CPU, cores", f"{spent / took:.2f}")
    figures.tell("training: operator's CPU for a request, ms", f"{spent / requests * 1000:.2f}")
    memory = _mebibytes(pid, "VmRSS")
    allowed = 200 + 40 * len(agents) / 1024
    figures.tell("training: operator's RSS (allowed), MiB", f"{memory:.0f} ({allowed:.0f})")
    figures.tell("operator's largest RSS, MiB", f"{_mebibytes(pid, 'VmHWM'):.0f}")


async def _kill_operator(fleet: Fleet, figures: Figures, failing: list[str]) -> None:
    await fleet.operator.kill()
    killed = time.monotonic()
    fleet.fail(failing)
    at = await fleet.until("all agents are answered", lambda: fleet.has_heard_all(killed), 300)
    figures.tell("operator killed: all agents are answered again after, s", f"{at - killed:.1f}")
    at = await fleet.until("what failed trains again", lambda: _again(fleet, failing), 300)
    figures.tell("operator killed: the tenth of the jobs that failed then train again after, s", f"{at - killed:.1f}")


async def _stop_api_server(api: RealApi, fleet: Fleet, figures: Figures, failing: list[str], seconds: float) -> None:
    before = {name: job.generation for name, job in fleet.jobs.items()}
    api.kill_api_server()
    fleet.fail(failing)
    await asyncio.sleep(seconds)
    await api.start_api_server()
    back = time.monotonic()
    at = await fleet.until("all agents are answered", lambda: fleet.has_heard_all(back), 300)
    row = f"API server away for {seconds:.0f} s"
    figures.tell(f"{row}: all agents are answered, s after its return", f"{at - back:.1f}")
    at = await fleet.until("what failed trains again", lambda: _again(fleet, failing), 300)
    figures.tell(f"{row}: the tenth of the jobs that failed then train again, s after", f"{at - back:.1f}")
    others = [name for name in fleet.jobs if name not in failing]
    restarted = sum(fleet.jobs[name].generation != before[name] for name in others)
    figures.tell(f"{row}: other jobs that were restarted", str(restarted))


async def _finish(api: RealApi, fleet: Fleet, figures: Figures, failed: set[str]) -> None:
    begun = time.monotonic()
    fleet.succeed()
    at = await fleet.until("all are complete", lambda: all(_is_complete(job) for job in fleet.jobs.values()), 300)
    figures.tell("all workers succeeded → all jobs Complete, s", f"{at - begun:.1f}")
    await asyncio.sleep(2)  # for what would be written after that
    lives = fleet.jobs.keys() - failed
    writes = Counter(
        f"{write.verb} {write.resource}"
        for write in api.writes()
        if (found := re.match(r"job-\d+", write.name)) and found[0] in lives
    )
    nodes = next(iter(fleet.jobs.values())).nodes
    figures.tell("API writes of a job's life (allowed)", f"{writes.total() / len(lives):.1f} ({6 + nodes})")
    each = ", ".join(f"{kind} {number / len(lives):.1f}" for kind, number in sorted(writes.items()))
    figures.tell("of these", each)


def _again(fleet: Fleet, names: Iterable[str]) -> bool:
    return all(fleet.jobs[name].generation > 1 for name in names) and fleet.train(names)


def _every_tenth(fleet: Fleet, first: int) -> list[str]:
    return list(fleet.jobs)[first::10]


def _is_complete(job: Job) -> bool:
    return any(one["type"] == "Complete" and one["status"] == "True" for one in job.status.get("conditions", ()))


def _tell_creation(figures: Figures, what: str, jobs: dict[str, Job], begun: float) -> None:
    waits = [job.placed_at - job.created_at for job in jobs.values() if job.placed_at is not None]
    took = max(job.placed_at or 0.0 for job in jobs.values()) - begun
    percentiles = " / ".join(f"{_percentile(waits, percent):.2f}" for percent in (50, 99))
    figures.tell(f"{what}: created → all pods exist, p50 / p99 s", percentiles)
    figures.tell(f"{what}: jobs per second", f"{len(jobs) / took:.1f}")


def _table(heads: list[str], columns: list[Figures]) -> str:
    rows = [
        f"| {row} | " + " | ".join(column.rows.get(row, "") for column in columns) + " |" for row in columns[-1].rows
    ]
    cpus = f"{os.cpu_count()} CPUs"
    return (
        "\n".join([f"| P5, P6 on {cpus} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|", *rows]) + GOALS
    )


async def _in_turn(do: Callable[[str], Awaitable[None]], names: Iterable[str]) -> None:
    """Do it for each, for a few at a time."""
    left = iter(names)

    async def work() -> None:
        for name in left:
            await do(name)

    await asyncio.gather(*(work() for _ in range(CLIENTS)))


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(600):
        while not holds():  # noqa: ASYNC110  looked at, as a user would
            await asyncio.sleep(0.05)


def _servers(api: RealApi) -> list[int]:
    return [api.pid("kube-apiserver"), api.pid("etcd")]


def _cpu_seconds(pids: Iterable[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_SECOND


def _mebibytes(pid: int, kind: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


if __name__ == "__main__":
    main()
