"""The parent of one worker: prefixes its output with its rank, keeps the last lines, and tells the agent how it ended.

It stands between torchrun and the worker because torchrun keeps too much to itself: it reports the exit codes of those
that it sees failed at one glance and none after SIGTERM, it tees output through files that grow for as long as training
runs, and once one worker ends badly it SIGTERMs its peers, which may be saving. Therefore the worker's end goes to the
agent at once, and a worker that ended badly is not shown to torchrun: this process then waits for the agent to end the
generation. SIGTERM is for the worker alone: torchrun signals whole process groups, and a DataLoader's processes that
die of it break the save.

The agent's own launchers use it too (see workers.py): started anew as a program, or forked with the worker in it.
"""

import contextlib
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Callable, Deque, Dict, List, Mapping, NoReturn, Optional, Tuple

from finetune_agent import processes
from finetune_api import contract

EXITS_SOCKET = "FINETUNE_EXITS_SOCKET"  # ours alone, not handed on to the worker
END_PIPE = "FINETUNE_END_PIPE"  # ours alone: a descriptor whose end tells the agent's launcher that we ended
WELL = b"0"  # comes through that pipe first if all was well
TAIL_LINES = 20
TAIL_CHARACTERS = 4096
LINE_BYTES = 8192  # a longer line is printed in pieces
REFRESH_SECONDS = 1.0  # how often a progress bar (lines that end in a carriage return) goes to the log
DRAIN_SECONDS = 1.0  # for output after the end of a worker, whose children may hold the pipe open
NOT_FOUND = 127
FOR_THE_WORKER = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
ERROR_LINE = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Fault)\b")
TORCH_PREFIX = re.compile(
    r"^\[rank\d+\]: "
)  # which init_process_group's excepthook puts before each line of a traceback


class Printer:
    """Writes a worker's output to the container's log, line by line under its rank, and keeps the newest lines."""

    def __init__(self, rank: str, descriptor: int = 1) -> None:
        self._prefix = ("[rank " + rank + "] ").encode()
        self._descriptor = descriptor
        self._rest = b""
        self._refreshed = float("-inf")
        self._tail: Deque[str] = deque(maxlen=TAIL_LINES)

    def feed(self, data: bytes) -> None:
        """Take output as it comes."""
        self._rest += data.replace(b"\r\n", b"\n")
        *pieces, self._rest = re.split(b"(?<=[\r\n])", self._rest)
        for piece in pieces:
            self._take(piece)
        while len(self._rest) > LINE_BYTES:
            self._print(self._rest[:LINE_BYTES])
            self._rest = self._rest[LINE_BYTES:]

    def finish(self) -> None:
        """Print what did not end in a newline."""
        if self._rest:
            self._print(self._rest)
        self._rest = b""

    def tail(self) -> str:
        """Return the newest lines."""
        return "\n".join(self._tail)[-TAIL_CHARACTERS:]

    def _take(self, piece: bytes) -> None:
        line = piece[:-1]
        if piece.endswith(b"\n"):
            self._print(line)
        elif line and time.monotonic() - self._refreshed >= REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            self._write(line)

    def _print(self, line: bytes) -> None:
        self._tail.append(readable(line.decode("utf-8", "replace"))[:TAIL_CHARACTERS])
        self._write(line)

    def _write(self, line: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody reads the log; the worker goes on
            os.write(self._descriptor, self._prefix + line + b"\n")


def readable(text: str) -> str:
    """Return ``text`` without control characters (colours, cursor moves, NULs)."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return "".join(character for character in text if character.isprintable() or character == "\t")


def error_message(error_file: Optional[str], tail: str) -> str:
    """Return the error in a line: from torch's error file, else the last line that looks like one, else the last."""
    lines = [TORCH_PREFIX.sub("", line) for line in tail.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    message = read_error_file(error_file) or (errors or lines or [""])[-1]
    return message[: contract.MESSAGE_LIMIT]  # a longer record fits no datagram, and the end would never be told


def read_error_file(path: Optional[str]) -> str:
    """Return the message that ``torch.distributed.elastic``'s ``@record`` wrote, or nothing."""
    try:
        message: Any = json.loads(Path(path or "").read_text(encoding="utf-8"))["message"]
        return str(message["message"] if isinstance(message, dict) else message)
    except (OSError, ValueError, KeyError, TypeError):
        return ""


class Telling:
    """The way to the agent."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._path = environment.get(EXITS_SOCKET, "")
        self._who = {
            "generation": int(environment.get(contract.GENERATION, "0")),
            "rank": int(environment.get("RANK", "0")),
        }

    def tell(self, **facts: Any) -> None:
        """Send one record; waits while the agent is busy, gives up when there is none."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            try:
                sender.sendto(json.dumps({**self._who, **facts}).encode(), self._path)
            except OSError as error:
                sys.stderr.write("finetune-agent: the agent cannot be told how a worker is: " + str(error) + "\n")


def main(command: List[str]) -> int:
    """Run ``command`` as the worker of this rank; returns only if it succeeded."""
    processes.die_with_parent()
    end_pipe = int(os.environ.pop(END_PIPE, "-1"))
    return supervise(lambda environment: execute(command, environment), dict(os.environ), end_pipe)


def supervise(become: Callable[[Dict[str, str]], NoReturn], environment: Mapping[str, str], end_pipe: int = -1) -> int:
    """Fork a process that becomes the worker with its environment, and see it through; returns only if it succeeded."""
    for number in FOR_THE_WORKER:
        signal.signal(number, ignore)
    telling = Telling(environment)
    printer = Printer(environment.get("RANK", "?"))
    own = {name: value for name, value in environment.items() if name != EXITS_SOCKET}
    pid, output = spawn(lambda: become(own), end_pipe)
    telling.tell(pid=pid)
    status = pump(pid, output, printer)
    tail = printer.tail()
    telling.tell(
        exitCode=status if status >= 0 else None,
        signal=-status if status < 0 else None,
        message=error_message(environment.get("TORCHELASTIC_ERROR_FILE"), tail) if status else "",
        logTail=tail if status else "",
    )
    while status:
        signal.pause()
    if end_pipe >= 0:
        os.write(end_pipe, WELL)
    return 0


def ignore(number: int, frame: object) -> None:
    """Take a signal that is not for us. A handler, since SIG_IGN would be inherited by the worker."""


def spawn(become: Callable[[], NoReturn], end_pipe: int) -> Tuple[int, int]:
    """Fork the worker; return its pid and where its output comes. Call while there is one thread."""
    parent = os.getpid()
    output, sink = os.pipe()
    pid = os.fork()
    if pid:
        os.close(sink)
        return pid, output
    try:
        processes.die_with_parent(parent)
        for number in FOR_THE_WORKER:
            signal.signal(number, signal.SIG_DFL)
        for descriptor in (1, 2):
            os.dup2(sink, descriptor)
        for descriptor in (output, sink, end_pipe):
            if descriptor >= 0:
                os.close(descriptor)
        become()
    finally:
        os._exit(NOT_FOUND)


def execute(command: List[str], environment: Dict[str, str]) -> NoReturn:
    """Become ``command``."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and others need
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, environment)  # noqa: S606  no shell, on purpose
    except OSError as error:
        os.write(2, (command[0] + " cannot be run: " + str(error.strerror) + "\n").encode())
        os._exit(NOT_FOUND)


def pump(pid: int, output: int, printer: Printer) -> int:
    """Print a worker's output to its end; return its exit code, or minus its signal."""
    ended = threading.Event()
    copier = threading.Thread(target=copy_output, args=(output, printer, ended), daemon=True)
    copier.start()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    ended.set()
    copier.join(DRAIN_SECONDS)
    return status


def copy_output(source: int, printer: Printer, ended: threading.Event) -> None:
    """Feed ``printer`` until the pipe ends, or until it is silent after the worker ended."""
    while True:
        ready, _, _ = select.select([source], [], [], 0.1)
        if ready:
            data = os.read(source, 65536)
            if not data:
                break
            printer.feed(data)
        elif ended.is_set():
            break
    printer.finish()
