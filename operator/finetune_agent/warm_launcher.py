"""Starts the recipe's trainer by forking it from a process that has imported everything: 0.3 s instead of 10.

The fork server (fork_server.py) starts with the agent and imports while pods and orders are awaited. It outlives generations, and
the agent too: the next agent takes it over. A generation that is ordered while it imports waits for it, which takes no longer than
imports of its own would. Whatever else may be wrong with it (it refuses, has died, does not answer), workers are started directly,
in the same generation, and it is started again once they had time to do their own imports.
"""

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Collection, Optional

from finetune_agent import processes
from finetune_agent.direct_launcher import DirectLauncher, EndPipes, RunningWorkers, environments
from finetune_agent.launcher import Launch, Running, check
from finetune_agent.stub import FORK_SERVER_SOCKET, say

MODULE = "finetune_trainer.warm"
TAKE_OVER_SECONDS = 1.0  # for a fork server that is idle to greet the next agent
CONNECT_PAUSE_SECONDS = 0.02
IMPORT_SECONDS = 180.0
FORK_SECONDS = 5.0  # the main thread waits that long at most
RESTART_SECONDS = 30.0  # doubled while it does not get ready
LONGEST_RESTART_SECONDS = 600.0
KILL_SECONDS = 2.0


class Lost(Exception):
    """The fork server has ended or does not answer."""


class Refused(Exception):
    """The fork server must not be used."""


class ForkServer:
    """A connection to a fork server.

    Raises:
        Lost: nobody listens.
    """

    def __init__(self, path: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connection.connect(str(path))
        except OSError as error:
            self._connection.close()
            raise Lost(str(error)) from error
        self.pid = processes.peer(self._connection)

    def greet(self, seconds: float) -> None:
        """Return as soon as it has imported everything.

        Raises:
            Lost: it did not get there.
            Refused: its forks could not train.
        """
        refusal = json.loads(self._line(seconds))["refusal"]
        if refusal:
            raise Refused(refusal)

    def fork(self, launch: Launch) -> RunningWorkers:
        """Have it fork a generation's workers.

        Raises:
            Lost: some may run all the same.
        """
        pipes = EndPipes.of(launch)
        try:
            self._connection.settimeout(FORK_SECONDS)
            socket.send_fds(self._connection, [b"\n"], pipes.sinks)
            self._connection.sendall(json.dumps(environments(launch)).encode() + b"\n")
            self._line(FORK_SECONDS)
        except (OSError, Lost) as error:
            pipes.close()
            raise Lost(str(error)) from error
        pipes.close_sinks()
        return RunningWorkers(pipes.sources)

    def wait(self) -> None:
        """Return when it has ended."""
        poll = select.poll()
        poll.register(self._connection, 0)  # a hang-up is told unasked
        poll.poll()

    def _line(self, seconds: float) -> bytes:
        self._connection.settimeout(seconds)
        line = b""
        try:
            while not line.endswith(b"\n"):
                data = self._connection.recv(65536)
                if not data:
                    raise Lost("it has ended")
                line += data
        except socket.timeout as error:
            raise Lost("no answer in " + str(seconds) + " s") from error
        except OSError as error:
            raise Lost(str(error)) from error
        return line


class WarmLauncher:
    """Has at most one fork server: ``_process``, if this agent started it, and ``_server`` once that has imported everything."""

    def __init__(self, agent_file: str, folder: Path, stub_pid: int) -> None:
        self._agent_file = agent_file
        self._path = folder / FORK_SERVER_SOCKET
        self._stub_pid = stub_pid
        self._direct = DirectLauncher(agent_file)
        self._changed: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._process: "Optional[subprocess.Popen[bytes]]" = None
        self._server: Optional[ForkServer] = None

    @property
    def is_ready(self) -> bool:
        """See Launcher."""
        with self._lock:
            return self._server is not None or self._process is None

    @property
    def spared(self) -> Collection[int]:
        """See Launcher."""
        with self._lock:
            return {one.pid for one in (self._process, self._server) if one is not None}

    def prepare(self, changed: Callable[[], None]) -> None:
        """See Launcher. Call before what a former agent left is ended."""
        self._changed = changed
        self._server = self._take_over()
        if self._server is None:
            self._start_server()
        threading.Thread(target=self._keep, name="fork server", daemon=True).start()

    def start(self, launch: Launch) -> Running:
        """See Launcher."""
        check(launch.order)
        server = self._server
        if server is not None:
            try:
                return server.fork(launch)
            except Lost as error:
                say("workers are started without the fork server: " + str(error))
                self._forget()
                processes.kill_descendants(self._stub_pid, spare=(os.getpid(),), patience_seconds=KILL_SECONDS)
        return self._direct.start(launch)

    def _take_over(self) -> Optional[ForkServer]:
        """Return the fork server of a former agent, if it is idle. It then has forked all that it ever was asked for."""
        try:
            server = ForkServer(self._path)
            server.greet(TAKE_OVER_SECONDS)
        except (Lost, Refused):
            return None
        return server

    def _start_server(self) -> None:
        program = [sys.executable, "-u", self._agent_file, "fork-server"]
        arguments = [str(self._path), str(self._stub_pid), MODULE]
        with self._lock:
            try:
                self._process = subprocess.Popen([*program, *arguments], stdin=subprocess.DEVNULL)
            except OSError as error:
                say("the fork server cannot be started: " + str(error))

    def _keep(self) -> None:
        """Be the thread that sees to it that there is a fork server."""
        pause = RESTART_SECONDS
        while True:
            process = self._process
            try:
                server = self._server or self._connect(time.monotonic() + IMPORT_SECONDS)
                pause = RESTART_SECONDS
                server.wait()
                reason = "it has ended"
            except Lost as error:
                reason = str(error)
            except Refused as error:
                say("workers are not forked: " + str(error))
                pause = 0
            self._forget()
            if process is not None:
                process.kill()
                process.wait()
            self._changed()
            if not pause:
                return
            say("the fork server is lost (" + reason + "); another starts in " + str(round(pause)) + " s")
            time.sleep(pause)
            pause = min(LONGEST_RESTART_SECONDS, pause * 2)
            self._start_server()

    def _connect(self, deadline: float) -> ForkServer:
        """Return the fork server that we started, as soon as it has imported everything.

        Raises:
            Lost: it does not get there.
            Refused: it must not be used.
        """
        process = self._process
        if process is None:
            raise Lost("it was not started")
        while processes.listener(self._path) != process.pid:  # it may be one that a former agent left
            if process.poll() is not None or time.monotonic() > deadline:
                raise Lost("it does not start")
            time.sleep(CONNECT_PAUSE_SECONDS)
        server = ForkServer(self._path)
        server.greet(deadline - time.monotonic())
        with self._lock:
            self._server = server
        self._changed()
        return server

    def _forget(self) -> None:
        with self._lock:
            self._process, self._server = None, None
