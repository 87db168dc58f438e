"""The processes of training pods, found on this machine by their control groups: neither the API server nor a kubelet is asked."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_POD = re.compile(r"/pod([0-9a-f-]{36})/")
AGENT, WORKER = "agent", "worker "
"""How their names in /proc/PID/comm begin; the name of a worker ends in its rank."""


def of_pods(name: str) -> dict[str, list[int]]:
    """Return the pids of the processes whose name begins so: uid of the pod → pids."""
    found: dict[str, list[int]] = {}
    for pid, pod in _look(name):
        found.setdefault(pod, []).append(pid)
    return found


def kill(name: str, pod: str, which: int = 0) -> bool:
    """SIGKILL one of a pod's processes of that name; tell whether there was one."""
    pids = sorted(of_pods(name).get(pod, []))
    if not pids:
        return False
    with suppress(ProcessLookupError):
        os.kill(pids[which % len(pids)], signal.SIGKILL)
    return True


def _look(name: str) -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            if not (entry / "comm").read_text().startswith(name):
                continue
            pod = _POD.search((entry / "cgroup").read_text())
            if pod:
                yield int(entry.name), pod[1]
