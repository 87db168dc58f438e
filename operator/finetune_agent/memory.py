"""What the container's memory cgroup (v2 or v1) tells: its limit, the most that was used of it, and whether the kernel killed for it.

Where the kubelet has the kernel kill a whole container at once, nobody here is left to tell, and the container's status says OOMKilled.
Elsewhere (v1, or ``singleProcessOOMKill``) the kernel picks one process, the container runs on, and only the count of its kills tells
such an end from any other SIGKILL.
"""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Optional

from finetune_api.protocol import Exit, Memory

CGROUP = Path("/sys/fs/cgroup")
V2 = ("memory.max", "memory.peak", "memory.events")
V1 = ("memory/memory.limit_in_bytes", "memory/memory.max_usage_in_bytes", "memory/memory.oom_control")
# What torch says when the kernel took one of a worker's own processes.
CHILD_KILLED = "killed by signal: Killed"


class MemoryKills:
    """Tells ends for want of memory from others, by the kills counted since it was looked at last."""

    def __init__(self, cgroup: Path = CGROUP) -> None:
        self._cgroup = cgroup
        self._known = self._count()

    def begin(self) -> None:
        """Forget what was killed before."""
        self._known = self._count()

    def blamed(self, end: Exit) -> Exit:
        """Return the end of a worker, with limit and peak if it was killed for want of memory."""
        if end.signal != signal.SIGKILL and CHILD_KILLED not in end.message:
            return end
        count, known = self._count(), self._known
        self._known = count
        return replace(end, memory=self._use()) if count > known else end

    def _count(self) -> int:
        text = self._read(V2[2]) or self._read(V1[2])
        counts = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) == 2)
        return whole(counts.get("oom_kill", "")) or 0

    def _use(self) -> Memory:
        names = V2 if self._read(V2[0]) else V1
        return Memory(limit_bytes=whole(self._read(names[0])), peak_bytes=whole(self._read(names[1])))

    def _read(self, name: str) -> str:
        try:
            return (self._cgroup / name).read_text().strip()
        except OSError:
            return ""


def whole(text: str) -> Optional[int]:
    """Return the number in a file; None where there is none, or "max"."""
    return int(text) if text.isdigit() else None
