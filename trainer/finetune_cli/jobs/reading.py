"""``logs``: the lines of all ranks in the order of their times, each under its rank; or those of one rank, or of one attempt.

Followed, each pod is read by a thread of its own, and pods that come later are taken up as they come, until the job has ended. A log that
breaks off is taken up again behind the last line that was shown.
"""

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

from rich.text import Text

from finetune_cli.output import console, tell
from finetune_client import ClientError, Job, Jobs, NoCluster, NotFound
from finetune_client.jobs import LOOK_AGAIN_SECONDS, PATIENCE_SECONDS
from finetune_client.logs import EVER, Line, Pod, TooEarly, merged

MOST_PODS = 256
COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "red")
Choose = Callable[[Iterable[Line]], Iterable[Line]]


def show_logs(jobs: Jobs, job: Job, *, choose: Choose, tail: int | None, tagged: bool) -> None:
    """Print what there is; ``tail``: only the newest lines of each pod. One that cannot be read, on a lost node perhaps, hides no other.

    Raises:
        ClientError: no pod is left, there are too many to be read together, or not all could be read.
    """
    pods = _pods(jobs, job)
    if not pods:
        raise ClientError(f"{job.name} has no pods, and logs go with them; status tells how its attempts ended")
    line, unread = None, list[str]()
    for line in merged(_newest(choose(_read(jobs, job, pod, unread)), tail) for pod in pods):
        show_line(line, tagged=tagged)
    if unread:
        raise ClientError(f"not all could be read: {'; '.join(unread)}")
    if line is None:
        tell("nothing of it is left in the pods that are there")


def _newest(lines: Iterable[Line], tail: int | None) -> Iterable[Line]:
    return lines if tail is None else deque(lines, maxlen=tail)


def _read(jobs: Jobs, job: Job, pod: Pod, unread: list[str]) -> Iterable[Line]:
    try:
        yield from jobs.log(job, pod)
    except TooEarly as error:
        tell(str(error))
    except NoCluster as error:
        unread.append(f"pod {pod.name}: {error}")


def _pods(jobs: Jobs, job: Job) -> Sequence[Pod]:
    pods = jobs.pods(job)
    if len(pods) > MOST_PODS:
        raise ClientError(f"{job.name} has {len(pods)} pods; read them one by one: kubectl logs")
    return pods


def show_line(line: Line, *, tagged: bool) -> None:
    """Print one line as it is, under its rank or, if it is an agent's, its node's."""
    place = line.rank if line.rank is not None else line.pod.node_rank
    tag = f"[{'node' if line.rank is None else 'rank'} {place}] " if tagged else ""
    if tag and sys.stdout.isatty():
        console().print(Text(tag, style=COLOURS[place % len(COLOURS)]), end="")
        tag = ""
    sys.stdout.write(f"{tag}{line.text}\n")


class Follower:
    """Prints the logs of a job as they grow."""

    def __init__(self, jobs: Jobs, job: Job, *, choose: Choose, tail: int | None, tagged: bool) -> None:
        self._jobs, self._job, self._choose, self._tail, self._tagged = jobs, job, choose, tail, tagged
        self._lines: queue.SimpleQueue[Line | ClientError] = queue.SimpleQueue()
        self._readers: dict[str, threading.Thread] = {}
        self._cut_off: set[str] = set()  # pods whose reader did not come to the end of the log
        self._last_tries: set[str] = set()  # those that were read once more since the job has ended
        self._taken: dict[str, datetime] = {}  # by pod: the time of its newest line; written by its reader alone
        self._answered = time.monotonic()

    def show(self) -> None:
        """Print until the job has ended and all of it is read.

        Raises:
            ClientError: it is deleted, or the API server refuses, or stays away.
        """
        while not (self._look() and self._lines.empty()):
            self._print_for(LOOK_AGAIN_SECONDS)

    def _look(self) -> bool:
        """See to it that every pod is read, and tell whether the job has ended and all that there is was read."""
        try:
            ended = (job := self._jobs.get(self._job.name)).is_final
            if job.metadata.uid != self._job.metadata.uid:
                raise NotFound(f"{job.namespace}/{job.name} was deleted; there is another one of that name")
            self._job, self._answered = job, time.monotonic()
            reading = [self._is_being_read(job, pod, ended=ended) for pod in _pods(self._jobs, job)]
        except NoCluster:
            if time.monotonic() - self._answered > PATIENCE_SECONDS:
                raise
            return False
        return ended and not any(reading)

    def _is_being_read(self, job: Job, pod: Pod, *, ended: bool) -> bool:
        """Have a pod's log read, if there may be more of it. Once the job has ended what was cut off is tried once more."""
        reader = self._readers.get(pod.uid)
        if reader is not None and reader.is_alive():
            return True
        if ended and reader is not None:
            if pod.uid in self._last_tries or pod.uid not in self._cut_off:
                return False
            self._last_tries.add(pod.uid)
        self._cut_off.discard(pod.uid)
        self._readers[pod.uid] = threading.Thread(target=self._read, args=(job, pod), daemon=True)
        self._readers[pod.uid].start()
        return True

    def _read(self, job: Job, pod: Pod) -> None:
        newest = self._taken.get(pod.uid, EVER)
        try:
            tail = None if pod.uid in self._taken else self._tail
            for line in self._choose(self._jobs.log(job, pod, follow=True, tail=tail)):
                if line.time > newest:
                    self._lines.put(line)
                    self._taken[pod.uid] = line.time
        except (TooEarly, NoCluster):  # the next look begins again
            self._cut_off.add(pod.uid)
        except ClientError as error:
            self._lines.put(error)

    def _print_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                return
            if isinstance(line, ClientError):
                raise line
            show_line(line, tagged=self._tagged)
            if self._lines.empty():
                sys.stdout.flush()
