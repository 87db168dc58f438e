"""Asks workers for the stacks of all their threads, prints them into the log, and reads from them what a worker is doing.

A worker that takes part has registered ``faulthandler`` for SIGUSR1 with a file of its own, RANK-PID in the folder of the contract's
STACKS_FOLDER; SIGUSR1 would end any other, and a worker that has taken its registration back, as Python does on its way out: so the kernel
is asked first whether the signal is caught. ``faulthandler`` answers from the signal handler itself, without the interpreter, so a
worker answers even while its main thread waits inside a collective or a driver. One that does not answer does not run.
"""

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple

from finetune_agent import processes
from finetune_agent.hang import Finding
from finetune_api.protocol import Doing

ANSWER_SECONDS = 3.0  # for all workers together; a dump takes milliseconds
QUIET_SECONDS = 0.2  # a file that does not grow for so long is complete
POLL_SECONDS = 0.05
STACKS_LIMIT = 65536  # characters of one worker that go to the log
PLACE_LIMIT = 200
FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)$', re.MULTILINE)
# Where a main thread stands that waits for its peers. Only calls that have nothing of a program's own below them: a model under FSDP,
# for one, runs inside of torch/distributed altogether.
COLLECTIVE = re.compile(r"torch/distributed/(distributed_c10d|_functional_collectives)\.py$|deepspeed/comm/[a-z]+\.py$")
# Where our trainer waits for the device, on which collectives are then under way.
DEVICE = re.compile(r"finetune_trainer/ranks\.py$")


def examine(folder: Path, pids: Mapping[int, int]) -> Dict[int, Finding]:
    """Print the stacks of these workers (rank → pid of the command), and return what each is doing."""
    offers = find_offers(folder)
    answers = ask({rank: offers[rank] for rank in pids if rank in offers and catches(offers[rank][0], signal.SIGUSR1)})
    for rank, text in answers.items():
        show(rank, text)
    return {rank: find(answers.get(rank), pid) for rank, pid in pids.items()}


def find_offers(folder: Path) -> Dict[int, Tuple[int, Path]]:
    """Return pid and file of each worker that takes part, by rank."""
    offers = {}
    for file in folder.glob("*-*"):
        rank, _, pid = file.name.partition("-")
        if rank.isdigit() and pid.isdigit():
            offers[int(rank)] = int(pid), file
    return offers


def ask(offers: Mapping[int, Tuple[int, Path]]) -> Dict[int, str]:
    """Signal the workers and return what they write, by rank; nothing of those that do not answer in time."""
    before = {rank: size(file) for rank, (_, file) in offers.items()}
    for pid, _ in offers.values():
        processes.send_signal(pid, signal.SIGUSR1)
    deadline = time.monotonic() + ANSWER_SECONDS
    sizes, changed = dict(before), time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        now = {rank: size(file) for rank, (_, file) in offers.items()}
        if now != sizes:
            sizes, changed = now, time.monotonic()
        elif all(now[rank] > before[rank] for rank in offers) and time.monotonic() - changed >= QUIET_SECONDS:
            break
    return {rank: read(file, before[rank]) for rank, (_, file) in offers.items()}


def size(file: Path) -> int:
    """Return how long a file is, 0 if it is gone."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def read(file: Path, start: int) -> str:
    """Return what a file holds from ``start`` on."""
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(STACKS_LIMIT).decode("utf-8", "replace")
    except OSError:
        return ""


def show(rank: int, text: str) -> None:
    """Print the stacks under the worker's rank, as its own output is."""
    lines = text.splitlines() or ["does not answer SIGUSR1: its process does not run"]
    for line in ["stacks of all threads, because of its silence:", *lines]:
        with contextlib.suppress(OSError):  # nobody reads the log
            os.write(1, ("[rank " + str(rank) + "] " + line + "\n").encode("utf-8", "replace"))


def find(answer: Optional[str], pid: int) -> Finding:
    """Return what a worker is doing, from its stacks; None when it does not take part."""
    if answer:
        return read_stacks(answer)
    if answer is not None or is_stopped(pid):
        return Finding(Doing.STOPPED)
    return Finding(Doing.UNKNOWN)


def read_stacks(text: str) -> Finding:
    """Return what the main thread is doing. It is the one that took the signal, else it is the last."""
    threads = text.split("\n\n")
    current = next((thread for thread in threads if thread.startswith("Current thread")), threads[-1])
    frames: List["re.Match[str]"] = list(FRAME.finditer(current))
    if not frames:
        return Finding(Doing.UNKNOWN)
    waits = DEVICE.search(frames[0]["file"]) or any(COLLECTIVE.search(frame["file"]) for frame in frames)
    return Finding(Doing.WAITING if waits else Doing.WORKING, place(frames[0]))


def place(frame: "re.Match[str]") -> str:
    """Return where a frame is, as people write it."""
    file = "/".join(frame["file"].split("/")[-2:])
    return (file + ":" + frame["line"] + " in " + frame["name"])[:PLACE_LIMIT]


def catches(pid: int, number: int) -> bool:
    """Tell whether a process has a handler for a signal."""
    try:
        status = Path("/proc/" + str(pid) + "/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def is_stopped(pid: int) -> bool:
    """Tell whether the kernel has stopped a process, by a signal or a debugger."""
    try:
        return Path("/proc/" + str(pid) + "/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False
