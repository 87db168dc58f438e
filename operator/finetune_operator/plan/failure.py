"""Why a gang failed: what is known of its members becomes failures, and one of them is the cause.

When a rank dies its peers fail within milliseconds on broken collectives, and an echo may well be heard before its cause. So causes
are ranked by class first (``FailureClass`` is ordered, strongest last), and a weak one is believed only after the others had a moment to
report (``SETTLE_SECONDS``). A failure that itself speaks of a broken collective, be it an exception or an abort of the library's own
threads, is the weakest of all: it is believed only when nothing better has come for longer than any agent needs to report.

That the workers have saved and left because they were asked to outranks whatever became of their pods: nothing is lost. It is no end
before all members have done so (see ``leaving``).
"""

import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import IntEnum

from finetune_api.contract import TRAINER_CONTAINER, ExitCode
from finetune_api.protocol import AgentState, Exit, Memory, Report
from finetune_api.status import Gang, Member
from finetune_operator.plan.devices import device_error
from finetune_operator.plan.leaving import SAVE_SECONDS, has_ended, leaving_members, look_again_seconds, may_still_save
from finetune_operator.plan.observation import Heard, Observation, soonest
from finetune_operator.plan.silence import NODE_LOST, find_loss
from finetune_operator.plan.starting import NOT_STARTED, START_SECONDS, seconds_to_start, start_look_again_seconds
from finetune_operator.views import PodView

SETTLE_SECONDS = 1.0
ECHO_SECONDS = 5.0
# How gloo, NCCL, torch's stores and process groups name themselves when a peer is gone.
_COLLECTIVE = re.compile(
    r"\bgloo(/|::| connect)|NCCL (error|operation|communicator|watchdog)|nccl\w+Error|\bc10d\b|TCPStore|ProcessGroup"
    r"|Dist(Backend|Network|Store)Error",
    re.IGNORECASE,
)
DEVICE_ERROR = "DeviceError"


class FailureClass(IntEnum):
    """How telling a failure is of its cause, weakest first."""

    ECHO = 0  # a collective broke: hardly ever the cause
    ERROR = 1  # a Python error: the cause, or the echo of a peer's death
    SIGNAL = 2
    KNOWN = 3  # the trainer said why
    DEVICE = 4  # a device of the pod's node is broken
    POD = 5  # the pod went away, or its node
    MEMORY = 6
    SAVED = 7  # asked to stop, and nothing is lost
    TERMINAL = 8  # starting again cannot help


@dataclass(frozen=True, slots=True)
class Failure:
    """One member's failure, as users will read it in ``status.attempts``."""

    failure_class: FailureClass
    reason: str
    message: str
    pod: str
    heard_at: datetime
    node: str = ""
    rank: int | None = None
    exit_code: int | None = None
    signal: int | None = None


_BY_EXIT_CODE: dict[int, tuple[FailureClass, str]] = {
    ExitCode.BAD_DATA: (FailureClass.TERMINAL, "BadData"),
    ExitCode.BAD_CONFIG: (FailureClass.TERMINAL, "BadConfig"),
    ExitCode.NUMERIC: (FailureClass.TERMINAL, "NumericFailure"),
    ExitCode.NO_PERMISSION: (FailureClass.KNOWN, "NoPermission"),
    ExitCode.STORAGE_UNAVAILABLE: (FailureClass.KNOWN, "StorageUnavailable"),
    ExitCode.CHECKPOINTS_LOST: (FailureClass.KNOWN, "CheckpointsLost"),
    ExitCode.WRONG_WORLD: (FailureClass.KNOWN, "WrongWorldSize"),
    ExitCode.STALE: (FailureClass.KNOWN, "Stale"),
    ExitCode.PORT_IN_USE: (FailureClass.KNOWN, "PortInUse"),
    ExitCode.ROLLED_BACK: (FailureClass.KNOWN, "RolledBack"),
    ExitCode.SAVED: (FailureClass.SAVED, "Preempted"),
}


def find_cause(observed: Observation, gang: Gang) -> tuple[Failure | None, float | None]:
    """Return the failure that ended the gang, or None and, when one may be about to show, in how many seconds to look again."""
    failures = list(gang_failures(observed, gang))
    if not failures:
        return None, soonest(look_again_seconds(observed, gang), start_look_again_seconds(observed, gang))
    remaining = _seconds_to_save(observed, gang, failures)
    if remaining > 0:
        return None, remaining
    failures += [_lost_pod(observed, observed.pod(member.uid), member) for member in leaving_members(observed, gang)]
    cause = max(failures, key=lambda failure: (failure.failure_class, -failure.heard_at.timestamp()))
    remaining = _seconds_to_settle(observed, gang, failures, cause)
    if remaining > 0:
        return None, remaining
    return _named_after_its_pod(observed, gang, cause), None


def _seconds_to_save(observed: Observation, gang: Gang, failures: Sequence[Failure]) -> float:
    """Return for how long those that have saved may wait for the others: a pod that is gone was done, any other failure ends it."""
    saved = [failure for failure in failures if failure.failure_class == FailureClass.SAVED]
    undisturbed = all(failure.failure_class in (FailureClass.SAVED, FailureClass.POD) for failure in failures)
    if not saved or not undisturbed or all(has_ended(observed, gang, member) for member in gang.members):
        return 0.0
    return _seconds_left(observed, saved, SAVE_SECONDS)


def _seconds_to_settle(observed: Observation, gang: Gang, failures: Sequence[Failure], cause: Failure) -> float:
    """Return how long a better cause may still show."""
    if cause.failure_class == FailureClass.ECHO and not all(has_ended(observed, gang, m) for m in gang.members):
        return _seconds_left(observed, failures, ECHO_SECONDS)
    if len(failures) < gang.nodes and cause.failure_class <= FailureClass.SIGNAL:
        return _seconds_left(observed, failures, SETTLE_SECONDS)
    return 0.0


def _seconds_left(observed: Observation, failures: Sequence[Failure], seconds: float) -> float:
    first_heard = min(failure.heard_at for failure in failures)
    return (first_heard + timedelta(seconds=seconds) - observed.now).total_seconds()


def _named_after_its_pod(observed: Observation, gang: Gang, cause: Failure) -> Failure:
    """Tell a save by the pod for which it was made, not by the first that was done with it."""
    if cause.failure_class != FailureClass.SAVED:
        return cause
    for member in gang.members:
        pod = observed.pod(member.uid)
        if pod is None or not pod.usable:
            lost = _lost_pod(observed, pod, member)
            return replace(
                cause, message=f"{lost.message}; the workers have saved", pod=lost.pod, node=lost.node, rank=None
            )
    return cause


def gang_failures(observed: Observation, gang: Gang) -> Iterable[Failure]:
    """Return the failure of each member that has one."""
    for member in gang.members:
        failure = _member_failure(observed, gang, member)
        if failure is not None:
            yield failure


def _member_failure(observed: Observation, gang: Gang, member: Member) -> Failure | None:
    pod, heard = observed.pod(member.uid), observed.heard.get(member.uid)
    said = observed.said(gang, member)
    if said and said.state == AgentState.SUCCEEDED:
        return None
    killed = _out_of_memory(observed, pod)
    if killed is not None and said is not None and said.state == AgentState.FAILED and _was_killed(said):
        return killed
    lost = _lost(observed, gang, pod, member)
    if heard and said and said.state in (AgentState.FAILED, AgentState.STOPPED):
        reported = _reported(pod, member, heard, said)
        if said.state != AgentState.STOPPED or reported.failure_class == FailureClass.SAVED:
            return reported
        if lost is None and said.leaving:  # the agent knows of its pod's end before we do
            lost = _lost_pod(observed, pod, member)
        return lost or reported  # how workers end that do not save says nothing
    if may_still_save(observed, gang, member):
        return None
    return lost or _not_started(observed, gang, pod, member)


def _not_started(observed: Observation, gang: Gang, pod: PodView | None, member: Member) -> Failure | None:
    left = seconds_to_start(observed, gang, member)
    if pod is None or left is None or left > 0:
        return None
    message = (
        f"the agent of pod {pod.name} (rank {member.rank}) is heard, and has not started generation {gang.generation} within "
        f"{START_SECONDS:.0f} s: most often a process of the one before cannot be killed, for it hangs in a driver or a file system"
    )
    return Failure(FailureClass.POD, NOT_STARTED, message, pod=pod.name, heard_at=observed.now, node=pod.node)


def _out_of_memory(observed: Observation, pod: PodView | None) -> Failure | None:
    for container in pod.containers if pod else ():
        if container.name == TRAINER_CONTAINER and "OOMKilled" in (container.exit_reason, container.last_exit_reason):
            assert pod is not None
            limit = pod.memory_limit  # the operator writes it in bytes; others may write it as they like
            limit = _gibibytes(int(limit)) if limit.isdigit() else limit
            return Failure(
                failure_class=FailureClass.MEMORY,
                reason="OutOfMemory",
                message=f"pod {pod.name} was killed at its memory limit{_of(limit)}; raise workers.resources.memory",
                pod=pod.name,
                node=pod.node,
                heard_at=observed.now,
                exit_code=container.exit_code or container.last_exit_code,
            )
    return None


def _was_killed(said: Report) -> bool:
    """Tell whether a worker was killed as the kernel kills, or the agent was: a container keeps OOMKilled as its last state for ever.

    Whatever ends a worker later, a peer's death by way of NCCL's SIGABRT for one, must not be taken for that.
    """
    ends = [end for end in said.exits if end.generation == said.generation]
    return not ends or any(end.exit_code is None and end.signal in (None, signal.SIGKILL) for end in ends)


def _reported(pod: PodView | None, member: Member, heard: Heard, said: Report) -> Failure:
    ends = [end for end in said.exits if end.generation == said.generation]
    failures = [_from_exit(pod, member, heard, end) for end in ends if end.exit_code != 0]
    if not failures:
        return Failure(
            failure_class=FailureClass.ERROR,
            reason="WorkerFailed",
            message=f"the agent of pod {member.pod} reports {said.state.value} and no reason",
            pod=member.pod,
            node=pod.node if pod else "",
            heard_at=heard.since,
        )
    return max(failures, key=lambda failure: failure.failure_class)


def _from_exit(pod: PodView | None, member: Member, heard: Heard, end: Exit) -> Failure:
    if end.memory is not None:
        return _killed_for_memory(pod, member, heard, end, end.memory)
    if _is_echo(end):
        failure_class, reason = FailureClass.ECHO, "CollectiveFailed"
    elif end.signal is not None:
        failure_class, reason = FailureClass.SIGNAL, "WorkerKilled"
    else:
        failure_class, reason = _BY_EXIT_CODE.get(end.exit_code or 0, (FailureClass.ERROR, "WorkerFailed"))
    if end.signal is not None:
        how = f"by signal {_signal_name(end.signal)}"
    else:
        how = "without an exit code" if end.exit_code is None else f"with exit code {end.exit_code}"
    broken = device_error(end) if failure_class < FailureClass.DEVICE else None
    if broken is not None:
        failure_class, reason, end = FailureClass.DEVICE, DEVICE_ERROR, replace(end, message=broken)
    who = f"rank {end.rank}" if end.rank >= 0 else "the launcher"
    message = end.message if failure_class >= FailureClass.KNOWN and end.message else f"{who} ended {how}"
    if end.message and message != end.message:
        message += f": {end.message}"
    return Failure(
        failure_class=failure_class,
        reason=reason,
        message=message,
        pod=member.pod,
        node=pod.node if pod else "",
        heard_at=heard.since,
        rank=end.rank if end.rank >= 0 else None,
        exit_code=end.exit_code,
        signal=end.signal,
    )


def _killed_for_memory(pod: PodView | None, member: Member, heard: Heard, end: Exit, memory: Memory) -> Failure:
    peak = "" if memory.peak_bytes is None else f"; its peak was {_gibibytes(memory.peak_bytes)}"
    limit = "" if memory.limit_bytes is None else _of(_gibibytes(memory.limit_bytes))
    return Failure(
        failure_class=FailureClass.MEMORY,
        reason="OutOfMemory",
        message=f"rank {end.rank} was killed at the memory limit of pod {member.pod}{limit}{peak}; raise workers.resources.memory",
        pod=member.pod,
        node=pod.node if pod else "",
        heard_at=heard.since,
        rank=end.rank,
        exit_code=end.exit_code,
        signal=end.signal,
    )


def _of(quantity: str) -> str:
    return f" of {quantity}" if quantity else ""


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _is_echo(end: Exit) -> bool:
    """Tell whether a worker ended over a broken collective: by an exception that says so, or by an abort after such words."""
    if end.signal == signal.SIGABRT:
        return _COLLECTIVE.search(f"{end.message}\n{end.log_tail}") is not None
    return end.exit_code == ExitCode.ERROR and _COLLECTIVE.search(end.message) is not None


def lost_before_start(observed: Observation, gang: Gang, chosen: Mapping[int, PodView]) -> Failure | None:
    """Return the failure of a pod made for this very generation that was lost before the gang was complete.

    Its name is taken for as long as it exists, so its replacement needs the next generation.
    """
    for pod in observed.pods:
        if pod.generation == gang.generation and pod.rank < gang.nodes and pod.rank not in chosen:
            lost = _lost(observed, gang, pod, Member(rank=pod.rank, pod=pod.name, uid=pod.uid))
            if lost is not None:
                return lost
    return None


def _lost(observed: Observation, gang: Gang, pod: PodView | None, member: Member) -> Failure | None:
    """Return the failure of a member that has lost its pod, or whose pod is there and lost all the same."""
    if pod is None or not pod.usable:
        return _lost_pod(observed, pod, member)
    loss = find_loss(observed, gang, pod)
    if loss is None:
        return None
    message = f"{loss.message} (rank {member.rank})"
    return Failure(FailureClass.POD, loss.reason, message, pod=pod.name, heard_at=observed.now, node=pod.node)


def _lost_pod(observed: Observation, pod: PodView | None, member: Member) -> Failure:
    """Return the failure of a member whose pod is gone, has ended or is being deleted."""
    reason, message = "PodDeleted", f"pod {member.pod} (rank {member.rank}) was deleted"
    if pod is not None and pod.node_lost:
        reason, message = NODE_LOST, f"pod {pod.name} (rank {member.rank}) is on node {pod.node}, which is not ready"
    elif pod is not None and pod.disruption:
        reason, message = "Preempted", f"pod {pod.name} (rank {member.rank}) was disrupted: {pod.disruption}"
    elif pod is not None and pod.ended and not pod.deleting:
        said = next((c.exit_message for c in pod.containers if c.exit_message), pod.message)
        reason, message = (
            "PodFailed",
            f"pod {pod.name} (rank {member.rank}) ended: {pod.reason or pod.phase} {said}".strip(),
        )
    return Failure(
        failure_class=FailureClass.POD,
        reason=reason,
        message=message,
        pod=member.pod,
        node=pod.node if pod else "",
        heard_at=observed.now,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
