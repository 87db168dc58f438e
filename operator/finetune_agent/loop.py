"""The agent process: threads put events into one queue, the main thread takes them and carries out what agent.py decides.

The main thread starts launchers, because their lives are tied to the thread that forked them (see processes). No
producer can flood the queue: orders count when they differ, a worker starts and ends once, levels nudge once until
looked at. Any thread's end ends the process, loudly, and the stub starts another.
"""

import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, List, Optional

from finetune_agent import environment, ports, processes, stacks
from finetune_agent.agent import (
    Agent,
    Ask,
    Examine,
    Examined,
    Gone,
    Identity,
    Kill,
    LauncherEnded,
    NotStarted,
    Ordered,
    Persist,
    Quit,
    Start,
    Terminate,
    Tick,
)
from finetune_agent.beats import Board, Listener
from finetune_agent.job_file import write_job_file
from finetune_agent.journal import Journal
from finetune_agent.kubeflow import KubeflowServer
from finetune_agent.launcher import CannotStart, Launch, Launcher, Running, TorchrunLauncher
from finetune_agent.reporting import Access, HttpsJobServer, Orders, Poller, Reporter
from finetune_agent.settings import Settings, read_settings
from finetune_agent.stub import say
from finetune_agent.warm_launcher import WarmLauncher
from finetune_api.contract import GENERATION_LINE, MESSAGE_LIMIT
from finetune_api.protocol import AgentState, Order

BUG = 70  # sysexits' EX_SOFTWARE; no verdict, so the stub starts another agent
KILL_SECONDS = 0.5  # for one try; the next comes with the next tick
SAVE_NOW_FILE = "save-now"  # in the folder of a generation
STACKS_FOLDER = "stacks"  # there too
FLUSH_SECONDS = 3.0  # for the last report, once the container's end is decided


class LevelsChanged:
    """The board has something new."""


class LauncherChanged:
    """The launcher may be ready now."""


@dataclass(frozen=True)
class JournalLost:
    """The record could not be written. A start that is not on disk must not happen; the rest is only reported again."""

    message: str


class Loop:
    """Everything of one agent process, wired together."""

    def __init__(self, settings: Settings, *, stub_pid: int, previous_end: str, launcher: Launcher) -> None:
        self._settings = settings
        self._stub_pid = stub_pid
        self._launcher = launcher
        self._events: "queue.SimpleQueue[Any]" = queue.SimpleQueue()
        self._journal = Journal(settings.folder)
        self._board = Board(lambda: self._events.put(LevelsChanged()))
        self._listener = Listener(settings.folder, self._board, self._events.put)
        self._kubeflow = KubeflowServer(self._board)
        self._save_now = settings.folder / SAVE_NOW_FILE
        self._waiting: Optional[Launch] = None
        access = Access(settings.job.job_server, settings.pod_uid, settings.ca_file, settings.token_file)
        orders = Orders(lambda order: self._events.put(Ordered(order)))
        self._poller = Poller(HttpsJobServer(access), orders)
        self._reporter = Reporter(HttpsJobServer(access), orders)
        self._agent = Agent(
            identity=Identity(settings.pod_uid, uuid.uuid4().hex, settings.address),
            record=self._journal.read(),
            port=ports.propose_port(),
            previous_end=previous_end,
            grace_seconds=settings.grace_seconds,
            zero_means_done=not settings.job.command,
        )

    def run(self) -> int:
        """Run until there is a verdict; return it."""
        # SimpleQueue.put may be called from a signal handler, Queue.put may not.
        signal.signal(signal.SIGTERM, lambda _number, _frame: self._events.put(Terminate()))
        self._launcher.prepare(lambda: self._events.put(LauncherChanged()))
        self._events.put(Tick())  # ends what a former instance left
        for name, thread in (("beats", self._listener), ("kubeflow", self._kubeflow)):
            guard(name, thread.run)
        self._reporter.publish(self._agent.report())
        for name, talker in (("reports", self._reporter), ("orders", self._poller)):
            guard(name, talker.run)
        while True:
            verdict = self._handle(self._next_event())
            self._reporter.publish(self._agent.report())
            if verdict is not None:
                self._say_goodbye()
                return verdict

    def _next_event(self) -> Any:
        try:
            event = self._events.get(timeout=self._agent.tick_seconds)
        except queue.Empty:
            return Tick()
        if isinstance(event, LauncherChanged):
            return self._launch() or Tick()
        return self._board.take() if isinstance(event, LevelsChanged) else event

    def _handle(self, event: Any) -> Optional[int]:
        """Let the agent decide, and do it; what comes of the deeds is handled at once, before the queue's events."""
        events = [event]
        while events:
            before = self._agent.record
            effects = self._agent.handle(events.pop(0), time.monotonic())
            self._log(before.state, before.started)
            for effect in effects:
                if isinstance(effect, Quit):
                    return effect.code
                outcome = self._carry_out(effect)
                if isinstance(outcome, JournalLost) and any(isinstance(other, Start) for other in effects):
                    outcome = NotStarted(outcome.message)
                if isinstance(outcome, NotStarted):
                    events.append(outcome)
                    break
                if isinstance(outcome, Gone):
                    events.append(outcome)
        return None

    def _carry_out(self, effect: Any) -> Any:
        if isinstance(effect, Persist):
            return self._persist(effect)
        if isinstance(effect, Start):
            return self._start(effect.order)
        if isinstance(effect, Ask):
            return self._ask(effect)
        if isinstance(effect, Examine):
            return self._examine(effect)
        assert isinstance(effect, Kill)
        return self._kill()

    def _kill(self) -> Optional[Gone]:
        self._waiting = None
        spare = (os.getpid(), *self._launcher.spared)
        left = processes.kill_descendants(self._stub_pid, spare=spare, patience_seconds=KILL_SECONDS)
        return None if left else Gone()

    def _ask(self, effect: Ask) -> None:
        """The file first: a worker that the signal wakes may look for it at once."""
        try:
            self._save_now.touch()
        except OSError as error:
            say("workers that cannot take signals are not told to save: " + str(error))
        for pid in effect.pids:
            processes.send_signal(pid, signal.SIGTERM)

    def _examine(self, effect: Examine) -> None:
        """In a thread: the answers take a while, and an order must not wait for them."""
        folder = self._save_now.parent / STACKS_FOLDER

        def examine() -> None:
            self._events.put(Examined(effect.generation, stacks.examine(folder, effect.pids)))

        say("all workers of generation " + str(effect.generation) + " are silent; their stacks follow")
        guard("stacks", examine, ends=True)

    def _persist(self, effect: Persist) -> Any:
        try:
            self._journal.write(effect.record)
        except OSError as error:
            say("the journal cannot be written: " + str(error))
            return JournalLost("the agent's journal cannot be written: " + str(error))
        return None

    def _start(self, order: Order) -> Any:
        try:
            self._waiting = self._prepare(order)
        except OSError as error:
            return NotStarted("the launcher cannot be started: " + str(error))
        return self._launch()

    def _launch(self) -> Optional[NotStarted]:
        """Start the workers that wait for it, as soon as the launcher is ready."""
        launch = self._waiting
        if launch is None or not self._launcher.is_ready:
            return None
        self._waiting = None
        try:
            running = self._launcher.start(launch)
        except CannotStart as error:
            return NotStarted(str(error), error.exit_code)
        except OSError as error:
            return NotStarted("the launcher cannot be started: " + str(error))
        finally:
            self._agent.port = ports.propose_port()
        guard("launcher", lambda: self._await_end(launch.order.generation, running), ends=True)
        return None

    def _prepare(self, order: Order) -> Launch:
        folder = self._make_folder(order.generation)
        self._save_now = folder / SAVE_NOW_FILE
        first = order.rank * order.processes_per_node
        self._board.begin(order.generation, range(first, first + order.processes_per_node))
        self._listener.memory_kills.begin()
        endpoints = environment.Endpoints(
            save_now=str(self._save_now),
            stacks_folder=str(folder / STACKS_FOLDER),
            progress_socket=self._listener.progress_path,
            exits_socket=self._listener.exits_path,
            kubeflow_url=self._kubeflow.url,
            kubeflow_token_file=self._kubeflow.begin(order.generation, folder),
        )
        variables = environment.worker_environment(
            os.environ,
            order=order,
            endpoints=endpoints,
            job_file=str(self._job_file(order, folder)),
            recipe_file=str(self._settings.recipe_file),
            credentials=environment.read_credentials(self._settings.credentials_folder),
            cpus=environment.available_cpus(),
        )
        return Launch(order, list(self._settings.job.command), variables, folder, self._settings.address)

    def _job_file(self, order: Order, folder: Path) -> Path:
        """Return the job file for the workers. Operators of older versions wish nothing: it is the mounted one then."""
        if order.checkpoint is None:
            return self._settings.job_file
        return write_job_file(folder, self._settings.job_document, order.checkpoint)

    def _make_folder(self, generation: int) -> Path:
        """Make a generation's own folder; with those before it goes all that was meant for them."""
        for old in self._settings.folder.glob("g*"):
            shutil.rmtree(str(old), ignore_errors=True)
        folder = self._settings.folder / ("g" + str(generation))
        folder.mkdir(mode=0o700)
        (folder / STACKS_FOLDER).mkdir()
        return folder

    def _await_end(self, generation: int, running: Running) -> None:
        self._events.put(LauncherEnded(generation, running.wait()))

    def _log(self, state: AgentState, started: int) -> None:
        record = self._agent.record
        if (record.state, record.started) != (state, started):
            say(GENERATION_LINE % (record.started, record.state.value))

    def _say_goodbye(self) -> None:
        """Leave the last word where the kubelet, and if it is there the job server, will find it."""
        self._reporter.flush(FLUSH_SECONDS)
        write_termination_message(self._settings.termination_log, self._agent)


def write_termination_message(path: Path, agent: Agent) -> None:
    """Write one line of JSON, short enough for the kubelet's 4096 bytes."""
    record = agent.record
    line = {
        "generation": record.started,
        "state": record.state.value,
        "exits": [{"rank": e.rank, "exitCode": e.exit_code, "signal": e.signal} for e in record.exits[:16]],
        "message": record.exits[0].message[:MESSAGE_LIMIT] if record.exits else "",
    }
    try:
        path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    except OSError as error:
        say("no termination message: " + str(error))


def guard(name: str, function: Callable[[], None], *, ends: bool = False) -> None:
    """Run ``function`` in a thread without which the agent cannot be; only if ``ends`` may it return."""

    def run() -> None:
        try:
            function()
        except BaseException:  # noqa: BLE001  whatever it is, the agent must not live on without this thread
            traceback.print_exc()
        else:
            if ends:
                return
        say("the " + name + " thread ended; so does this agent process")
        os._exit(BUG)

    threading.Thread(target=run, name=name, daemon=True).start()


def main(arguments: List[str]) -> int:
    """Be the agent process of the stub whose pid comes first; how the former instance ended comes second."""
    stub_pid = int(arguments[0])
    processes.die_with_parent(stub_pid)
    processes.set_name("agent")
    agent_file = sys.argv[0]
    try:
        settings = read_settings(os.environ, agent_file)
    except ValueError as error:
        say("this pod is not one of an operator's: " + str(error))
        return BUG
    launcher: Launcher
    if settings.job.command:
        launcher = TorchrunLauncher(settings.agent_file)
    else:
        launcher = WarmLauncher(settings.agent_file, settings.folder, stub_pid)
    verdict = Loop(settings, stub_pid=stub_pid, previous_end=arguments[1], launcher=launcher).run()
    sys.stdout.flush()
    os._exit(verdict)  # daemon threads have nothing to lose
