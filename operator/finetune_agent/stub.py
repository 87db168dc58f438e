"""PID 1: reaps orphans and keeps an agent process running, so that the agent's death is not the container's.

It holds no state and does nothing that can fail, for its own death is the pod's. When the agent dies, whatever runs
below dies too, but for the fork server, which the next agent takes over, and a new agent starts: at once the first
time, then ever slower. The agent ends for good only with a verdict (see ``VERDICTS``), after the order to finish or
SIGTERM; any other end is a death.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import List, Optional, Tuple

from finetune_agent import processes
from finetune_api.contract import ExitCode

TERMINATED = 128 + signal.SIGTERM
VERDICTS = (ExitCode.OK, ExitCode.SAVED, TERMINATED)
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 10.0
HEALTHY_SECONDS = (
    15.0  # an agent that lived this long has earned an immediate successor: whatever spoils its start is over by then
)
SWEEP_SECONDS = 5.0
FORK_SERVER_SOCKET = "fork-server.sock"  # in the agent's folder


class Stub:
    """The agent's parent."""

    def __init__(self) -> None:
        self._agent = 0
        self._terminating = False
        self._deaths = 0

    def run(self) -> int:
        """Keep an agent running until one returns a verdict."""
        processes.adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        previous_end = ""
        while True:
            started = time.monotonic()
            verdict, previous_end = self._run_agent(previous_end)
            if verdict is None and self._terminating:
                verdict = TERMINATED
            fork_server = processes.listener(folder(sys.argv[0]) / FORK_SERVER_SOCKET) if verdict is None else None
            spare = (fork_server,) if fork_server else ()
            processes.kill_descendants(os.getpid(), spare=spare, patience_seconds=SWEEP_SECONDS)
            if verdict is not None:
                return verdict
            self._deaths = 0 if time.monotonic() - started > HEALTHY_SECONDS else self._deaths + 1
            say("the agent process ended by " + previous_end + "; starting another")
            self._pause()

    def _run_agent(self, previous_end: str) -> Tuple[Optional[int], str]:
        self._agent = spawn(["agent", str(os.getpid()), previous_end])
        if self._terminating:
            processes.send_signal(self._agent, signal.SIGTERM)
        status = self._wait()
        self._agent = 0
        if os.WIFSIGNALED(status):
            return None, "signal " + str(os.WTERMSIG(status))
        code = os.WEXITSTATUS(status)
        return (code if code in VERDICTS else None), "exit code " + str(code)

    def _wait(self) -> int:
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == self._agent:
                return status

    def _pause(self) -> None:
        if self._deaths <= 1:
            return
        deadline = time.monotonic() + min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (self._deaths - 2))
        while time.monotonic() < deadline and not self._terminating:
            processes.reap_orphans(os.getpid())
            time.sleep(0.05)

    def _forward(self, _number: int, _frame: object) -> None:
        self._terminating = True
        if self._agent:
            processes.send_signal(self._agent, signal.SIGTERM)


def spawn(arguments: List[str]) -> int:
    """Fork this file's other program; exec, so that nothing of the stub's state goes along."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        processes.die_with_parent(parent)
        os.execv(sys.executable, [sys.executable, sys.argv[0], *arguments])  # noqa: S606  no shell, on purpose
    finally:
        os._exit(1)


def folder(agent_file: str) -> Path:
    """Return where the agent keeps its files."""
    return Path(agent_file).resolve().parent / "agent"


def say(text: str) -> None:
    """Write a line to the container's log."""
    sys.stderr.write("finetune-agent: " + text + "\n")
    sys.stderr.flush()


def main() -> int:
    """Be PID 1."""
    return Stub().run()
