"""What the watches have seen of jobs and their pods, trimmed, in memory.

kopf emits no DELETED event for what vanished while a watch was down, so a cache fed by events alone keeps ghosts. ``sweep`` mends that:
a full list replaces everything that the cache already knew when the list was asked for.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NewType, TypeVar

from finetune_operator.views import PodView, pod_view

JobKey = NewType("JobKey", tuple[str, str])  # namespace, name
T = TypeVar("T")


@dataclass(slots=True)
class _Entry(Generic[T]):
    value: T
    seen: int  # number of the sweep during which it was seen last


class Cache:
    """Jobs by key, pods by uid and by the job that owns them."""

    def __init__(self) -> None:
        self._jobs: dict[JobKey, _Entry[dict[str, Any]]] = {}
        self._pods: dict[str, _Entry[PodView]] = {}
        self._pods_of: defaultdict[str, set[str]] = defaultdict(set)
        self._sweep = 0

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

    def pod_uids(self) -> set[str]:
        """Return the uids of all pods."""
        return set(self._pods)

    def observe_job(self, body: Mapping[str, Any], *, deleted: bool = False) -> JobKey:
        """Take in what a watch, a list or an answer says of a job; an older version than the known one changes nothing."""
        key = job_key(body)
        known = self._jobs.get(key)
        if deleted:
            if known and known.value["metadata"]["uid"] == body["metadata"]["uid"]:
                del self._jobs[key]
        elif known is None or not _is_older(body["metadata"], known.value["metadata"]):
            self._jobs[key] = _Entry(_trimmed(body), self._sweep)
        else:
            known.seen = self._sweep
        return key

    def observe_pod(self, body: Mapping[str, Any], *, deleted: bool = False) -> JobKey | None:
        """Take in what a watch, a list or an answer says of a pod, and return its job's key."""
        pod = pod_view(body)
        if pod is None:
            return None
        known = self._pods.get(pod.uid)
        if deleted:
            self._forget_pod(pod.uid)
        elif known is None or not _is_older(
            {"uid": pod.uid, "resourceVersion": pod.resource_version},
            {"uid": pod.uid, "resourceVersion": known.value.resource_version},
        ):
            self._pods[pod.uid] = _Entry(pod, self._sweep)
            self._pods_of[pod.job_uid].add(pod.uid)
        else:
            known.seen = self._sweep
        return JobKey((pod.namespace, pod.job))

    def begin_sweep(self) -> None:
        """Call before asking for full lists."""
        self._sweep += 1

    def end_sweep(self) -> set[JobKey]:
        """Call after taking full lists in; forgets what neither they nor a watch have shown since, and returns whose it was."""
        touched: set[JobKey] = set()
        for key, job in list(self._jobs.items()):
            if job.seen < self._sweep:
                del self._jobs[key]
                touched.add(key)
        for uid, pod in list(self._pods.items()):
            if pod.seen < self._sweep:
                touched.add(JobKey((pod.value.namespace, pod.value.job)))
                self._forget_pod(uid)
        return touched

    def _forget_pod(self, uid: str) -> None:
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


def _is_older(new: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Tell whether ``new`` is an older state of the same object; etcd's resource versions are ordered numbers."""
    if new["uid"] != known["uid"]:
        return False
    return int(new["resourceVersion"]) < int(known["resourceVersion"])
