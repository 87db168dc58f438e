"""What the watches have seen of jobs and their pods, trimmed, in memory.

kopf emits no DELETED event for what vanished while a watch was down, so a cache fed by events alone keeps ghosts. ``sweep`` mends that:
a full list replaces everything that the cache already knew when the list was asked for. The other way round, a list or an answer that was
under way while the watch showed the end of an object must not bring it back: uids that are gone are remembered for two sweeps, and for longer
than any answer is under way.

Lists and the answers to our own writes know of versions that the watch must show soon after. Since when it has not is remembered for each
object, so a watch that is dead or late is noticed by what it fails to show.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NewType, TypeVar

from finetune_operator.views import PodView, pod_view

JobKey = NewType("JobKey", tuple[str, str])  # namespace, name
T = TypeVar("T")

REMEMBER_SECONDS = 120.0


@dataclass(slots=True)
class _Entry(Generic[T]):
    value: T
    version: str
    seen: int  # number of the sweep during which it was seen last
    unshown_since: float | None  # when this or an older version was got that the watch has not shown since


@dataclass(frozen=True, slots=True)
class _Gone:
    at: float
    sweep: int


class Cache:
    """Jobs by key, pods by uid and by the job that owns them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: dict[JobKey, _Entry[dict[str, Any]]] = {}
        self._pods: dict[str, _Entry[PodView]] = {}
        self._pods_of: defaultdict[str, set[str]] = defaultdict(set)
        self._sweep = 0
        self.is_synced = False  # whether all there is has been listed
        self._gone: dict[str, _Gone] = {}  # by uid

    def job(self, key: JobKey) -> dict[str, Any] | None:
        """Return the newest known state of a job, as the API server wrote it."""
        entry = self._jobs.get(key)
        return entry.value if entry else None

    def jobs(self) -> Iterable[dict[str, Any]]:
        """Return all jobs."""
        return [entry.value for entry in self._jobs.values()]

    def pods_of(self, job_uid: str) -> tuple[PodView, ...]:
        """Return the pods that a job owns, oldest first."""
        pods = [self._pods[uid].value for uid in self._pods_of.get(job_uid, ())]
        return tuple(sorted(pods, key=lambda pod: (pod.created, pod.name)))

    def pod(self, uid: str) -> PodView | None:
        """Return one pod."""
        entry = self._pods.get(uid)
        return entry.value if entry else None

    def most_nodes_lost(self) -> bool:
        """Tell whether of the nodes with pods more than one, and most, are not ready: the control plane may be what is cut off."""
        pods = [entry.value for entry in self._pods.values() if entry.value.node and not entry.value.ended]
        nodes = {pod.node for pod in pods}
        lost = len(nodes - {pod.node for pod in pods if not pod.node_lost})
        return lost > 1 and 2 * lost > len(nodes)

    def job_uids(self) -> set[str]:
        """Return the uids of all jobs."""
        return {entry.value["metadata"]["uid"] for entry in self._jobs.values()}

    def pod_uids(self) -> set[str]:
        """Return the uids of all pods."""
        return set(self._pods)

    def member_uids(self) -> set[str]:
        """Return the uids of the members of all gangs, whose pods need not be there any more."""
        gangs = [entry.value["status"].get("gang") or {} for entry in self._jobs.values()]
        return {member["uid"] for gang in gangs for member in gang.get("members", ())}

    def unshown_seconds(self) -> float:
        """Return for how long the watches have been silent on what they should have shown; 0 when they have shown everything."""
        entries: list[_Entry[Any]] = [*self._jobs.values(), *self._pods.values()]
        since = [entry.unshown_since for entry in entries if entry.unshown_since is not None]
        return self._clock() - min(since) if since else 0.0

    def observe_job(self, body: Mapping[str, Any], *, deleted: bool = False, by_watch: bool = False) -> JobKey:
        """Take in what a watch, a list or an answer says of a job; only a newer version than the known one changes it."""
        key, metadata = job_key(body), body["metadata"]
        known = self._jobs.get(key)
        if deleted:
            self.forget_job(key, metadata["uid"])
        elif metadata["uid"] in self._gone:
            pass
        elif known is None or _is_newer(metadata["resourceVersion"], known.version):
            since = self._unshown_since(known, by_watch=by_watch)
            self._jobs[key] = _Entry(_trimmed(body), metadata["resourceVersion"], self._sweep, since)
        else:
            self._see_again(known, metadata["resourceVersion"], by_watch=by_watch)
        return key

    def observe_pod(self, body: Mapping[str, Any], *, deleted: bool = False, by_watch: bool = False) -> JobKey | None:
        """Take in what a watch, a list or an answer says of a pod, and return its job's key."""
        pod = pod_view(body)
        if pod is None:
            return None
        known = self._pods.get(pod.uid)
        if deleted:
            self.forget_pod(pod.uid)
        elif pod.uid in self._gone:
            pass
        elif known is None or _is_newer(pod.resource_version, known.version):
            since = self._unshown_since(known, by_watch=by_watch)
            self._pods[pod.uid] = _Entry(pod, pod.resource_version, self._sweep, since)
            self._pods_of[pod.job_uid].add(pod.uid)
        else:
            self._see_again(known, pod.resource_version, by_watch=by_watch)
        return JobKey((pod.namespace, pod.job))

    def forget_job(self, key: JobKey, uid: str) -> None:
        """Take in that a job is gone; another one of the same name stays."""
        self._gone[uid] = _Gone(self._clock(), self._sweep)
        known = self._jobs.get(key)
        if known and known.value["metadata"]["uid"] == uid:
            del self._jobs[key]

    def forget_pod(self, uid: str) -> None:
        """Take in that a pod is gone."""
        self._gone[uid] = _Gone(self._clock(), self._sweep)
        self._drop_pod(uid)

    def begin_sweep(self) -> None:
        """Call before asking for full lists."""
        self._sweep += 1

    def end_sweep(self, *, spared: Collection[str | None] = ()) -> set[JobKey]:
        """Call after taking full lists in; forgets what neither they nor a watch have shown since, and returns whose it was.

        What is in ``spared`` namespaces could not be listed, and stays as it was known.
        """
        self.is_synced = True
        touched: set[JobKey] = set()
        for key, job in list(self._jobs.items()):
            if job.seen < self._sweep and key[0] not in spared:
                del self._jobs[key]
                touched.add(key)
        for uid, pod in list(self._pods.items()):
            if pod.seen < self._sweep and pod.value.namespace not in spared:
                touched.add(JobKey((pod.value.namespace, pod.value.job)))
                self._drop_pod(uid)
        since = self._clock() - REMEMBER_SECONDS
        self._gone = {uid: gone for uid, gone in self._gone.items() if gone.sweep >= self._sweep - 1 or gone.at > since}
        return touched

    def _unshown_since(self, known: _Entry[Any] | None, *, by_watch: bool) -> float | None:
        """Return since when the watch owes an object of which there is a newer version."""
        if by_watch:
            return None
        return known.unshown_since if known is not None and known.unshown_since is not None else self._clock()

    def _see_again(self, known: _Entry[Any], version: str, *, by_watch: bool) -> None:
        """Take in that an object is there. A watch that shows an older version than the known one is late, and alive."""
        known.seen = self._sweep
        if by_watch and known.unshown_since is not None:
            known.unshown_since = None if version == known.version else self._clock()

    def _drop_pod(self, uid: str) -> None:
        entry = self._pods.pop(uid, None)
        if entry is not None:
            owned = self._pods_of[entry.value.job_uid]
            owned.discard(uid)
            if not owned:
                del self._pods_of[entry.value.job_uid]


def job_key(body: Mapping[str, Any]) -> JobKey:
    """Return the key of a job object."""
    return JobKey((body["metadata"]["namespace"], body["metadata"]["name"]))


def _trimmed(body: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {
        name: body["metadata"][name]
        for name in (
            "name",
            "namespace",
            "uid",
            "generation",
            "resourceVersion",
            "creationTimestamp",
            "deletionTimestamp",
        )
        if name in body["metadata"]
    }
    return {"metadata": metadata, "spec": body.get("spec", {}), "status": body.get("status") or {}}


def _is_newer(new: str, known: str) -> bool:
    """Tell whether a resource version is the newer one; they are ordered numbers, also between objects of one kind."""
    return int(new) > int(known)
