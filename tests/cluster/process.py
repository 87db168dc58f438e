"""Starting processes so that each of them, and all their offspring, can be found and ended again.

Every process starts in a control group of ours, and a child cannot leave it by accident: daemons that fork, containerd's
shims (which survive containerd on purpose) and containers (whose groups the kubelet makes below ours) are all in the tree.
So the end of a cluster needs no list of pids and no names: whatever is in the tree is ours. Single processes are ended by
pid only together with their start time, since a pid may have passed on to a stranger.

Works on control groups v1 (one tree per controller) and, untested, on v2.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.console import ClusterError

CGROUPS = Path("/sys/fs/cgroup")
_children: dict[int, subprocess.Popen[bytes]] = {}


def run(
    argv: Sequence[str | Path],
    *,
    input: str | None = None,  # as subprocess names it
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
) -> str:
    """Run to the end and return stdout; a failure shows the command and the end of what it said."""
    try:
        done = subprocess.run(
            [str(word) for word in argv], input=input, text=True, capture_output=True, cwd=cwd,
            env={**os.environ, **(env or {})}, check=False,
            stdin=subprocess.DEVNULL if input is None else None,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ClusterError(f"{argv[0]} is missing on this machine") from error
    if check and done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
        raise ClusterError(f"`{' '.join(str(word) for word in argv)}` ended with {done.returncode}:\n{said}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """A group of the same name in every hierarchy there is, relative to the hierarchy's root."""

    name: str

    def directories(self) -> list[Path]:
        return [root / self.name for root in hierarchies()]

    def create(self) -> None:
        for directory in self.directories():
            directory.mkdir(parents=True, exist_ok=True)
            if not is_unified():
                _fill_cpuset(directory)
        if is_unified():
            _delegate_controllers(CGROUPS / self.name)

    def join_files(self) -> list[Path]:
        """The files that take a process's id; one hierarchy is enough to find it again, `pids` counts forks for nothing."""
        roots = hierarchies()
        root = next((root for root in roots if root.name == "pids"), roots[0])
        return [root / self.name / "cgroup.procs"]

    def members(self) -> set[int]:
        found: set[int] = set()
        for directory in self.directories():
            for file in directory.rglob("cgroup.procs"):
                with suppress(OSError):
                    found.update(int(pid) for pid in file.read_text().split())
        return found - {0, os.getpid()}

    def kill(self, *, deadline_seconds: float = 20) -> None:
        """SIGKILL until nobody is left: what forks between two looks is caught by the next one."""
        until = time.monotonic() + deadline_seconds
        while members := self.members():
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                    os.kill(pid, signal.SIGKILL)
            reap()
            if time.monotonic() > until:
                raise ClusterError(f"processes {sorted(members)} in control group {self.name} do not end")
            time.sleep(0.02)

    def remove(self) -> None:
        for directory in self.directories():
            for path in sorted(directory.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
                _remove_directory(path)
            if directory.exists():
                _remove_directory(directory)


def _remove_directory(path: Path) -> None:
    """A group can stay busy for a moment after its last process has gone."""
    for _ in range(200):
        with suppress(FileNotFoundError):
            try:
                path.rmdir()
            except OSError:
                time.sleep(0.02)
                continue
        return


def is_unified() -> bool:
    return (CGROUPS / "cgroup.controllers").exists()


def hierarchies() -> list[Path]:
    if is_unified():
        return [CGROUPS]
    mounted = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return sorted(Path(fields[1]) for fields in mounted if fields[2] == "cgroup" or _is_beside_v1(fields))


def _is_beside_v1(fields: list[str]) -> bool:
    """Hybrid machines mount v2, without controllers, beside the v1 trees; runc makes groups there too."""
    return fields[2] == "cgroup2" and Path(fields[1]).is_relative_to(CGROUPS)


def _fill_cpuset(directory: Path) -> None:
    """A new v1 cpuset is empty and takes no process until somebody has filled it, from the top down."""
    for path in (*reversed(directory.parents), directory):
        for name in ("cpuset.cpus", "cpuset.mems"):
            file = path / name
            if file.exists() and not file.read_text().strip():
                file.write_text((path.parent / name).read_text())


def _delegate_controllers(directory: Path) -> None:
    for path in (*reversed(directory.parents), directory):
        if path.is_relative_to(CGROUPS):
            available = (path / "cgroup.controllers").read_text().split()
            for controller in available:
                with suppress(OSError):
                    (path / "cgroup.subtree_control").write_text(f"+{controller}")


@dataclass(frozen=True, slots=True)
class Process:
    """A process we started. The start time (clock ticks since boot) tells it from a later one with the same pid."""

    pid: int
    start_time: int

    @property
    def alive(self) -> bool:
        reap()
        state = _stat(self.pid)
        return state is not None and state == (self.start_time, True)

    def signal(self, number: signal.Signals) -> None:
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end(self, *, grace_seconds: float = 0) -> None:
        """SIGTERM with a grace period if one is given, then SIGKILL; returns when the process is gone."""
        if grace_seconds:
            self.signal(signal.SIGTERM)
            self._wait(grace_seconds)
        self.signal(signal.SIGKILL)
        if not self._wait(20):
            raise ClusterError(f"process {self.pid} does not end")

    def _wait(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.alive:
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True


def _stat(pid: int) -> tuple[int, bool] | None:
    """Start time of a process, and whether it runs (a zombie does not)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19]), fields[0] not in "ZX"


def this_process() -> Process:
    return existing(os.getpid())


def existing(pid: int) -> Process:
    state = _stat(pid)
    if state is None:
        raise ClusterError(f"process {pid} has ended already")
    return Process(pid, state[0])


def reap() -> None:
    """Take the exit status of our dead children, who otherwise stay in the process list as zombies."""
    for pid, child in list(_children.items()):
        if child.poll() is not None:
            _children.pop(pid, None)


@dataclass(slots=True)
class Supervisor:
    """Starts the long-running parts of a cluster and remembers them by name, on disk, for the next program that attaches."""

    directory: Path
    group: ControlGroup
    logs: Path = field(init=False)
    records: Path = field(init=False)

    def __post_init__(self) -> None:
        self.logs, self.records = self.directory / "logs", self.directory / "processes"

    def start(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        namespace: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Start in our control group, in a session of its own (a Ctrl-C at the terminal is not for it), and log to a file.

        `nsenter` and not `ip netns exec`: the latter makes a mount namespace too, and a kubelet's mounts would then be
        invisible to containerd.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        self.records.mkdir(parents=True, exist_ok=True)
        enter = ["nsenter", f"--net=/run/netns/{namespace}", "--"] if namespace else []
        join = "".join(f'echo $$ > "{file}" && ' for file in self.group.join_files())
        command = ["sh", "-c", f'{join}exec "$@"', "sh", *enter, *(str(word) for word in argv)]
        with (self.logs / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **(env or {})}, cwd="/",
            )  # fmt: skip
        _children[child.pid] = child
        process = existing(child.pid)
        (self.records / name).write_text(f"{process.pid} {process.start_time}\n")
        return process

    def find(self, name: str) -> Process:
        try:
            pid, start_time = (self.records / name).read_text().split()
        except FileNotFoundError:
            raise ClusterError(f"{name} was never started; there are: {', '.join(self.names())}") from None
        return Process(int(pid), int(start_time))

    def names(self) -> list[str]:
        return sorted(file.name for file in self.records.iterdir()) if self.records.exists() else []

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def last_words(self, name: str, lines: int = 15) -> str:
        log = self.log(name)
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"


def wait_for(
    what: str, ready: Iterator[bool], seconds: float, explain: Supervisor | None = None, name: str = ""
) -> None:
    """Wait until an iterator of looks says yes. A process that died meanwhile is told with its last words, at once."""
    until = time.monotonic() + seconds
    for is_ready in ready:
        if is_ready:
            return
        died = explain is not None and name and not explain.find(name).alive
        if died or time.monotonic() > until:
            reason = "it ended" if died else f"not after {seconds:.0f} s"
            said = f"; its last words:\n{explain.last_words(name)}" if explain is not None and name else ""
            raise ClusterError(f"{what}: {reason}{said}")
        time.sleep(0.05)
