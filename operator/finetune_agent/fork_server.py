"""The fork server: has imported the training stack once, and forks the workers of each generation.

One process, one thread, started by the agent as soon as it runs and spared when generations end. It imports the module
that it is told by name (``finetune_trainer.warm`` of the image), and asks it whether forks of this process can train; it
serves only if they can, and tells why not otherwise. Python's objects are then frozen out of the garbage collector, which would
write to, and so copy, every page of them in each child.

It serves one connection at a time, to its end. So when another agent has been greeted, whatever the one before it had asked for
has been forked, and can be seen and ended. A request is one byte that carries the end pipes, and a line of JSON, the
environments of the workers; it is answered by an empty line once they are forked.

For each worker it forks the worker's parent (worker.py), which forks the worker. Both descend from the stub and live on without the
fork server; the worker dies with its parent.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, NoReturn

from finetune_agent import processes, worker

MOST_WORKERS = 253  # descriptors that Linux passes in one message
UNSAFE = 3  # the exit code of a canary


def main(arguments: List[str]) -> NoReturn:
    """Be the fork server for a socket, the stub's pid and the name of a module."""
    path, stub_pid, module = arguments[0], int(arguments[1]), arguments[2]
    processes.live_with(stub_pid, os.getppid())
    processes.set_name("fork-server")
    listener = listen(Path(path))
    leave_archive()
    server = Server(listener, stub_pid, module)
    server.run(load(module))


def listen(path: Path) -> socket.socket:
    """Return a socket for our user alone, in place of one that another left."""
    if path.exists():
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen()
    return listener


def leave_archive() -> None:
    """Have imports find what ``python -m`` would: agent.pyz holds a part of finetune_api only, and hides the image's."""
    sys.path[0] = str(Path.cwd())
    for name in list(sys.modules):
        if name.partition(".")[0] == "finetune_api":
            del sys.modules[name]


def load(name: str) -> str:
    """Import the training stack; return why its process must not be forked, or nothing."""
    try:
        module: Any = importlib.import_module(name)
        module.load()
        gc.collect()
        gc.freeze()
        return module.refusal() or refusal_of_threads() or refusal_of_child(module.refusal)
    except Exception as error:  # noqa: BLE001  whatever it is, workers can still be started without us
        traceback.print_exc()
        return "the import failed: " + type(error).__name__ + ": " + str(error)


def refusal_of_threads() -> str:
    """Refuse when there is another thread: a lock that it holds would stay locked in a child for ever."""
    tasks = list(Path("/proc/self/task").iterdir())
    if len(tasks) == 1:
        return ""
    names = sorted((task / "comm").read_text().strip() for task in tasks if task.name != str(os.getpid()))
    return "the import started threads (" + ", ".join(names) + ")"


def refusal_of_child(ask: Callable[[], str]) -> str:
    """Refuse when a child would: some of what cannot be shared (a CUDA context) shows only there."""
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(sink, ask().encode())
            os._exit(0)
        finally:
            os._exit(UNSAFE)
    os.close(sink)
    with os.fdopen(source, "rb") as answer:
        refusal = answer.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return refusal or ("a forked child ended with " + str(code) if code else "")


class Server:
    """Greets agents, one after the other, and forks for them."""

    def __init__(self, listener: socket.socket, stub_pid: int, module: str) -> None:
        self._listener = listener
        self._stub_pid = stub_pid
        self._module = module

    def run(self, refusal: str) -> NoReturn:
        """Serve for ever; who has to refuse is killed by who asked."""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
        greeting = json.dumps({"refusal": refusal}).encode() + b"\n"
        while True:
            connection, _ = self._listener.accept()
            with connection, contextlib.suppress(OSError, ValueError):  # the agent has gone, perhaps in mid-sentence
                connection.sendall(greeting)
                if not refusal:
                    self._attend(connection)

    def _attend(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            while True:
                first, pipes, _, _ = socket.recv_fds(connection, 1, MOST_WORKERS)
                if not first:
                    return
                try:
                    environments = json.loads(lines.readline())
                    for environment, pipe in zip(environments, pipes):  # noqa: B905  Python 3.9
                        self._fork(connection, environment, pipe, pipes)
                finally:
                    for pipe in pipes:
                        os.close(pipe)
                connection.sendall(b"\n")

    def _fork(self, connection: socket.socket, environment: Dict[str, str], pipe: int, pipes: List[int]) -> None:
        parent = os.getpid()
        if os.fork():
            return
        try:
            processes.live_with(self._stub_pid, parent)
            processes.set_name("worker-parent")
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (
                self._listener.detach(),
                connection.detach(),
                *(other for other in pipes if other != pipe),
            ):
                os.close(descriptor)
            os._exit(worker.supervise(self._work, environment, pipe))
        except BaseException:  # noqa: BLE001  a child must not return into the server's loop
            traceback.print_exc()
        finally:
            os._exit(1)

    def _work(self, environment: Dict[str, str]) -> NoReturn:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        processes.set_name("worker " + environment["RANK"])
        os.environ.clear()
        os.environ.update(environment)
        module: Any = sys.modules[self._module]
        code = 1
        try:
            code = module.main()
        except BaseException:  # noqa: BLE001  as an interpreter does at its end
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
