"""Starts a generation's workers. ``Launcher`` is the seam; ``TorchrunLauncher`` runs any script under the image's torchrun.

Membership is static and torchrun restarts nothing: the operator decides both. Options are spelled with underscores,
which every torch since 1.10 understands. Nothing here ends processes: see processes.py.

The recipe's trainer needs no torchrun: see direct_launcher.py and warm_launcher.py.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Collection, Dict, List, Optional, Protocol

from finetune_agent import ports
from finetune_api.contract import ExitCode
from finetune_api.protocol import Exit, Order


class CannotStart(Exception):
    """A generation that could not be started, and the exit that tells so."""

    def __init__(self, message: str, exit_code: Optional[int] = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Launch:
    """One generation to start. ``command`` is each worker's, empty for the recipe's trainer; ``folder`` is for its files."""

    order: Order
    command: List[str]
    environment: Dict[str, str]
    folder: Path
    local_address: str


@dataclass(frozen=True)
class LauncherEnd:
    """How a launcher ended. ``failures`` are exits of workers of which only the launcher may know."""

    exit_code: Optional[int] = None
    signal: Optional[int] = None
    message: str = ""
    failures: List[Exit] = field(default_factory=list)


class Running(Protocol):
    """A launcher at work."""

    def wait(self) -> LauncherEnd:
        """Return when the launcher has ended."""


class Launcher(Protocol):
    """A way to start workers under torchrun's contract (environment, error file)."""

    def prepare(self, changed: Callable[[], None]) -> None:
        """Begin with what takes long, beside all else. Any thread calls ``changed`` when ``is_ready`` may have changed."""

    @property
    def is_ready(self) -> bool:
        """Tell whether to start now; if not, it is quicker to wait."""

    @property
    def spared(self) -> Collection[int]:
        """The pids of processes that are no generation's and outlive them all."""

    def start(self, launch: Launch) -> Running:
        """Start all local workers; call from the main thread (see processes).

        Raises:
            CannotStart: nothing runs.
        """


class ColdLauncher:
    """What launchers have in common that prepare nothing: every start is one of fresh processes of ``agent_file``."""

    is_ready = True
    spared = ()

    def __init__(self, agent_file: str) -> None:
        self._agent_file = agent_file

    def prepare(self, changed: Callable[[], None]) -> None:
        """See Launcher."""


class TorchrunLauncher(ColdLauncher):
    """``torch.distributed.run`` with static membership, under our wrapper, with a parent of ours for each worker."""

    def start(self, launch: Launch) -> Running:
        """See Launcher."""
        check(launch.order)
        record_file = launch.folder / "launcher.json"
        process = subprocess.Popen(
            [sys.executable, self._agent_file, "torchrun", str(record_file), *self._arguments(launch)],
            env=launch.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        return RunningTorchrun(process, record_file, launch.order.generation)

    def _arguments(self, launch: Launch) -> List[str]:
        order = launch.order
        options = {
            "nnodes": order.nodes,
            "node_rank": order.rank,
            "nproc_per_node": order.processes_per_node,
            "master_addr": bracketed(order.master_address),
            "master_port": order.master_port,
            "local_addr": launch.local_address,
            "rdzv_id": "g" + str(order.generation),
            "max_restarts": 0,
            "log_dir": launch.folder,  # for error files only: output does not go to files
        }
        worker = [sys.executable, "-I", "-S", self._agent_file, "worker"]
        arguments = ["--" + name + "=" + str(value) for name, value in options.items()]
        return [*arguments, "--no_python", *worker, *launch.command]


class RunningTorchrun:
    """A torchrun at work."""

    def __init__(self, process: "subprocess.Popen[bytes]", record_file: Path, generation: int) -> None:
        self._process = process
        self._record_file = record_file
        self._generation = generation

    def wait(self) -> LauncherEnd:
        """See Running."""
        status = self._process.wait()
        record = self._read_record()
        return LauncherEnd(
            exit_code=status if status >= 0 else None,
            signal=-status if status < 0 else None,
            message=str(record.get("message", "")),
            failures=[
                Exit(self._generation, failure["rank"], failure["exitCode"], failure["signal"], failure["message"])
                for failure in record.get("failures", [])
            ],
        )

    def _read_record(self) -> Dict[str, Any]:
        try:
            record: Dict[str, Any] = json.loads(self._record_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # it did not come to that
        return record


def check(order: Order) -> None:
    """Refuse what torchrun would only stumble over.

    Raises:
        CannotStart: the order makes no sense, or its port is taken.
    """
    sensible = 0 <= order.rank < order.nodes and order.processes_per_node >= 1 and order.master_address
    if not sensible or not 0 < order.master_port < 65536:
        raise CannotStart("the order to run makes no sense: " + repr(order))
    if order.rank == 0 and not ports.is_free(order.master_port):
        message = "port " + str(order.master_port) + " of " + order.master_address + " is in use on rank 0's node"
        raise CannotStart(message, ExitCode.PORT_IN_USE)


def bracketed(address: str) -> str:
    """Return an address as it stands before a port."""
    return "[" + address + "]" if ":" in address and not address.startswith("[") else address
