"""A training pod without a kubelet: a folder, and a container's PID 1 that is not PID 1 but a subreaper."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from finetune_agent import processes
from finetune_api import contract
from finetune_api.protocol import Action, CheckpointWish, JobCheckpoint, JobFile, JobStorage, Order, Report, to_wire
from tests.agent.job_server import DEADLINE_SECONDS, JobServer

HERE = Path(__file__).parent


class Pod:
    """One container that runs agent.pyz."""

    def __init__(self, uid: str, folder: Path, agent_file: Path, server: JobServer) -> None:
        self.uid = uid
        self.folder = folder
        self.server = server
        self.generations = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.config = folder / "config"
        self.config.mkdir()
        shutil.copy(agent_file, folder / "agent.pyz")
        shutil.copy(server.ca_file, self.config / "ca.crt")
        self.token_file.write_text("first-token")

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    @property
    def report(self) -> Report | None:
        return self.server.latest(self.uid)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def script(self, rank: int | str, *lines: str) -> None:
        (self.folder / f"rank{rank}").write_text("\n".join(lines))

    def start(
        self,
        command: list[str],
        *,
        python: str = sys.executable,
        fake_torch: bool = True,
        recipe: dict | None = None,
        storage: JobStorage | None = None,
        checkpoint: JobCheckpoint | None = None,
        job_file: dict | None = None,
        **environment: str,
    ) -> None:
        job = JobFile("team-a", "job", "job-uid", self.server.url, command, storage, checkpoint or JobCheckpoint())
        (self.config / "job.json").write_text(json.dumps(to_wire(job) | (job_file or {})))
        (self.config / "recipe.json").write_text(json.dumps(recipe or {}))
        variables = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            contract.POD_NAME: self.uid,
            contract.POD_UID: self.uid,
            contract.POD_ADDRESS: "127.0.0.1",
            contract.JOB_FILE_VARIABLE: str(self.config / "job.json"),
            contract.TOKEN_FILE_VARIABLE: str(self.token_file),
            contract.TERMINATION_LOG_VARIABLE: str(self.folder / "termination-log"),
            **({"PYTHONPATH": str(HERE / "fake_torch")} if fake_torch else {}),
            **environment,
        }
        with (self.folder / "log").open("ab") as log:
            arguments = [python, str(self.folder / "agent.pyz")]
            self.process = subprocess.Popen(arguments, env=variables, stdout=log, stderr=log, cwd=self.folder)

    async def agent_pid(self) -> int:
        """Return the pid of the agent process, the stub's child."""
        assert self.process is not None
        return await wait_for(lambda: next((p for p in processes.descendants(self.process.pid) if is_agent(p)), None))

    def descendants(self) -> list[int]:
        assert self.process is not None
        return processes.descendants(self.process.pid)

    async def pid_of(self, rank: int, generation: int) -> int:
        """Return the pid of a worker, once it is ready."""
        file = self.folder / f"pid-{generation}-{rank}"
        return int(await wait_for(lambda: file.exists() and file.read_text()))

    async def wait(self) -> int:
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, DEADLINE_SECONDS)

    def termination_message(self) -> dict:
        return json.loads((self.folder / "termination-log").read_text())

    async def run(
        self,
        generation: int,
        *,
        rank: int = 0,
        nodes: int = 1,
        workers: int = 1,
        master: "Pod | None" = None,
        hang_seconds: int = 60,
        has_checkpoint: bool = False,
        checkpoint: CheckpointWish | None = None,
    ) -> None:
        """Order a generation, as the operator would."""
        host = (master or self).report
        assert host is not None
        order = Order(
            *(Action.RUN, generation, rank, nodes, workers, host.address, host.port),
            hang_seconds=hang_seconds,
            has_checkpoint=has_checkpoint,
            checkpoint=checkpoint,
        )
        await self.server.order(self.uid, order)

    def remove(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)  # so that it starts no other agent
            processes.kill_descendants(self.process.pid, spare=(), patience_seconds=5)
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def is_agent(pid: int) -> bool:
    return b"agent.pyz\0agent\0" in command_line(pid)


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def wait_for(condition, seconds: float = DEADLINE_SECONDS):
    """Return the first true value of ``condition``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.01)
    return value
