"""Which lines of which pods belong to a rank, or to an attempt.

A pod lives through several incarnations of its gang, so its log has all of them, one after the other, and an attempt is cut out by time:
from when its members were committed until those of the next one were. A pod that was replaced has taken its log with it.

The agent writes ``[rank N] `` before each line of a worker; what has no such mark is the agent's own. Pods stamp lines with the clocks of
their nodes, so lines of different nodes are in order as far as those agree.
"""

import heapq
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from finetune_api import contract
from finetune_client.errors import ClientError
from finetune_client.job import Job

_RANK = re.compile(r"\[rank (\d+)\] ")
EVER, NEVER = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


class TooEarly(ClientError):
    """A pod has no log, for its container has not started."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of a job. ``node_rank`` is its place in the gang, or the one that it was made for."""

    name: str
    uid: str
    node_rank: int
    created: str
    restarted: bool

    @classmethod
    def read(cls, body: dict[str, Any], job: Job) -> Self:
        """Return a pod; a spare that has taken a lost rank's place has that rank."""
        metadata, gang = body["metadata"], job.status.gang
        members = {member.uid: member.rank for member in [*gang.stand_ins, *gang.members]} if gang else {}
        containers = (body.get("status") or {}).get("containerStatuses") or ()
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            node_rank=members.get(metadata["uid"], int(metadata["labels"].get(contract.RANK_LABEL, "0"))),
            created=metadata["creationTimestamp"],
            restarted=any(c["name"] == contract.TRAINER_CONTAINER and c.get("restartCount") for c in containers),
        )


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a pod. ``rank`` is that of the worker that printed it; None: the pod's agent did."""

    time: datetime
    pod: Pod
    rank: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Span:
    """From a time on, until right before another."""

    start: datetime = EVER
    end: datetime = NEVER


def parse_line(line: str, pod: Pod) -> Line:
    """Return a line that the kubelet has stamped. One without a stamp is a word of the kubelet's own."""
    stamp, _, text = line.partition(" ")
    try:
        time = datetime.fromisoformat(stamp)
    except ValueError:
        time, text = EVER, line
    said = _RANK.match(text)
    return Line(time, pod, int(said[1]) if said else None, text[said.end() :] if said else text)


def merged(logs: Iterable[Iterable[Line]]) -> Iterator[Line]:
    """Yield the lines of all logs in the order of their times."""
    return heapq.merge(*logs, key=lambda line: line.time)


def span_of(job: Job, attempt: int) -> Span:
    """Return when an attempt (the number of its generation) was.

    Raises:
        ClientError: the job has no such attempt, or no longer says when it was.
    """
    starts = {ended.generation: ended.start_time for ended in job.status.attempts}
    if job.status.gang is not None:
        starts.setdefault(job.status.gang.generation, job.status.gang.start_time)
    if attempt not in starts:
        known = ", ".join(str(generation) for generation in sorted(starts)) or "none"
        raise ClientError(f"{job.name}: attempt {attempt} is not among those that status tells of: {known}")
    before = [ended.end_time for ended in job.status.attempts if ended.generation < attempt]
    after = [start for generation, start in sorted(starts.items()) if generation > attempt and start]
    start = starts[attempt] or (before[-1] if before else None)
    return Span(
        datetime.fromisoformat(start) if start else EVER,
        datetime.fromisoformat(after[0]) if after else NEVER,
    )


def wanted(rank: int | None, span: Span) -> Callable[[Line], bool]:
    """Return the test for lines of a rank (None: of all, and of the agents) in a span."""
    return lambda line: (rank is None or line.rank == rank) and span.start <= line.time < span.end
