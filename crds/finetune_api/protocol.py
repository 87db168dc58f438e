"""What agent and operator, and worker and agent, say to one another: JSON objects of one version.

An agent POSTs a :class:`Report` of what is, whenever that changes, and long-polls for an :class:`Order` of what should be.
Both are levels, not events: repeating one changes nothing, and the newest replaces all before it. Reports repeat the exits of the
agent's newest generation until a higher one starts, so neither side needs to remember what the other has heard.

Workers tell their agent how they are with :class:`Beat` datagrams.

Standard library only, Python 3.9 syntax (see contract). ``from_wire`` ignores fields it does not know, so that a newer peer is
understood, and raises ``ValueError`` with the path of a field that is missing or wrong, so that hostile input ends there.
"""

import dataclasses
import functools
import typing
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Dict, List, Optional, Tuple, Type, TypeVar, Union

PROTOCOL_VERSION = 1
SERVED_VERSIONS = (1,)

T = TypeVar("T")


class AgentState(str, Enum):
    """What became of the generation that an agent started last."""

    IDLE = "Idle"  # none started yet
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"  # every local worker ended with 0
    FAILED = "Failed"  # a local worker or the launcher ended otherwise
    STOPPED = "Stopped"  # ended because it was told to


class Action(str, Enum):
    """What an agent should be doing."""

    WAIT = "Wait"  # end what runs of lower generations, hold still
    RUN = "Run"  # run this generation
    STOP = "Stop"  # ask the workers to save, then end them
    FINISH = "Finish"  # the job is over: exit 0, whatever became of it


class Phase(str, Enum):
    """What a worker is doing; limits on silence differ by phase."""

    INITIALIZING = "Initializing"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    CHECKPOINTING = "Checkpointing"
    FINISHING = "Finishing"


class Doing(str, Enum):
    """What a worker that has fallen silent was found to be doing."""

    STOPPED = "Stopped"  # nothing: its process does not run, or does not come back from the kernel
    WORKING = "Working"  # something of its own
    WAITING = "Waiting"  # waiting for its peers
    UNKNOWN = "Unknown"  # it does not show its stacks


class ResumeSource(str, Enum):
    """Where a generation took its state from."""

    START = "Start"  # nothing was saved yet
    MEMORY = "Memory"  # what the worker before it had staged in this pod
    STORAGE = "Storage"  # the newest committed checkpoint that can be read
    OTHER_JOB = "OtherJob"  # spec.checkpoint.resumeFrom


class BeatKind(str, Enum):
    """What a datagram of a worker tells."""

    HEARTBEAT = "heartbeat"  # every rank, at each step and change of phase
    PROGRESS = "progress"  # rank 0
    EVALUATION = "evaluation"  # rank 0
    CHECKPOINT = "checkpoint"  # rank 0, after the commit
    SAVES = "saves"  # rank 0, when a save starts, ends, fails or is put off
    RESUMED = "resumed"  # rank 0, before the first step
    MODEL = "model"  # rank 0, after the upload of the result
    FAILURE = "failure"  # any rank, right before it exits for a reason it knows


@dataclass(frozen=True)
class Heartbeat:
    """Where a worker is. ``step`` counts finished optimizer steps.

    ``busy_seconds`` is what the newest step took of this rank alone, without the time that it waited for its peers.
    """

    phase: Phase
    step: int = 0
    busy_seconds: Optional[float] = None


@dataclass(frozen=True)
class Pace:
    """How fast a rank is of late: medians of the newest steps, and of what each took of this rank alone."""

    rank: int
    step_seconds: float
    busy_seconds: float


@dataclass(frozen=True)
class Stalled:
    """All workers of a pod are silent for longer than what they do may take; this one is the likeliest to hold up the others.

    ``silent_seconds`` count from its last heartbeat, which told ``phase`` and ``step``. ``place`` is where its main thread stands.
    """

    rank: int
    phase: Phase
    step: int
    silent_seconds: float
    doing: Doing = Doing.UNKNOWN
    place: str = ""

    @property
    def innocence(self) -> Tuple[bool, int, int, float]:
        """The rank with the least of it is the one that the others wait for.

        Nobody stops their process in a collective by chance. Of those that run, whoever has done fewer steps did not come to where the
        others are; at the same step it is who does not wait; then who was heard of first of all.
        """
        alibi = (Doing.STOPPED, Doing.WORKING, Doing.UNKNOWN, Doing.WAITING).index(self.doing)
        return self.doing is not Doing.STOPPED, self.step, alibi, -self.silent_seconds


@dataclass(frozen=True)
class Progress:
    """How far training is. ``step`` of ``total_steps`` optimizer steps are done; the rest describes the newest."""

    step: int
    total_steps: Optional[int] = None
    epoch: Optional[float] = None
    loss: Optional[float] = None
    learning_rate: Optional[float] = None
    gradient_norm: Optional[float] = None
    tokens_per_second: Optional[float] = None
    remaining_seconds: Optional[float] = None


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation."""

    name: str
    value: float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, after ``step`` optimizer steps."""

    step: int
    metrics: List[Metric] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: ``commit_time`` is RFC 3339 in UTC, ``size_bytes`` counts all objects."""

    step: int
    uri: str
    size_bytes: int
    commit_time: str


@dataclass(frozen=True)
class Saves:
    """How saving goes. Times are RFC 3339 in UTC.

    ``saving_step`` is staged and on its way to storage since ``saving_since``; ``put_off`` counts the saves in a row that were due
    while no staging buffer was free. From ``failing_since`` on nothing could be committed, for ``reason`` (CamelCase) and ``message``.
    ``stall_seconds`` is what training stood still for the newest save, ``total_stall_seconds`` for all of this generation,
    ``commit_seconds`` how long after it had begun the newest was committed.
    ``recommended_interval_seconds`` is what would lose least, by Young and Daly.
    """

    saving_step: Optional[int] = None
    saving_since: Optional[str] = None
    put_off: int = 0
    failing_since: Optional[str] = None
    reason: str = ""
    message: str = ""
    stall_seconds: Optional[float] = None
    commit_seconds: Optional[float] = None
    recommended_interval_seconds: Optional[float] = None
    total_stall_seconds: Optional[float] = None


@dataclass(frozen=True)
class Resumed:
    """Where this generation starts: after ``step``. ``fallback`` tells why newer checkpoints could not be used, if there were any.

    ``rollbacks`` counts how often the job went back because its numbers were not finite or jumped, and ``skipped_samples`` what it left out.
    """

    step: int
    source: ResumeSource
    fallback: str = ""
    skipped_samples: int = 0
    rollbacks: int = 0


@dataclass(frozen=True)
class Model:
    """The result, in Hugging Face layout."""

    uri: str


@dataclass(frozen=True)
class Memory:
    """What a container may use, and the most that it has; None: not known."""

    limit_bytes: Optional[int] = None
    peak_bytes: Optional[int] = None


@dataclass(frozen=True)
class Exit:
    """The end of one worker (or of the launcher itself: ``rank`` -1).

    ``exit_code`` is None when ``signal`` ended it. ``message`` is the error's last line, ``log_tail`` the last lines printed. ``memory``
    is set when the kernel ended it for want of memory.
    """

    generation: int
    rank: int
    exit_code: Optional[int] = None
    signal: Optional[int] = None
    message: str = ""
    log_tail: str = ""
    memory: Optional[Memory] = None


@dataclass(frozen=True)
class Report:
    """What one agent is and has seen.

    ``instance`` changes when the agent process does. ``generation`` is the newest it started, 0 before the first. ``address`` and
    ``port`` are where this pod would host a generation's rendezvous; the port is one that the agent found free. ``leaving`` tells that it was
    told to go, and starts nothing any more. ``number`` rises with each report of an instance: what a network has held back comes after what
    was said later. 0: not counted.
    """

    pod_uid: str
    instance: str
    agent_version: str
    generation: int
    state: AgentState
    address: str
    port: int
    protocol: int = PROTOCOL_VERSION
    heartbeat: Optional[Heartbeat] = None
    progress: Optional[Progress] = None
    evaluation: Optional[Evaluation] = None
    checkpoint: Optional[Checkpoint] = None
    saves: Optional[Saves] = None
    resumed: Optional[Resumed] = None
    model: Optional[Model] = None
    exits: List[Exit] = field(default_factory=list)
    stalled: Optional[Stalled] = None
    paces: List[Pace] = field(default_factory=list)
    leaving: bool = False
    number: int = 0


@dataclass(frozen=True)
class CheckpointWish:
    """When to commit checkpoints, how many to keep, how fast to upload them: what each generation takes as it is when it starts.

    At most one of the intervals is set. ``keep_best`` names a metric of the recipe's evaluation: the best checkpoint by it is kept too.
    ``upload_bytes_per_second`` bounds what one pod uploads.
    """

    interval_steps: Optional[int] = None
    interval_seconds: Optional[int] = None
    interval_auto: bool = False
    keep: int = 2
    keep_best: Optional[str] = None
    upload_bytes_per_second: Optional[int] = None


@dataclass(frozen=True)
class Order:
    """What one agent should be doing. The fields after ``generation`` matter for ``Run`` only.

    ``rank`` is the node's rank among ``nodes``; workers get global ranks ``rank * processes_per_node + local rank``. ``hang_seconds`` is
    how long training workers may at least be silent; 0: for ever, whatever they do. ``has_checkpoint`` says that the job has committed one.
    ``checkpoint`` takes the place of what the job's file wishes; None: as in the file.
    """

    action: Action
    generation: int = 0
    rank: int = 0
    nodes: int = 0
    processes_per_node: int = 1
    master_address: str = ""
    master_port: int = 0
    grace_seconds: int = 0
    protocol: int = PROTOCOL_VERSION
    hang_seconds: int = 60
    has_checkpoint: bool = False
    checkpoint: Optional[CheckpointWish] = None


@dataclass(frozen=True)
class Beat:
    """One datagram of a worker. Exactly the member that ``kind`` names is set."""

    kind: BeatKind
    rank: int
    generation: int
    heartbeat: Optional[Heartbeat] = None
    progress: Optional[Progress] = None
    evaluation: Optional[Evaluation] = None
    checkpoint: Optional[Checkpoint] = None
    saves: Optional[Saves] = None
    resumed: Optional[Resumed] = None
    model: Optional[Model] = None
    failure: Optional[Exit] = None


@dataclass(frozen=True)
class JobStorage:
    """Where the job writes: ``prefix`` is ``s3://bucket/path`` of this job alone; no other place is written to."""

    prefix: str
    endpoint: Optional[str] = None


@dataclass(frozen=True)
class JobCheckpoint(CheckpointWish):
    """The wish as it was when the pods were made, and what they begin with: ``resume_from`` is ``s3://bucket/prefix[@step]`` of another job.

    No order brings that, since whether a job may read it is decided before its pods are made.
    """

    resume_from: Optional[str] = None


@dataclass(frozen=True)
class JobFile:
    """The contract values of one job, mounted as job.json. Workers get a copy with the ``checkpoint`` of their order.

    ``command`` is what each worker runs: empty for the recipe's trainer. ``job_server`` is ``https://host:port``.
    """

    namespace: str
    name: str
    uid: str
    job_server: str
    command: List[str] = field(default_factory=list)
    storage: Optional[JobStorage] = None
    checkpoint: JobCheckpoint = field(default_factory=JobCheckpoint)


def to_wire(value: Any) -> Any:
    """Return a message as plain JSON values under camelCase names, without fields that are unset (``None``)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        members = ((f.on_wire, getattr(value, f.name)) for f in _fields(type(value)))
        return {name: to_wire(member) for name, member in members if member is not None}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [to_wire(item) for item in value]
    return value


def from_wire(kind: Type[T], value: Any, path: str = "$") -> T:
    """Return the message of type ``kind`` that plain JSON values describe.

    Raises:
        ValueError: a field is missing or of the wrong type; the message names its path.
    """
    if not isinstance(value, dict):
        raise ValueError(path + ": must be an object")
    members: Dict[str, Any] = {}
    for f in _fields(kind):  # type: ignore[arg-type]
        if value.get(f.on_wire) is not None:
            members[f.name] = _read(f.hint, value[f.on_wire], path + "." + f.on_wire)
        elif f.is_required:
            raise ValueError(path + "." + f.on_wire + ": is missing")
    return kind(**members)


@dataclass(frozen=True)
class _Field:
    name: str
    on_wire: str
    hint: Any
    is_required: bool


@functools.lru_cache(maxsize=None)
def _fields(kind: Type[Any]) -> Tuple[_Field, ...]:
    """Looked up once for each type of message: types take longer to read than messages."""
    hints = typing.get_type_hints(kind)
    missing = dataclasses.MISSING
    return tuple(
        _Field(f.name, _camel(f.name), hints[f.name], f.default is missing and f.default_factory is missing)
        for f in dataclasses.fields(kind)
    )


def _read(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Union:
        return _read(next(a for a in arguments if a is not type(None)), value, path)
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(path + ": must be a list")
        return [_read(arguments[0], item, path + "[" + str(i) + "]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(hint):
        return from_wire(typing.cast("type", hint), value, path)
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            allowed = ", ".join(str(member.value) for member in hint)
            raise ValueError(path + ": must be one of " + allowed) from None
    return _read_scalar(hint, value, path)


def _read_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(path + ": must be of type " + hint.__name__)
    if hint is float and (value != value or value in (float("inf"), float("-inf"))):
        raise ValueError(path + ": must be a finite number")
    return value


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)
