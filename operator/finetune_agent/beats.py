"""Listens to the workers: datagrams of any process on one socket, ends of workers on another.

Datagrams are levels: the newest of each kind stands, so any flood ends up as one small snapshot and one nudge to the
main loop. The pace is bounded, so that a worker gone mad cannot take the interpreter from the other threads; it only
blocks itself and its peers' beats.

A worker's last words (``failure``) reach the kernel before the record of its end does. To merge them, all waiting
beats are read before a record is.
"""

import contextlib
import json
import select
import socket
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Set, Tuple

from finetune_agent.hang import Pulse
from finetune_agent.memory import MemoryKills
from finetune_api.contract import MESSAGE_LIMIT
from finetune_api.protocol import (
    Beat,
    BeatKind,
    Checkpoint,
    Evaluation,
    Exit,
    Heartbeat,
    Model,
    Progress,
    Resumed,
    Saves,
    from_wire,
)

BEAT_BYTES = 8192
RECORD_BYTES = 65536
BEATS_PER_SECOND = 2000
BEATS_BEFORE_RECORD = 1000


@dataclass(frozen=True)
class Levels:
    """The newest of each kind that workers told, and the newest heartbeat of each of them."""

    heartbeat: Optional[Heartbeat] = None
    progress: Optional[Progress] = None
    evaluation: Optional[Evaluation] = None
    checkpoint: Optional[Checkpoint] = None
    saves: Optional[Saves] = None
    resumed: Optional[Resumed] = None
    model: Optional[Model] = None
    pulses: Dict[int, Pulse] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerStarted:
    """A worker runs."""

    generation: int
    rank: int
    pid: int


@dataclass(frozen=True)
class WorkerEnded:
    """A worker ended; ``exit`` has code 0 if all was well."""

    exit: Exit


class Board:
    """Holds the levels of the generation that runs; whoever changes them nudges the main loop once until it looks."""

    def __init__(self, nudge: Callable[[], None]) -> None:
        self._nudge = nudge
        self._lock = threading.Lock()
        self._levels = Levels()
        self._nudged = False
        self._failures: Dict[int, Exit] = {}
        self._ranks = range(0)
        self.generation = 0
        self.ignored = 0

    def begin(self, generation: int, ranks: range) -> None:
        """Forget the old generation, listen to a new one."""
        with self._lock:
            self._levels, self._failures = Levels(), {}
            self.generation, self._ranks = generation, ranks

    def knows(self, generation: int, rank: int) -> bool:
        """Tell whether a worker is one of ours, now."""
        return generation == self.generation and rank in self._ranks

    def take(self) -> Levels:
        """Return the levels; the next change nudges again."""
        with self._lock:
            self._nudged = False
            return self._levels

    def put(self, generation: int, **changes: Any) -> None:
        """Change some levels."""
        with self._lock:
            if generation != self.generation:
                return
            levels = replace(self._levels, **changes)
            nudge = levels != self._levels and not self._nudged
            self._levels = levels
            self._nudged = self._nudged or nudge
        if nudge:
            self._nudge()

    def hear(self, datagram: bytes) -> None:
        """Take one datagram of a worker, count it if it makes no sense."""
        beat = read_beat(datagram)
        if beat is None or not self.knows(beat.generation, beat.rank):
            self.ignored += 1
        elif beat.failure is not None:
            self._failures[beat.rank] = beat.failure
        elif beat.heartbeat is not None:
            pulses = {**self._levels.pulses, beat.rank: Pulse(beat.heartbeat, time.monotonic())}
            self.put(beat.generation, heartbeat=beat.heartbeat, pulses=pulses)
        else:
            self.put(beat.generation, **{beat.kind.value: shortened(getattr(beat, beat.kind.value))})

    def merged(self, end: Exit) -> Exit:
        """Return a worker's end with its own last words, which know better than its output."""
        words = self._failures.get(end.rank)
        message = (words.message if words else "") or end.message
        return replace(end, message=message[:MESSAGE_LIMIT])


def read_beat(datagram: bytes) -> Optional[Beat]:
    """Return the beat in a datagram; None unless it has exactly the member that its kind names."""
    if len(datagram) > BEAT_BYTES:
        return None
    try:
        beat = from_wire(Beat, json.loads(datagram))
    except (ValueError, RecursionError):
        return None
    present = {kind for kind in BeatKind if getattr(beat, kind.value) is not None}
    return beat if present == {beat.kind} else None


def shortened(level: Any) -> Any:
    """Return a level with its sentences cut: what a store answers may be long, and the job server refuses what is too long whole."""
    if isinstance(level, Saves):
        return replace(level, message=level.message[:MESSAGE_LIMIT])
    if isinstance(level, Resumed):
        return replace(level, fallback=level.fallback[:MESSAGE_LIMIT])
    return level


class Listener:
    """Reads both sockets."""

    def __init__(self, folder: Path, board: Board, emit: Callable[[Any], None]) -> None:
        self._board = board
        self._emit = emit
        self._seen: Set[Tuple[int, int, bool]] = set()
        self._pace = Pace(BEATS_PER_SECOND)
        self.memory_kills = MemoryKills()
        self.progress_path = str(folder / "progress.sock")
        self.exits_path = str(folder / "exits.sock")
        self._beats = bind(self.progress_path)
        self._records = bind(self.exits_path)

    def run(self) -> None:
        """Listen for ever."""
        while True:
            ready, _, _ = select.select([self._beats, self._records], [], [])
            if self._records in ready:
                self._drain_beats(BEATS_BEFORE_RECORD)
                self._take_record()
            else:
                self._drain_beats(1)
            self._pace.keep()

    def _drain_beats(self, limit: int) -> None:
        for _ in range(limit):
            try:
                datagram = self._beats.recv(BEAT_BYTES + 1)
            except BlockingIOError:
                return
            self._board.hear(datagram)

    def _take_record(self) -> None:
        event = self._read_record(self._records.recv(RECORD_BYTES))
        if event is not None:
            self._emit(event)

    def _read_record(self, datagram: bytes) -> Any:
        """Return the event in a record: a pid is a start, anything else an end. Each counts once for each worker."""
        try:
            record = json.loads(datagram)
            end = from_wire(Exit, record)
        except (ValueError, RecursionError):
            return None
        pid = record.get("pid")
        key = (end.generation, end.rank, pid is None)
        if not self._board.knows(end.generation, end.rank) or key in self._seen:
            return None
        self._seen = {seen for seen in self._seen if seen[0] == end.generation} | {key}
        if isinstance(pid, int):
            return WorkerStarted(end.generation, end.rank, pid)
        return WorkerEnded(self.memory_kills.blamed(self._board.merged(end)))


class Pace:
    """Lets a number of calls a second through, and makes the rest wait."""

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._count = 0
        self._since = time.monotonic()

    def keep(self) -> None:
        """Count a call."""
        self._count += 1
        if self._count < self._per_second / 10:
            return
        spare = self._since + 0.1 - time.monotonic()
        if spare > 0:
            time.sleep(spare)
        self._count, self._since = 0, time.monotonic()


def bind(path: str) -> socket.socket:
    """Return a datagram socket that only our user may write to."""
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(path)
    Path(path).chmod(0o600)
    receiver.setblocking(False)
    return receiver
