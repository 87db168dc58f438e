"""What an agent does about what it hears: a state machine without processes, clock or network.

``handle(event, now)`` returns the effects that the main loop is to carry out, in order. A changed record is always the
first of them, so that it is on disk before the deed it tells of. What to report is a function of the state.

A generation goes through these stages::

    RESTING  ->  RUNNING  ->  ENDING  ->  RESTING        ordered away, or all workers ended
                    |-> STOPPING -^                      SIGTERM sent, workers may save until the deadline
                    |-> FAILING  -^                      a worker ended badly; its peers' echoes are awaited for a moment,
                                                         or their saves for as long as a grace period

ENDING lasts until no process of it is left; only then may the next one start. A generation all of whose workers ended
with 0 stays RUNNING with state Succeeded until its launcher ends, for rank 0's launcher holds the store that workers
of other pods still use.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Callable, Dict, List, Optional, Set

from finetune_agent import __version__
from finetune_agent.beats import Levels, WorkerEnded, WorkerStarted
from finetune_agent.hang import Finding, Watch
from finetune_agent.journal import Record
from finetune_agent.launcher import LauncherEnd
from finetune_api.contract import MESSAGE_LIMIT, ExitCode
from finetune_api.protocol import Action, AgentState, Exit, Heartbeat, Order, Progress, Report, Saves, Stalled

LAUNCHER_RANK = -1
ECHO_SECONDS = 2.0  # after a worker's bad end, for its peers to say how they end
SETTLE_SECONDS = 0.3  # after the launcher's end, for records of workers that are under way
TERMINATED = 143  # 128 + SIGTERM
QUICK_TICK_SECONDS = 0.05
SLOW_TICK_SECONDS = 1.0  # enough to notice silence


class Stage(Enum):
    """Where the newest generation is."""

    RESTING = "resting"
    RUNNING = "running"
    STOPPING = "stopping"
    FAILING = "failing"
    ENDING = "ending"


@dataclass(frozen=True)
class Ordered:
    """An order came."""

    order: Order


@dataclass(frozen=True)
class LauncherEnded:
    """The launcher of a generation ended."""

    generation: int
    end: LauncherEnd


@dataclass(frozen=True)
class NotStarted:
    """A ``Start`` could not be carried out."""

    message: str
    exit_code: Optional[int] = None


@dataclass(frozen=True)
class Gone:
    """No process of any generation is left."""


@dataclass(frozen=True)
class Terminate:
    """SIGTERM: the pod is being deleted."""


@dataclass(frozen=True)
class Examined:
    """The silent workers of a generation were looked at."""

    generation: int
    findings: Dict[int, Finding]


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Persist:
    """Write the record to disk."""

    record: Record


@dataclass(frozen=True)
class Start:
    """Start this generation."""

    order: Order


@dataclass(frozen=True)
class Ask:
    """Ask these workers to save and end: the file of the contract's SAVE_NOW, and SIGTERM."""

    pids: List[int]


@dataclass(frozen=True)
class Examine:
    """Have the stacks of silent workers (rank → pid) printed, and say what was found (``Examined``)."""

    generation: int
    pids: Dict[int, int]


@dataclass(frozen=True)
class Kill:
    """Kill all processes of generations; say ``Gone`` when none is left."""


@dataclass(frozen=True)
class Quit:
    """End the container with this code."""

    code: int


@dataclass(frozen=True)
class Identity:
    """Who reports."""

    pod_uid: str
    instance: str
    address: str


class Agent:
    """The state machine.

    ``zero_means_done`` tells whether a worker that ends with 0 after SIGTERM has done its work: our trainer would say
    75 (saved) if not, but a script that knows only SIGTERM may leave politely in the middle.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        record: Record,
        port: int,
        previous_end: str,
        grace_seconds: float,
        zero_means_done: bool,
    ) -> None:
        self.port = port
        self.levels = Levels()
        self.record = record
        self._identity = identity
        self._grace_seconds = grace_seconds
        self._zero_means_done = zero_means_done
        self._stage = Stage.ENDING  # a former instance may have left processes
        self._persisted = record
        self._effects: List[Any] = []
        self._deadline = 0.0
        self._now = 0.0
        self._next: Optional[Order] = None
        self._verdict: Optional[int] = None
        self._stopping = False
        self._launcher_end: Optional[LauncherEnd] = None
        self._ranks = range(0)
        self._pids: Dict[int, int] = {}
        self._done: Set[int] = set()
        self._heartbeat: Optional[Heartbeat] = None
        self._progress: Optional[Progress] = None
        self._saves: Optional[Saves] = None
        self._watch = Watch((), hang_seconds=0, must_beat=False, now=0.0)
        self._is_silent = False
        self._stalled: Optional[Stalled] = None
        if record.state is AgentState.RUNNING:
            self._fail_forgotten(previous_end)

    def handle(self, event: Any, now: float) -> List[Any]:
        """Take an event at the monotonic time ``now`` and return what to do."""
        self._now = now
        handler: Callable[[Any], None] = getattr(self, HANDLERS[type(event)])
        handler(event)
        effects, self._effects = self._effects, []
        if self.record != self._persisted:
            effects.insert(0, Persist(self.record))
            self._persisted = self.record
        return effects

    def report(self) -> Report:
        """Return what is."""
        return Report(
            pod_uid=self._identity.pod_uid,
            instance=self._identity.instance,
            agent_version=__version__,
            generation=self.record.started,
            state=self.record.state,
            address=self._identity.address,
            port=self.port,
            heartbeat=self._heartbeat,
            progress=self._progress,
            evaluation=self.record.evaluation,
            checkpoint=self.record.checkpoint,
            saves=self._saves,
            resumed=self.record.resumed,
            model=self.record.model,
            exits=self.record.exits,
            stalled=self._stalled,
            paces=self._watch.paces(),
            leaving=self._verdict == TERMINATED,
        )

    @property
    def tick_seconds(self) -> Optional[float]:
        """In how many seconds time alone may change something; None when it cannot."""
        if self._stage is Stage.RUNNING:
            return SLOW_TICK_SECONDS
        return None if self._stage is Stage.RESTING else QUICK_TICK_SECONDS

    # Orders.

    def _on_order(self, event: Ordered) -> None:
        order = event.order
        if order.action is Action.FINISH:  # the job is over, and finished jobs never come back, whatever the generation
            self._leave(0)
        elif self._verdict is None and order.generation >= self.record.obeyed:
            self.record = replace(self.record, obeyed=order.generation)
            {Action.RUN: self._run, Action.WAIT: self._hold, Action.STOP: self._stop}[order.action](order)

    def _run(self, order: Order) -> None:
        if order.generation > self.record.started:
            self._next = order
            self._end(AgentState.STOPPED)

    def _hold(self, order: Order) -> None:
        self._next = None
        if self.record.started < order.generation:
            self._end(AgentState.STOPPED)

    def _stop(self, order: Order) -> None:
        self._next = None
        self._ask(order.grace_seconds)

    def _on_terminate(self, _event: Terminate) -> None:
        if self._verdict is None:
            self._next, self._verdict = None, TERMINATED
            self._ask(self._grace_seconds)

    def _leave(self, verdict: int) -> None:
        self._next, self._verdict = None, verdict
        self._end(AgentState.STOPPED)

    def _ask(self, grace_seconds: float) -> None:
        """Ask the workers to save and end. Those that have not begun have nothing to save."""
        running = self._stage in (Stage.RUNNING, Stage.STOPPING, Stage.FAILING)
        worth_it = self.record.state is AgentState.RUNNING or self._is_saving()
        if not running or not self._pids or not worth_it:
            self._end(AgentState.STOPPED)
            return
        deadline = self._now + grace_seconds
        self._deadline = min(self._deadline, deadline) if self._stage is Stage.STOPPING else deadline
        self._stage, self._stopping = Stage.STOPPING, True
        self._effects.append(Ask(sorted(self._pids.values())))

    # A generation's life.

    def _end(self, state: AgentState) -> None:
        """End what runs now; it is then in ``state`` unless it had come to an end before.

        Stopped is told when nothing is left, for others may build on it; the rest is what became of the work.
        """
        if self.record.state is AgentState.RUNNING and state is not AgentState.STOPPED:
            self.record = replace(self.record, state=state)
        if self._stage is Stage.RESTING:
            self._proceed()
        else:
            self._stage = Stage.ENDING
            self._effects.append(Kill())

    def _on_gone(self, _event: Gone) -> None:
        if self._stage is Stage.ENDING:
            self._stage = Stage.RESTING
            if self.record.state is AgentState.RUNNING:
                self.record = replace(self.record, state=AgentState.STOPPED)
            self._proceed()

    def _proceed(self) -> None:
        if self._verdict is not None:
            self._effects.append(
                Quit(ExitCode.SAVED if self._verdict == TERMINATED and self._all_saved() else self._verdict)
            )
        elif self._next is not None:
            self._start(self._next)

    def _start(self, order: Order) -> None:
        first = order.rank * order.processes_per_node
        self.record = replace(self.record, started=order.generation, state=AgentState.RUNNING, exits=[], resumed=None)
        self._next, self._launcher_end, self._stopping = None, None, False
        self._ranks = range(first, first + order.processes_per_node)
        self._pids, self._done = {}, set()
        self._heartbeat, self._progress, self._saves = None, None, None
        self._watch = Watch(
            self._ranks, hang_seconds=order.hang_seconds, must_beat=self._zero_means_done, now=self._now
        )
        self._is_silent, self._stalled = False, None
        self._stage = Stage.RUNNING
        self._effects.append(Start(order))

    def _on_not_started(self, event: NotStarted) -> None:
        if self.record.state is AgentState.RUNNING:
            self._add_exit(self._launcher_exit(event.message, event.exit_code, None))
            self._end(AgentState.FAILED)

    def _on_worker_started(self, event: WorkerStarted) -> None:
        if self._is_news(event.generation) and event.rank in self._ranks:
            self._pids[event.rank] = event.pid
            if self._stopping:
                self._effects.append(Ask([event.pid]))

    def _on_worker_ended(self, event: WorkerEnded) -> None:
        end = event.exit
        if not self._is_news(end.generation) or end.rank not in self._ranks:
            return
        self._pids.pop(end.rank, None)
        if end.exit_code == 0:
            self._done.add(end.rank)
        else:
            self._add_exit(end)
            self._fail(self._grace_seconds if self._is_saving() else ECHO_SECONDS)
        if self._missing() == 0:
            self._conclude()

    def _on_launcher_ended(self, event: LauncherEnded) -> None:
        if not self._is_news(event.generation):
            return
        self._launcher_end = event.end
        began = self._pids or self._done or self.record.exits
        if self._missing() == 0 or not began:
            self._conclude()
        else:
            self._stage = Stage.STOPPING if self._stopping else Stage.FAILING
            self._deadline = self._now + SETTLE_SECONDS

    def _fail(self, seconds: float) -> None:
        """Tell at once that the generation failed, and wait a moment for more ends.

        The moment is long after a save: another pod of the gang was asked to stop, and all ranks have agreed to save and leave.
        """
        if self._stage is Stage.RUNNING:
            self.record = replace(self.record, state=AgentState.FAILED)
            self._stage, self._deadline = Stage.FAILING, self._now + seconds
        elif self._stage is Stage.FAILING and not self._is_saving():
            self._deadline = min(self._deadline, self._now + seconds)

    def _on_tick(self, _event: Tick) -> None:
        if self._stage is Stage.ENDING:
            self._effects.append(Kill())
        elif self._stage in (Stage.STOPPING, Stage.FAILING) and self._now >= self._deadline:
            self._conclude()
        elif self._stage is Stage.RUNNING and not self._is_silent:
            self._look_for_silence()

    def _conclude(self) -> None:
        """All that can be known of the generation's end is known."""
        succeeded = len(self._done) == len(self._ranks) and (self._zero_means_done or not self._stopping)
        if succeeded and self._launcher_end is None and not self._stopping:
            self.record = replace(self.record, state=AgentState.SUCCEEDED)
            return
        if not succeeded:
            self._explain_missing()
        outcome = AgentState.STOPPED if self._stopping else AgentState.FAILED
        self._end(AgentState.SUCCEEDED if succeeded else outcome)

    def _explain_missing(self) -> None:
        """Add exits for what ended without a word."""
        for end in self._launcher_end.failures if self._launcher_end else []:
            self._add_exit(end)
        for rank in sorted(self._pids) if self._stopping else []:
            self._add_exit(
                Exit(self.record.started, rank, signal=9, message="had to be killed: did not end in time after SIGTERM")
            )
        launcher = self._launcher_end
        if launcher and not self.record.exits and not self._stopping:
            silent = f"the launcher ended before {self._missing()} of its workers said how they did"
            self._add_exit(self._launcher_exit(launcher.message or silent, launcher.exit_code or None, launcher.signal))

    # Silence.

    def _look_for_silence(self) -> None:
        if self._watch.are_silent(self._pids, self._now):
            self._is_silent = True
            self._effects.append(Examine(self.record.started, dict(self._pids)))

    def _on_examined(self, event: Examined) -> None:
        if event.generation == self.record.started and self._is_silent:
            self._stalled = self._watch.suspect(event.findings, self._now)

    # What is known.

    def _on_levels(self, levels: Levels) -> None:
        self._watch.hear(levels.pulses)
        if self._is_silent and not self._watch.are_silent(self._pids, self._now):
            self._is_silent, self._stalled = False, None
        self._heartbeat, self._progress, self._saves = levels.heartbeat, levels.progress, levels.saves
        self.record = replace(
            self.record,
            evaluation=levels.evaluation or self.record.evaluation,
            checkpoint=levels.checkpoint or self.record.checkpoint,
            resumed=levels.resumed or self.record.resumed,
            model=levels.model or self.record.model,
        )

    def _fail_forgotten(self, previous_end: str) -> None:
        """Answer for a generation that ran under a former instance, which cannot be run again."""
        message = "the agent process ended while this generation ran"
        self._add_exit(self._launcher_exit(message + (" (" + previous_end + ")" if previous_end else ""), None, None))
        self.record = replace(self.record, state=AgentState.FAILED)

    def _launcher_exit(self, message: str, exit_code: Optional[int], signal: Optional[int]) -> Exit:
        return Exit(self.record.started, LAUNCHER_RANK, exit_code, signal, message[:MESSAGE_LIMIT])

    def _add_exit(self, end: Exit) -> None:
        if all(known.rank != end.rank for known in self.record.exits):
            self.record = replace(self.record, exits=[*self.record.exits, end])

    def _is_news(self, generation: int) -> bool:
        return generation == self.record.started and self._stage not in (Stage.ENDING, Stage.RESTING)

    def _missing(self) -> int:
        """Count the local workers whose end is not known."""
        failed = {end.rank for end in self.record.exits if end.rank in self._ranks}
        return len(self._ranks) - len(self._done | failed)

    def _is_saving(self) -> bool:
        """Tell whether whatever has ended so far has ended after a save."""
        return bool(self.record.exits) and all(end.exit_code == ExitCode.SAVED for end in self.record.exits)

    def _all_saved(self) -> bool:
        saved = [end for end in self.record.exits if end.exit_code == ExitCode.SAVED]
        return bool(self._ranks) and len(saved) == len(self.record.exits) == len(self._ranks)


HANDLERS: Dict[type, str] = {
    Ordered: "_on_order",
    Terminate: "_on_terminate",
    Gone: "_on_gone",
    NotStarted: "_on_not_started",
    WorkerStarted: "_on_worker_started",
    WorkerEnded: "_on_worker_ended",
    LauncherEnded: "_on_launcher_ended",
    Examined: "_on_examined",
    Tick: "_on_tick",
    Levels: "_on_levels",
}
