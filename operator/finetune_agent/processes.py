"""Ties the life of processes to one another, and ends all of a generation.

Everything that a generation started, however it forked, put itself into sessions of its own (torchrun's workers do, so
``killpg`` of torchrun orphans them) or was orphaned, descends from the stub: orphans fall to PID 1, or to the stub as
subreaper where it is not PID 1. So a generation's processes are the stub's descendants without stub and agent. What
``kubectl exec`` starts has no parent inside the pod and is spared.

The one thing that outlives generations is the fork server (fork_server.py), which whoever ends them spares by its pid.

PR_SET_PDEATHSIG covers the stub's own violent death where it is not PID 1. It fires when the parent *thread* that
forked ends, so whoever dies of it must be forked from a main thread.
"""

import contextlib
import ctypes
import os
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Collection, Dict, List, Optional, Tuple

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PEER = struct.Struct("iII")  # pid, uid and gid of SO_PEERCRED
LISTENER_SECONDS = 1.0
KILL_PAUSE_SECONDS = 0.005
READS = 10


def die_with_parent(parent: Optional[int] = None) -> None:
    """Have the kernel kill this process when its parent dies; ``parent`` is the pid it must still have."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def live_with(ancestor: int, parent: int) -> None:
    """Have this process die with ``ancestor``, to whom orphans fall, and not with its parent. Takes SIGUSR2."""

    def look(_number: int = 0, _frame: object = None) -> None:
        if os.getppid() not in (parent, ancestor):
            os._exit(1)

    signal.signal(signal.SIGUSR2, look)
    _prctl(PR_SET_PDEATHSIG, signal.SIGUSR2)  # comes once more when the next parent dies
    look()


def listener(path: Path) -> Optional[int]:
    """Return the pid of the process that listens on a Unix socket, by the kernel's word."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(LISTENER_SECONDS)
        try:
            connection.connect(str(path))
        except OSError:
            return None
        return peer(connection)


def peer(connection: socket.socket) -> int:
    """Return the pid of the process that listened when a Unix socket was connected."""
    pid: int = PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))[0]
    return pid


def set_name(name: str) -> None:
    """Show this name, of up to 15 characters, in /proc/PID/comm and in ``ps``."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def adopt_orphans() -> None:
    """Make this process the new parent of orphaned descendants, as PID 1 is anyway."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError):  # a libc without prctl: the stub's sweep does it alone
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants(root: int) -> List[int]:
    """Return the pids of all living processes below ``root``, zombies left out."""
    table = _consistent_table()
    children: Dict[int, List[int]] = {}
    for pid, (parent, _) in table.items():
        children.setdefault(parent, []).append(pid)
    found: List[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return [pid for pid in found if table[pid][1]]


def _consistent_table() -> Dict[int, Tuple[int, bool]]:
    """Return each process's parent, and whether it lives.

    Processes are read one by one. One that was read before its parent died, and the parent after, would hang in the
    air and be missed, so the table counts only if every parent is in it.
    """
    for _ in range(READS):
        table = _read_table()
        if all(parent in table or parent == 0 for parent, _ in table.values()):
            break
    return table


def _read_table() -> Dict[int, Tuple[int, bool]]:
    table: Dict[int, Tuple[int, bool]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # ended meanwhile
        table[int(entry.name)] = int(parent), state not in (b"Z", b"X")
    return table


def kill_descendants(root: int, *, spare: Collection[int], patience_seconds: float) -> int:
    """SIGKILL everything below ``root`` until nothing is left; return how many would not go in time.

    Repeated, because a process may fork between the look and the kill; nothing is left when two looks say so.
    """
    deadline = time.monotonic() + patience_seconds
    looks = 0
    while True:
        left = [pid for pid in descendants(root) if pid not in spare]
        for pid in left:
            send_signal(pid, signal.SIGKILL)
        looks = 0 if left else looks + 1
        if looks == 2 or time.monotonic() > deadline:
            return len(left)
        reap_orphans(root)
        if left:
            time.sleep(KILL_PAUSE_SECONDS)


def reap_orphans(root: int) -> None:
    """Collect ended children if we are ``root`` itself (the stub); other processes know their own children."""
    if os.getpid() != root:
        return
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def send_signal(pid: int, number: int) -> None:
    """Signal a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
