"""Pods that train a tiny model with the recipe's own trainer, against a real S3 server, and all that their workers say.

``command`` is for those who want the trainer under torchrun, as a script would be.
"""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.protocol import BeatKind, JobCheckpoint, JobStorage
from tests.agent.job_server import JobServer
from tests.agent.pod import Pod, wait_for
from tests.storage.seaweedfs import S3Server

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "tests/agent/mirror", ROOT / "crds", ROOT / "trainer")


@dataclass
class Said:
    """A datagram of a process, and when it was sent (monotonic). That a worker runs is told by its parent."""

    at: float
    pid: int
    generation: int
    rank: int
    said: dict[str, Any]

    def of(self, kind: BeatKind) -> dict[str, Any] | None:
        return self.said.get(kind.value)

    @property
    def trained_step(self) -> int:
        """The step that this heartbeat says was trained, or 0."""
        beat = self.of(BeatKind.HEARTBEAT) or {}
        return beat.get("step", 0) if beat.get("phase") == "Training" else 0


class RecipeGang:
    """The pods of one job."""

    def __init__(
        self,
        pods: list[Pod],
        server: JobServer,
        store: S3Server,
        *,
        recipe: dict[str, Any],
        prefix: str,
        checkpoint: JobCheckpoint,
        processes_per_node: int = 1,
        command: Sequence[str] = (),
    ) -> None:
        self.pods = pods
        self.generation = 0
        self.processes_per_node = processes_per_node
        self._said: dict[int, list[Said]] = {}
        self._offsets: dict[Path, int] = {}
        self._server = server
        self._store = store
        self._recipe = recipe
        self._command = list(command)
        self._storage = JobStorage(prefix, store.endpoint)
        self._checkpoint = checkpoint

    def start(self, pod: Pod, **environment: str) -> None:
        """Start one pod's container."""
        for folder in ("scratch", "staging"):
            (pod.folder / folder).mkdir(exist_ok=True)
        variables = {
            **self._store.environment,
            "PYTHONPATH": ":".join(str(source) for source in SOURCES),
            "BEAT_MIRROR": str(pod.folder / "beats"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "FINETUNE_SCRATCH_FOLDER": str(pod.folder / "scratch"),
            "FINETUNE_STAGING_FOLDER": str(pod.folder / "staging"),
            "FINETUNE_CLAIMS_FOLDER": str(pod.folder / "claims"),
            **environment,
        }
        pod.start(
            self._command,
            fake_torch=False,
            recipe=self._recipe,
            storage=self._storage,
            checkpoint=self._checkpoint,
            **variables,
        )

    async def ready(self) -> None:
        await self._server.until(lambda: all(pod.report for pod in self.pods))

    async def run(self) -> int:
        """Order the next generation."""
        self.generation += 1
        nodes = len(self.pods)
        await asyncio.gather(
            *(
                pod.run(self.generation, rank=rank, nodes=nodes, workers=self.processes_per_node, master=self.pods[0])
                for rank, pod in enumerate(self.pods)
            )
        )
        return self.generation

    def said(self, generation: int | None = None) -> list[Said]:
        """Return what the workers of a generation, the newest by default, have said so far, in order."""
        for pod in self.pods:
            self._read(pod.folder / "beats")
        found = self._said.get(self.generation if generation is None else generation, [])
        return sorted(found, key=lambda one: one.at)

    def _read(self, file: Path) -> None:
        """Take the whole lines that a file has more than before."""
        if not file.exists():
            return
        with file.open("rb") as lines:
            lines.seek(self._offsets.get(file, 0))
            new = lines.read().rpartition(b"\n")[0]
        self._offsets[file] = self._offsets.get(file, 0) + len(new) + bool(new)
        for line in map(json.loads, new.splitlines()):
            said = line["said"]
            self._said.setdefault(said["generation"], []).append(
                Said(line["at"], line["pid"], said["generation"], said["rank"], said)
            )

    async def until_trained(self, steps: int, beyond: int = 0) -> int:
        """Wait until every rank has trained so many steps of this generation; return the last of rank 0.

        With ``beyond`` a step in all, a save is committed by then too, so all ranks have one whole in memory.
        """
        ranks = len(self.pods) * self.processes_per_node

        def trained() -> dict[int, list[int]]:
            found: dict[int, list[int]] = {}
            for one in self.said():
                if one.trained_step:
                    found.setdefault(one.rank, []).append(one.trained_step)
            return found

        def enough() -> bool:
            found = trained()
            return len(found) == ranks and all(len(set(each)) > steps and each[-1] >= beyond for each in found.values())

        await wait_for(lambda: enough() and (not beyond or any(one.of(BeatKind.CHECKPOINT) for one in self.said())))
        return trained()[0][-1]

    def worker(self, rank: int) -> int:
        """Return the pid of a worker of this generation."""
        return next(one.pid for one in self.said() if one.rank == rank and one.of(BeatKind.HEARTBEAT))

    def kill(self, rank: int) -> None:
        os.kill(self.worker(rank), signal.SIGKILL)

    def losses(self) -> dict[int, float]:
        """Return the loss of each step, as the newest generation that trained it has told."""
        found: dict[int, float] = {}
        for generation in range(1, self.generation + 1):
            for one in self.said(generation):
                if progress := one.of(BeatKind.PROGRESS):
                    found[progress["step"]] = progress["loss"]
        return found

    def first(self, what: Callable[[Said], object], generation: int | None = None) -> float:
        """Return when the last of the ranks first said something."""
        firsts: dict[int, float] = {}
        for one in self.said(generation):
            if what(one):
                firsts.setdefault(one.rank, one.at)
        return max(firsts.values())
