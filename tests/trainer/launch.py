"""Starts the trainer as an agent does: torchrun, the contract's environment, a socket for beats, files on disk."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api import contract
from finetune_api.protocol import Beat, BeatKind, Progress, from_wire
from tests.storage.seaweedfs import S3Server

ROOT = Path(__file__).parents[2]
LAUNCH_SECONDS = 900


@dataclass
class Listener:
    """What an agent would hear."""

    beats: list[Beat] = field(default_factory=list)

    def of(self, kind: BeatKind) -> list[Any]:
        member = {BeatKind.FAILURE: "failure"}.get(kind, kind.value)
        return [getattr(beat, member) for beat in self.beats if beat.kind == kind]

    @property
    def progress(self) -> list[Progress]:
        return self.of(BeatKind.PROGRESS)

    @property
    def losses(self) -> list[float]:
        return [progress.loss for progress in self.progress]

    @property
    def gradient_norms(self) -> list[float]:
        return [progress.gradient_norm for progress in self.progress]

    @property
    def metrics(self) -> dict[str, float]:
        """Those of the last evaluation."""
        return {metric.name: metric.value for metric in self.of(BeatKind.EVALUATION)[-1].metrics}


@contextmanager
def listening(path: Path) -> Iterator[Listener]:
    """Take all beats that arrive at a socket until the block is left."""
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    receiver.bind(str(path))
    receiver.settimeout(0.2)
    listener, ended = Listener(), threading.Event()

    def take() -> None:
        while True:
            try:
                body = receiver.recv(65536)
            except TimeoutError:
                if ended.is_set():
                    return
                continue
            listener.beats.append(from_wire(Beat, json.loads(body)))

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield listener
    finally:
        ended.set()
        thread.join()
        receiver.close()


@dataclass
class Ended:
    """How a launch ended: torchrun's exit code and both its streams."""

    code: int
    stdout: str
    stderr: str


@dataclass
class Launcher:
    """Runs things under torchrun in a folder of its own, against one S3 server."""

    folder: Path
    server: S3Server
    bucket: str

    def environment(self, *, world_size: int, **more: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FINETUNE_"))}
        return {
            **inherited,
            **self.server.environment,
            "PYTHONPATH": f"{ROOT / 'crds'}:{ROOT / 'trainer'}:{ROOT}",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            contract.EXPECTED_WORLD_SIZE: str(world_size),
            "FINETUNE_SCRATCH_FOLDER": str(self.scratch),
            "FINETUNE_STAGING_FOLDER": str(self.folder / "staging"),
            "FINETUNE_CLAIMS_FOLDER": str(self.folder / "claims"),
            **more,
        }

    @property
    def scratch(self) -> Path:
        path = self.folder / "scratch"
        path.mkdir(exist_ok=True)
        return path

    def write_case(
        self,
        case: Path,
        recipe: dict[str, Any],
        *,
        prefix: str,
        bucket: str | None = None,
        generation: int = 1,
        **checkpoint: int,
    ) -> dict[str, str]:
        """Write recipe.json and job.json; return the environment that names them."""
        case.mkdir(parents=True, exist_ok=True)
        (case / "recipe.json").write_text(json.dumps(recipe))
        job = {
            "namespace": "team-a",
            "name": case.name,
            "uid": "0b2a1f6e-0000-4000-8000-000000000000",
            "jobServer": "https://unused:9443",
            "storage": {"prefix": f"{bucket or self.bucket}/{prefix}", "endpoint": self.server.endpoint},
            "checkpoint": {"keep": 2, **checkpoint},
        }
        (case / "job.json").write_text(json.dumps(job))
        environment = {
            contract.RECIPE_FILE_VARIABLE: str(case / "recipe.json"),
            contract.JOB_FILE_VARIABLE: str(case / "job.json"),
            contract.GENERATION: str(generation),
            contract.PROGRESS_SOCKET: str(case / "beats"),
        }
        (case / "environment.json").write_text(json.dumps(environment))
        return environment

    def start(self, module: str, *arguments: str, ranks: int, environment: dict[str, str]) -> subprocess.Popen[str]:
        """Start torchrun with a port of its own."""
        command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=1", f"--nproc-per-node={ranks}", "--max-restarts=0"),
            *("--master-addr=127.0.0.1", f"--master-port={free_port()}"),
            *("-m", module, *arguments),
        ]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )

    def run(self, module: str, *arguments: str, ranks: int, environment: dict[str, str]) -> Ended:
        process = self.start(module, *arguments, ranks=ranks, environment=environment)
        try:
            stdout, stderr = process.communicate(timeout=LAUNCH_SECONDS)
        finally:
            process.kill()
        return Ended(process.returncode, stdout, stderr)

    def train(self, name: str, recipe: dict[str, Any], *, ranks: int = 1, **job: Any) -> tuple[Ended, Listener]:
        """Run the program itself on one job, to its end."""
        case = self.folder / name
        shutil.rmtree(case, ignore_errors=True)
        job.setdefault("prefix", name)
        environment = self.environment(world_size=ranks) | self.write_case(case, recipe, **job)
        with listening(case / "beats") as listener:
            ended = self.run("finetune_trainer", ranks=ranks, environment=environment)
        return ended, listener


@dataclass
class Case:
    """One job of :func:`train_all`, and afterwards what became of it."""

    recipe: dict[str, Any]
    prefix: str | None = None
    generation: int = 1
    stop_at_look: int = 0
    has_checkpoint: bool = False
    bucket: str | None = None
    before: tuple[tuple[str, ...], ...] = ()
    """What happens to the store first: a method of :class:`tests.trainer.several_jobs.Somebody` and its arguments, each."""
    checkpoint: dict[str, int] = field(default_factory=dict)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    beats: Listener = field(default_factory=Listener)


def train_all(launcher: Launcher, cases: dict[str, Case], *, ranks: int) -> dict[str, Case]:
    """Train all cases in one launch of so many ranks, in the order of their names."""
    folder = launcher.folder / f"ranks-{ranks}"
    with ExitStack() as listeners:
        for name, case in cases.items():
            environment = launcher.write_case(
                folder / name,
                case.recipe,
                prefix=case.prefix or f"{ranks}/{name}",
                bucket=case.bucket,
                generation=case.generation,
                **case.checkpoint,
            )
            environment["TEST_STOP_AT_LOOK"] = str(case.stop_at_look)
            environment["TEST_BEFORE"] = json.dumps(case.before)
            environment[contract.HAS_CHECKPOINT] = str(int(case.has_checkpoint))
            (folder / name / "environment.json").write_text(json.dumps(environment))
            case.beats = listeners.enter_context(listening(folder / name / "beats"))
        environment = launcher.environment(world_size=ranks)
        ended = launcher.run("tests.trainer.several_jobs", str(folder), ranks=ranks, environment=environment)
    assert ended.code == 0, ended.stdout[-4000:] + ended.stderr[-8000:]
    for name, case in cases.items():
        case.outcomes = [json.loads((folder / name / f"outcome-{rank}.json").read_text()) for rank in range(ranks)]
    return cases


def free_port() -> int:
    while True:
        # Not from the generator that hypothesis seeds, or two processes of tests would draw the same. Free on all addresses, as torch wants it.
        port = random.SystemRandom().randint(10000, 11999)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
