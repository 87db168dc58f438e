"""P1, its first case: SIGKILL of a worker → the next step on all ranks, in pods that live on.

Two pods of one rank each on this machine: real agents, the recipe's own trainer on a tiny Llama, a real S3 server, checkpoints every five
steps. Ranks 0 and 1 are killed in turn, at random moments. The same trainer is then run and killed as a script, under torchrun, for comparison.

The operator is a stand-in that orders the next generation as soon as both agents have reported the failure. What the real one adds is its own
decision: two writes of status, and the order's way through the Service. Byte code is compiled, files are in the page cache.

    make venv && PATH=… python benchmarks/bench_recovery.py [--kills 60] [--torchrun-kills 6]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for source_root in (ROOT, ROOT / "crds", ROOT / "operator", ROOT / "trainer"):
    sys.path.insert(0, str(source_root))

from tests.agent.job_server import JobServer, make_certificates  # noqa: E402
from tests.agent.pod import Pod  # noqa: E402
from tests.agent.recipe_gang import RecipeGang, Said  # noqa: E402
from tests.storage.seaweedfs import running_seaweedfs  # noqa: E402
from tests.trainer.recipes import language_modelling  # noqa: E402
from tests.trainer.sentences import counting_texts, write_jsonl  # noqa: E402
from tests.trainer.tiny_models import save_llama  # noqa: E402

from finetune_agent import processes  # noqa: E402
from finetune_agent.build import build_agent  # noqa: E402
from finetune_api.protocol import AgentState, BeatKind, JobCheckpoint  # noqa: E402

RESULT = Path(__file__).with_suffix(".md")
PHASES = ("both agents have told", "the next workers run", "imported and joined", "restored", "first step", "in all")
SETTLED_STEPS = 8  # before the next kill, so that there is something to restore
LIMIT_SECONDS = 120.0
TORCHRUN = [sys.executable, "-u", "-m", "finetune_trainer"]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--torchrun-kills", type=int, default=6)
    arguments = parser.parse_args()
    table = asyncio.run(_measure(arguments.kills, arguments.torchrun_kills))
    sys.stdout.write(table)
    RESULT.write_text(table)


async def _measure(kills: int, torchrun_kills: int) -> str:
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / part for part in ("forked", "torchrun")]
        for folder in folders:
            folder.mkdir()
        async with _gang(folders[0], command=[]) as gang:
            forked = [await _recovery(gang, kill % 2) for kill in range(kills)]
            memory = _memory(gang)
        async with _gang(folders[1], command=TORCHRUN) as gang:
            launched = [await _recovery(gang, kill % 2) for kill in range(torchrun_kills)]
    return _table(forked, launched) + memory


@contextlib.asynccontextmanager
async def _gang(folder: Path, *, command: list[str]) -> AsyncIterator[RecipeGang]:
    """Run a job on two pods until it trains."""
    save_llama(folder / "llama")
    write_jsonl(folder / "texts.jsonl", counting_texts(200))
    build_agent(folder / "agent.pyz")
    make_certificates(folder)
    server = JobServer(folder)
    await server.start()
    pods = [
        Pod(f"pod-{rank}", Path(tempfile.mkdtemp(prefix="pod-")), folder / "agent.pyz", server) for rank in range(2)
    ]
    try:
        with running_seaweedfs(folder) as store:
            gang = RecipeGang(
                pods,
                server,
                store,
                recipe=language_modelling(folder, evaluation=None, training={"steps": 1_000_000}),
                prefix=f"{store.create_bucket('bench')}/job",
                checkpoint=JobCheckpoint(interval_steps=5),
                command=command,
            )
            for pod in pods:
                gang.start(pod)
            await gang.ready()
            await gang.run()
            await gang.until_trained(SETTLED_STEPS)
            yield gang
    finally:
        for pod in pods:
            pod.remove()
        await server.stop()


async def _recovery(gang: RecipeGang, rank: int) -> list[float]:
    """Kill a worker; return when each phase was over, in seconds since."""
    await asyncio.sleep(random.random())
    server = gang.pods[0].server
    killed = time.monotonic()
    gang.kill(rank)
    await server.until(lambda: all(_has_failed(pod) for pod in gang.pods), LIMIT_SECONDS)
    told = time.monotonic()
    await gang.run()
    await gang.until_trained(SETTLED_STEPS)
    resumed = next(one for one in gang.said() if one.of(BeatKind.RESUMED))
    restored_step = resumed.said["resumed"]["step"]
    assert resumed.said["resumed"]["source"] == "Memory", resumed
    times = [
        told,
        gang.first(lambda one: one.of(BeatKind.HEARTBEAT)),
        _joined(gang),
        resumed.at,
        gang.first(lambda one: one.trained_step > restored_step),
    ]
    return [at - killed for at in times]


def _has_failed(pod: Pod) -> bool:
    return bool(pod.report and pod.report.state is AgentState.FAILED and pod.report.exits)


def _joined(gang: RecipeGang) -> float:
    """Return when the last rank began to prepare: its second heartbeat, the first being that of the new process."""
    beats: dict[int, list[Said]] = {}
    for one in gang.said():
        if one.of(BeatKind.HEARTBEAT):
            beats.setdefault(one.rank, []).append(one)
    return max(each[1].at for each in beats.values())


def _memory(gang: RecipeGang) -> str:
    server = processes.listener(gang.pods[0].folder / "agent" / "fork-server.sock")
    worker = gang.worker(0)
    assert server is not None
    parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    parts = [
        f"{name} {_private(pid)}" for name, pid in (("fork server", server), ("parent", parent), ("worker", worker))
    ]
    return f"Private memory of a pod's processes, MiB: {', '.join(parts)}; shared by them {_shared(server)}.\n"


def _private(pid: int) -> int:
    return sum(_kibibytes(pid, kind) for kind in ("Private_Clean", "Private_Dirty")) // 1024


def _shared(pid: int) -> int:
    return sum(_kibibytes(pid, kind) for kind in ("Shared_Clean", "Shared_Dirty")) // 1024


def _kibibytes(pid: int, kind: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def _table(forked: list[list[float]], launched: list[list[float]]) -> str:
    lines = [
        f"| P1, SIGKILL of a worker, seconds | forked, n = {len(forked)}: p50 | p99 | torchrun, n = {len(launched)}: p50 | max |",
        "|---|---|---|---|---|",
    ]
    for number, phase in enumerate(PHASES):
        mine, theirs = _durations(forked, number), _durations(launched, number)
        figures = (statistics.median(mine), _percentile(mine, 99), statistics.median(theirs), max(theirs))
        lines.append(f"| {phase} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    return "\n".join([*lines, "", "Goal: p50 at most 1 s, p99 at most 3 s.", ""])


def _durations(runs: list[list[float]], number: int) -> list[float]:
    """Return how long a phase took; the last of them is all."""
    if number == len(PHASES) - 1:
        return [run[-1] for run in runs]
    return [run[number] - (run[number - 1] if number else 0.0) for run in runs]


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


if __name__ == "__main__":
    main()
