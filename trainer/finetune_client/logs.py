"""Which lines of which pods belong to a rank, or to an attempt.

A pod lives through several incarnations of its gang, so its log has all of them, one after the other. Its agent says when one begins, and lines
from then on are that one's; the times in status are too coarse for a gang that starts again within a second. A pod that was replaced has taken
its log with it.

The agent writes ``[rank N] `` before each line of a worker; what has no such mark is the agent's own. Pods stamp lines with the clocks of
their nodes, so lines of different nodes are in order as far as those agree.
"""

import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from finetune_api import contract
from finetune_client.errors import ClientError
from finetune_client.job import Job

_RANK = re.compile(r"\[rank (\d+)\] ")
_GENERATION = re.compile(contract.GENERATION_LINE.replace("%d", r"(\d+)").replace("%s", r"\w+") + r"\Z")
EVER = datetime.min.replace(tzinfo=UTC)


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


def chosen(lines: Iterable[Line], *, rank: int | None, attempt: int | None) -> Iterator[Line]:
    """Yield the lines of one pod that belong to a rank and to an attempt (the number of its generation); None: to any."""
    for line in lines if attempt is None else _of_attempt(lines, attempt):
        if rank is None or line.rank == rank:
            yield line


def _of_attempt(lines: Iterable[Line], attempt: int) -> Iterator[Line]:
    """What a pod says before its first attempt belongs to that."""
    before: list[Line] | None = []
    current = 0
    for line in lines:
        said = _GENERATION.search(line.text) if line.rank is None else None
        current = int(said[1]) if said else current
        if before is not None and not current:
            before.append(line)
            continue
        if current == attempt:
            yield from before or ()
            yield line
        before = None
