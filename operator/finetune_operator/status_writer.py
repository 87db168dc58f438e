"""One status write, only if something differs, always against the version that it was computed from.

Progress alone is written at most every ``progress_seconds`` for a job and ``PROGRESS_WRITES_PER_SECOND`` times a second in all: etcd keeps
every version of an object. So is how saving goes, where a generation started, with what those before it have lost by that, and goodput; and how
far a start is, which else would cost a large gang a write, of all its members, for each of them. Whatever else changes is written at
once, and takes the newest of these along.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.status import JobStatus
from finetune_operator.kube.api import JOBS, KubeApi
from finetune_operator.kube.errors import TooMany
from finetune_operator.merge_patch import merge_patch
from finetune_operator.plan.pending import ON_THE_WAY

PROGRESS_WRITES_PER_SECOND = 20.0
# An attempt is added beside a new generation or the job's end, which are written at once: alone, only its lost steps are new.
CAN_WAIT = frozenset({"progress", "saves", "resumed", "attempts", "goodput"})


class StatusWriter:
    """Writes the status of jobs.

    When the API server wants us to wait, no status of any job is sent before the time that it has said; what is written then is what is
    true then.
    """

    def __init__(self, api: KubeApi, *, progress_seconds: float) -> None:
        self._api, self._progress_seconds = api, progress_seconds
        self._written: dict[str, datetime] = {}  # by job uid
        self._next_turn: datetime | None = None  # of any job
        self._turns: dict[str, datetime] = {}  # by job uid: when its progress may be written
        self._not_before: datetime | None = None  # as the API server has it

    async def write(
        self, job: FineTuneJob, status: JobStatus, now: datetime, *, on_written: Callable[[dict[str, Any]], None]
    ) -> float | None:
        """Write ``status`` if it differs and its time has come; return in how many seconds to try again when it has not.

        Raises:
            Conflict: the job has changed since; its newest state has to be looked at first.
            NotFound: the job is gone.
            TooMany: the API server wants us to wait, now or since an earlier write.
        """
        old = job.status.to_wire() if job.status else {}
        new = status.to_wire()
        patch = merge_patch(old, new)
        if not patch:
            return None
        wait = self._wait_seconds(job.metadata.uid, now) if _can_wait(old, new, patch) else 0.0
        if wait > 0:
            return wait
        if self._not_before is not None and now < self._not_before:
            left = (self._not_before - now).total_seconds()
            raise TooMany("status: not sent yet, as the API server has asked", status=429, retry_after=left)
        on_written(await self._send(job, patch, now))
        return None

    async def _send(self, job: FineTuneJob, patch: dict[str, Any], now: datetime) -> dict[str, Any]:
        metadata = job.metadata
        self._written[metadata.uid] = now
        self._turns.pop(metadata.uid, None)
        try:
            return await self._api.patch_status(
                JOBS, metadata.namespace, metadata.name, resource_version=metadata.resource_version, status=patch
            )
        except TooMany as error:
            self._written.pop(metadata.uid, None)  # the job may have gone meanwhile, and is forgotten
            self._not_before = now + timedelta(seconds=error.retry_after or 0.0)
            raise

    def forget(self, job_uid: str) -> None:
        """Drop what is remembered of a job that is gone."""
        self._written.pop(job_uid, None)
        self._turns.pop(job_uid, None)

    def _wait_seconds(self, uid: str, now: datetime) -> float:
        written = self._written.get(uid)
        own = self._progress_seconds - (now - written).total_seconds() if written else 0.0
        if own > 0:
            return own
        if uid not in self._turns:
            turn = self._turns[uid] = max(now, self._next_turn or now)
            self._next_turn = turn + timedelta(seconds=1.0 / PROGRESS_WRITES_PER_SECOND)
        return (self._turns[uid] - now).total_seconds()


def _can_wait(old: Mapping[str, Any], new: Mapping[str, Any], patch: Mapping[str, Any]) -> bool:
    """Tell whether a patch says no more than how training, or a start, goes on."""
    beside, gang = patch.keys() - CAN_WAIT, patch.get("gang", {})
    if beside - {"conditions", "gang"} or gang is None or gang.keys() - {"ready"}:
        return False
    return "conditions" not in patch or _is_same_start(old.get("conditions", ()), new["conditions"])


def _is_same_start(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the same conditions hold, and say the same but for how far a start is."""
    known = {condition["type"]: condition for condition in old}
    return known.keys() == {condition["type"] for condition in new} and all(
        condition == known[condition["type"]] or _goes_on(known[condition["type"]], condition) for condition in new
    )


def _goes_on(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return old["status"] == new["status"] and {old["reason"], new["reason"]} <= ON_THE_WAY
