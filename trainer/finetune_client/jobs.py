"""What can be done with the jobs of a namespace."""

import difflib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from finetune_api import contract
from finetune_api.status import ConditionType
from finetune_client.connection import JOBS, Connection, Json, path
from finetune_client.errors import ClientError, EndedOtherwise, Exists, NoCluster, NotFound, Refused, TimedOut
from finetune_client.job import Job
from finetune_client.logs import Line, Pod, TooEarly, parse_line
from finetune_client.manifest import Manifest, located

PAGE_SIZE = 500
WATCH_SECONDS = 60
PATIENCE_SECONDS = 300.0
"""For how long somebody who waits for a job bears an API server that is away: training goes on meanwhile."""
LOOK_AGAIN_SECONDS = 2.0
MERGE_PATCH = "application/merge-patch+json"
CORE = "/api/v1"


class Goal(StrEnum):
    """What can be waited for."""

    COMPLETE = "complete"
    FAILED = "failed"
    ENDED = "ended"
    RUNNING = "running"
    SUSPENDED = "suspended"

    def reached(self, job: Job) -> bool:
        """Tell whether a job is so. Of one that has not ended, only what is said of its newest spec counts."""
        if self is Goal.COMPLETE:
            return job.holds(ConditionType.COMPLETE)
        if self is Goal.FAILED:
            return job.holds(ConditionType.FAILED)
        if self is Goal.ENDED:
            return job.is_final
        suspended = job.holds(ConditionType.SUSPENDED)
        at_rest = job.is_seen and not job.is_final and job.holds(ConditionType.READY)
        return at_rest and suspended == (self is Goal.SUSPENDED)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that Kubernetes says of a job or of one of its pods. ``time`` is RFC 3339, of the newest of ``count`` alike."""

    time: str
    type: str
    reason: str
    object: str
    message: str
    count: int


class Jobs:
    """The jobs of one namespace. Every method raises ``finetune_client.errors``."""

    def __init__(self, connection: Connection, namespace: str | None = None) -> None:
        self._connection = connection
        self.namespace = namespace or connection.namespace

    @classmethod
    def connect(
        cls, *, namespace: str | None = None, context: str | None = None, kubeconfig: str | None = None
    ) -> Self:
        """Log in as kubectl would, or, in a pod, as its service account. Nothing is sent yet."""
        return cls(Connection.open(kubeconfig=kubeconfig, context=context), namespace)

    def of(self, namespace: str) -> "Jobs":
        """Return the same for another namespace."""
        return Jobs(self._connection, namespace)

    def submit(self, manifest: Manifest, *, dry_run: bool = False) -> Job:
        """Create a job; ``dry_run``: have the API server check it only. What it says of fields is told with their lines."""
        namespace = manifest.namespace or self.namespace
        query = {"fieldManager": "finetune-client", "fieldValidation": "Strict"} | (
            {"dryRun": "All"} if dry_run else {}
        )
        try:
            body = self._connection.request("POST", self._path(namespace=namespace), query=query, body=manifest.body)
        except Exists as error:
            raise Exists(f"{namespace}/{manifest.name} exists already; what may change of it: kubectl apply") from error
        except Refused as error:
            raise Refused(str(error), [located(fault, manifest) for fault in error.faults]) from error
        return Job.read(body)

    def get(self, name: str) -> Job:
        """Return one job."""
        try:
            return Job.read(self._connection.request("GET", self._path(name)))
        except NotFound as error:
            raise NotFound(self._not_found(name)) from error

    def list(self, *, all_namespaces: bool = False) -> Sequence[Job]:
        """Return all jobs, by namespace and name."""
        where = path(JOBS, None if all_namespaces else self.namespace, contract.PLURAL)
        jobs = [Job.read(item) for item in self._items(where)]
        return sorted(jobs, key=lambda job: (job.namespace, job.name))

    def suspend(self, name: str) -> Job:
        """Have a job save and give its pods back."""
        return self._set_suspend(name, wanted=True)

    def resume(self, name: str) -> Job:
        """Have a suspended job go on."""
        return self._set_suspend(name, wanted=False)

    def changes(self, name: str, *, until: float | None = None) -> Iterator[Job]:
        """Yield a job as it is, and again whenever it changes, at least once a minute, for ever; ``until`` by ``time.monotonic``.

        An API server that goes away is borne for ``PATIENCE_SECONDS``. Raises ``NotFound`` when the job is deleted.
        """
        job, heard_at = self.get(name), time.monotonic()
        yield job
        uid = job.metadata.uid
        while True:
            seconds = WATCH_SECONDS if until is None else max(1, min(WATCH_SECONDS, int(until - time.monotonic()) + 1))
            began = time.monotonic()
            try:
                with suppress(
                    NoCluster
                ):  # a watch may break off at any time; the look behind it tells whether anybody is there
                    for newer in self._watch(job, seconds):
                        job, heard_at = newer, time.monotonic()
                        yield job
                job, heard_at = self.get(name), time.monotonic()
            except NoCluster:
                if time.monotonic() - heard_at > PATIENCE_SECONDS:
                    raise
            if job.metadata.uid != uid:
                raise NotFound(f"{self.namespace}/{name} was deleted; there is another one of that name")
            yield job
            if time.monotonic() - began < 1.0:  # nobody watches for us now: do not ask without a pause
                time.sleep(LOOK_AGAIN_SECONDS)

    def wait(self, name: str, goal: Goal, *, timeout_seconds: float | None = None) -> Job:
        """Wait until a job is as wanted, and return it."""
        return deque(self.progress(name, goal, timeout_seconds=timeout_seconds), maxlen=1)[0]

    def progress(self, name: str, goal: Goal, *, timeout_seconds: float | None = None) -> Iterator[Job]:
        """Yield a job whenever it changes, until it is as wanted.

        Raises:
            EndedOtherwise: it never will be.
            TimedOut: it is not yet.
        """
        until = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        for job in self.changes(name, until=until):
            yield job
            if goal.reached(job):
                return
            if job.is_final:
                raise EndedOtherwise(f"{job.namespace}/{name} has ended: {_ending(job)}")
            if until is not None and time.monotonic() >= until:
                raise TimedOut(
                    f"{job.namespace}/{name} is not {goal.value} after {timeout_seconds:g} s: {_ending(job)}"
                )

    def events(self, job: Job) -> Sequence[Event]:
        """Return what Kubernetes says of a job and its pods, oldest first. It forgets events after about an hour."""
        uid, pods = job.metadata.uid, f"{job.name}-{job.metadata.uid[:5]}-"
        items = self._items(path(CORE, job.namespace, "events"))
        about = [(item, item.get("involvedObject") or {}) for item in items]
        own = [
            _event(item, subject)
            for item, subject in about
            if subject.get("uid") == uid or (subject.get("kind") == "Pod" and subject.get("name", "").startswith(pods))
        ]
        return sorted(own, key=lambda event: event.time)

    def pods(self, job: Job) -> Sequence[Pod]:
        """Return the pods of a job that are still there, by node rank, then by age."""
        query = {"labelSelector": f"{contract.JOB_UID_LABEL}={job.metadata.uid}"}
        pods = [Pod.read(item, job) for item in self._items(path(CORE, job.namespace, "pods"), query)]
        return sorted(pods, key=lambda pod: (pod.node_rank, pod.created, pod.name))

    def log(self, job: Job, pod: Pod, *, follow: bool = False, tail: int | None = None) -> Iterator[Line]:
        """Yield the lines of a pod, those of its container before the last restart first, if the node still has them.

        Raises:
            TooEarly: its container has not started yet.
        """
        if pod.restarted and tail is None:
            with suppress(TooEarly):
                yield from self._log(job, pod, {"previous": "true"})
        query = ({"follow": "true"} if follow else {}) | ({} if tail is None else {"tailLines": str(tail)})
        yield from self._log(job, pod, query)

    def _log(self, job: Job, pod: Pod, query: Json) -> Iterator[Line]:
        query = {"container": contract.TRAINER_CONTAINER, "timestamps": "true"} | query
        where = path(CORE, job.namespace, "pods", pod.name, "log")
        try:
            for line in self._connection.lines(where, query=query):
                yield parse_line(line.decode("utf-8", "replace"), pod)
        except (Refused, NotFound) as error:
            raise TooEarly(f"pod {pod.name} has no log: {error}") from error

    def _watch(self, job: Job, seconds: int) -> Iterator[Job]:
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={job.name}",
            "resourceVersion": job.metadata.resource_version,
            "timeoutSeconds": str(seconds),
        }
        for line in self._connection.lines(self._path(), query=query, silent_seconds=seconds + 10.0):
            try:
                event = json.loads(line)
            except ValueError:
                return  # half of one: the server goes
            if event["type"] == "DELETED":
                raise NotFound(f"{self.namespace}/{job.name} was deleted")
            if event["type"] not in ("ADDED", "MODIFIED"):
                return  # too old a version: look again
            yield Job.read(event["object"])

    def _set_suspend(self, name: str, *, wanted: bool) -> Job:
        job = self.get(name)
        if job.is_final:
            raise Refused(f"{self.namespace}/{name} has ended: {_ending(job)}; a new job continues it")
        if bool(job.spec.get("suspend")) == wanted:
            return job
        body = {"metadata": {"uid": job.metadata.uid}, "spec": {"suspend": wanted}}
        query = {"fieldManager": "finetune-client"}
        return Job.read(
            self._connection.request("PATCH", self._path(name), query=query, body=body, content_type=MERGE_PATCH)
        )

    def _items(self, where: str, query: dict[str, str] | None = None) -> Iterator[Json]:
        query = {"limit": str(PAGE_SIZE)} | (query or {})
        while True:
            page = self._connection.request("GET", where, query=query)
            yield from page["items"]
            if not page["metadata"].get("continue"):
                return
            query["continue"] = page["metadata"]["continue"]

    def _path(self, name: str = "", *, namespace: str | None = None) -> str:
        return path(JOBS, namespace or self.namespace, contract.PLURAL, name)

    def _not_found(self, name: str) -> str:
        """Return the message, with names that are like this one where we may see them."""
        message = f"there is no job {name!r} in namespace {self.namespace!r}"
        try:
            names = [job.name for job in self.list()]
        except ClientError:
            return message
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        if near:
            return f"{message}; did you mean {', '.join(near)}?"
        return message if names else f"{message}, and no other one either"


def _ending(job: Job) -> str:
    ready = job.condition(ConditionType.READY)
    return f"{ready.reason}: {ready.message}" if ready else "the operator has not looked at it yet"


def _event(item: Json, subject: Json) -> Event:
    series: dict[str, Any] = item.get("series") or {}
    metadata = item["metadata"]
    time = series.get("lastObservedTime") or item.get("lastTimestamp") or item.get("eventTime")
    time = datetime.fromisoformat(time or item.get("firstTimestamp") or metadata["creationTimestamp"])
    return Event(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ"),
        type=item.get("type", ""),
        reason=item.get("reason", ""),
        object=f"{subject.get('kind', '')}/{subject.get('name', '')}",
        message=item.get("message", ""),
        count=series.get("count") or item.get("count") or 1,
    )
