"""Who has the cluster: there is one set of addresses, so there can be one cluster at a time on a machine.

A file says which cluster there is and who answers for it: a process (a pytest session, whose end is the cluster's end) or nobody
(`up` from the command line, which leaves it running until `down`). A cluster whose process has died, or none of whose own
processes is left, is a remainder of a crash, and whoever comes next clears it away.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster.places import RUN
from tests.cluster.process import Process, this_process

_FILE = RUN / "owner.json"


@dataclass(frozen=True, slots=True)
class Owner:
    name: str
    command: str
    since: str
    pid: int
    start_time: int
    stays: bool
    """Whether the cluster is meant to outlive the process that started it."""
    complete: bool
    """Whether it came up; one that did not is nobody's once its process has gone."""
    had_namespace_mount: bool

    @property
    def process(self) -> Process:
        return Process(self.pid, self.start_time)

    @property
    def holds(self) -> bool:
        return self.process.alive or (self.stays and self.complete)

    @property
    def directory(self) -> Path:
        return RUN / self.name

    def __str__(self) -> str:
        who = (
            f"process {self.pid} (`{self.command}`)"
            if self.process.alive
            else f"`{self.command}`, which left it running"
        )
        return f"cluster {self.name!r}, started {self.since} by {who}"


def current() -> Owner | None:
    try:
        return Owner(**json.loads(_FILE.read_text()))
    except FileNotFoundError:
        return None


def claim(name: str, *, stays: bool, complete: bool, had_namespace_mount: bool) -> Owner:
    process = this_process()
    owner = Owner(
        name=name, command=" ".join(sys.argv), since=time.strftime("%F %T"), pid=process.pid, start_time=process.start_time,
        stays=stays, complete=complete, had_namespace_mount=had_namespace_mount,
    )  # fmt: skip
    RUN.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = _FILE.with_suffix(".part")
    scratch.write_text(json.dumps(asdict(owner)))
    scratch.replace(_FILE)
    return owner


def release() -> None:
    _FILE.unlink(missing_ok=True)
