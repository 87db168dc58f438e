"""Bring one job from what is to what should be: observe, plan, carry out.

The order makes a crash between any two steps harmless: status first (it mints generations and is the record), then pods, and orders last,
which the job server derives from the status that the API server has acknowledged. All of it is repeated until nothing is left to do.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_api.job import FineTuneJob, parse_job
from finetune_api.status import JobStatus
from finetune_operator.cache import Cache, JobKey, job_key
from finetune_operator.jobserver.reports import Reports
from finetune_operator.kube.api import CONFIG_MAPS, JOBS, NETWORK_POLICIES, PODS, KubeApi
from finetune_operator.kube.errors import Conflict, Forbidden, Invalid, NotFound
from finetune_operator.kube_object import KubeObject
from finetune_operator.observability.history import History
from finetune_operator.plan.admission import find_problem
from finetune_operator.plan.giving_way import QUOTA, Turn, is_waiting, turn_of
from finetune_operator.plan.lifecycle import plan_job
from finetune_operator.plan.observation import NewPod, Observation, Problem, soonest
from finetune_operator.plan.shape import in_shape
from finetune_operator.render.config import render_config
from finetune_operator.render.network import render_network_policy
from finetune_operator.render.pod import render_pod
from finetune_operator.render.profile import find_example, find_peer, with_profile_of
from finetune_operator.settings import Settings
from finetune_operator.status_writer import StatusWriter
from finetune_operator.views import PodView

logger = logging.getLogger(__name__)

POD_REQUESTS_AT_ONCE = 16
OBSTACLE_SECONDS = 15.0  # when to try again to create a pod that the API server refused


class Reconciler:
    """Reconciles jobs, one call a job at a time."""

    def __init__(
        self,
        *,
        api: KubeApi,
        cache: Cache,
        reports: Reports,
        settings: Settings,
        ca_certificates: str,
        on_status: Callable[[JobKey], None],
        history: History,
        clock: Callable[[], datetime],
    ) -> None:
        self._api, self._cache, self._reports, self._settings = api, cache, reports, settings
        self._ca_certificates, self._on_status, self._clock = ca_certificates, on_status, clock
        self._history = history
        self._status = StatusWriter(api, progress_seconds=settings.progress_seconds)
        # By job uid: the spec whose ConfigMap and NetworkPolicy this process has applied.
        self._furnished: dict[str, int] = {}
        self._obstacles: dict[str, Problem] = {}
        self._known: set[str] = set()  # uids of jobs of which something may be remembered
        self._line: dict[JobKey, Turn] = {}  # of the jobs that could not be placed when they were looked at last

    async def reconcile(self, key: JobKey) -> float | None:
        """Do what the job needs now, and return in how many seconds to look again, if so.

        Raises:
            KubeError: a request failed; nothing is lost by trying again.
        """
        self._line.pop(key, None)
        body = self._cache.job(key)
        if body is None:
            return None
        uid = body["metadata"]["uid"]
        try:
            job = parse_job(body)
        except ValidationError as error:
            logger.error("%s/%s cannot be read by this version: %s", *key, error)  # noqa: TRY400  no traceback needed
            return None
        self._known.add(uid)
        observed = self._observe(job, body)
        plan = plan_job(observed)
        try:
            again = await self._status.write(
                job, plan.status, self._clock(), on_written=lambda body: self._take_status(job, plan.status, body)
            )
        except NotFound:
            self._cache.forget_job(key, uid)  # the watch will show it; until then pods would be made for nobody
            return None
        self._obstacles.pop(uid, None)
        obstacle = await self._create(job, plan.create, observed.pods) if plan.create else None
        await self._delete_pods(plan.delete)
        if plan.delete_job:
            await self._delete_job(job)
        if obstacle is not None:
            self._obstacles[uid] = obstacle
            is_known = observed.obstacle is not None and observed.obstacle.reason == obstacle.reason
            again = OBSTACLE_SECONDS if is_known else 0.0  # tell it in status now
        return soonest(again, plan.look_again_seconds)

    def forget(self, job_uid: str) -> None:
        """Drop what is remembered of a job that is gone."""
        self._known.discard(job_uid)
        self._furnished.pop(job_uid, None)
        self._obstacles.pop(job_uid, None)
        self._status.forget(job_uid)
        self._history.forget(job_uid)

    def keep_only(self, job_uids: set[str]) -> None:
        """Drop what is remembered of all other jobs: a watch that was away has not shown that they are gone."""
        for uid in self._known - job_uids:
            self.forget(uid)

    def _observe(self, job: FineTuneJob, body: Mapping[str, Any]) -> Observation:
        # An owner reference is anybody's to write: a pod of another namespace has no place here.
        pods = tuple(pod for pod in self._cache.pods_of(job.metadata.uid) if pod.namespace == job.metadata.namespace)
        heard = self._reports.heard
        uids = {pod.uid for pod in pods}
        if job.status is not None and job.status.gang is not None:
            uids |= {member.uid for member in job.status.gang.members}  # the last word of one that is gone counts
        example = find_example(in_shape(job, pods), self._settings)
        senior_waits, junior_waits = self._neighbours(body, pods)
        return Observation(
            job=job,
            pods=pods,
            heard={uid: heard[uid] for uid in uids if uid in heard},
            problem=find_problem(job, with_profile_of(example, job, self._settings)),
            obstacle=self._obstacles.get(job.metadata.uid),
            hearing=self._reports.hearing,
            silent_seconds=self._settings.silent_seconds,
            most_nodes_lost=any(pod.node_lost for pod in pods) and self._cache.most_nodes_lost(),
            senior_waits=senior_waits,
            junior_waits=junior_waits,
            now=self._clock(),
        )

    def _neighbours(self, body: Mapping[str, Any], pods: Sequence[PodView]) -> tuple[bool, bool]:
        """Tell whether jobs that go before and after this one cannot be placed either, and note its own place in their line.

        The line is kept, for in a full cluster each of a thousand jobs would else look at the pods of all others.
        """
        own, refused = turn_of(body), self._is_refused(body["metadata"]["uid"])
        waits = refused or any(pod.unschedulable for pod in pods)
        senior_waits = waits and any(turn < own for turn in self._line.values())
        junior_waits = waits and any(turn > own for turn in self._line.values())
        if is_waiting(body, pods, refused=refused):
            self._line[job_key(body)] = own
        return senior_waits, junior_waits

    def _is_refused(self, job_uid: str) -> bool:
        obstacle = self._obstacles.get(job_uid)
        return obstacle is not None and obstacle.reason == QUOTA

    def _take_status(self, job: FineTuneJob, status: JobStatus, body: dict[str, object]) -> None:
        key = self._cache.observe_job(body)
        self._on_status(key)
        self._history.take(job, status, self._clock())

    async def _create(self, job: FineTuneJob, places: Sequence[NewPod], pods: Sequence[PodView]) -> Problem | None:
        """Create pods, and before the first of them what they share; return why the API server refuses one of these, if so."""
        beside = in_shape(job, pods)
        obstacle = None
        if not any(pod.usable for pod in beside):  # else a new version would change what they run on
            obstacle = await self._furnish(job)
        return obstacle or await self._create_pods(job, places, beside)

    async def _furnish(self, job: FineTuneJob) -> Problem | None:
        """Apply what all pods of the job share, before the first of them; return why it is refused, if so."""
        if self._furnished.get(job.metadata.uid) == job.metadata.generation:
            return None
        namespace = job.metadata.namespace
        config = render_config(job, self._settings, self._ca_certificates)
        try:
            await self._api.apply(CONFIG_MAPS, namespace, config)
            await self._api.apply(NETWORK_POLICIES, namespace, render_network_policy(job, self._settings))
        except (Forbidden, Invalid) as error:
            return _refusal("what the pods share", error)
        self._furnished[job.metadata.uid] = job.metadata.generation
        return None

    async def _create_pods(self, job: FineTuneJob, places: Sequence[NewPod], pods: Sequence[PodView]) -> Problem | None:
        """Create pods beside others, and return why the first that was refused was: the same whichever answer came last."""
        limit = asyncio.Semaphore(POD_REQUESTS_AT_ONCE)
        settings = with_profile_of(find_example(pods, self._settings), job, self._settings)
        peer = find_peer(pods)

        async def create(place: NewPod) -> Problem | None:
            async with limit:
                return await self._create_pod(job, render_pod(job, place, settings, peer))

        outcomes = await asyncio.gather(*(create(place) for place in places), return_exceptions=True)
        for outcome in outcomes:  # all have been tried; one error is enough to come back
            if isinstance(outcome, BaseException):
                raise outcome
        return next((outcome for outcome in outcomes if isinstance(outcome, Problem)), None)

    async def _create_pod(self, job: FineTuneJob, body: KubeObject) -> Problem | None:
        namespace, name = job.metadata.namespace, body["metadata"]["name"]
        try:
            self._cache.observe_pod(await self._api.create(PODS, namespace, body))
        except Conflict:
            # Made by a process that died before it saw the answer, or not by us at all: the owner's uid tells.
            existing = await self._api.get(PODS, namespace, name)
            self._cache.observe_pod(existing)
            owners = [owner["uid"] for owner in existing["metadata"].get("ownerReferences", ())]
            if job.metadata.uid not in owners:
                return Problem("NameTaken", f"pod {name} exists and is not this job's; delete it")
        except (Forbidden, Invalid) as error:
            return _refusal("the pod", error)
        return None

    async def _delete_pods(self, pods: Sequence[PodView]) -> None:
        for pod in pods:
            try:
                await self._api.delete(PODS, pod.namespace, pod.name, uid=pod.uid)
            except (NotFound, Conflict):  # whatever has that name now has another uid
                logger.debug("pod %s/%s is gone already", pod.namespace, pod.name)
                self._cache.forget_pod(pod.uid)

    async def _delete_job(self, job: FineTuneJob) -> None:
        try:
            await self._api.delete(JOBS, job.metadata.namespace, job.metadata.name, uid=job.metadata.uid)
        except (NotFound, Conflict):
            logger.debug("job %s/%s is gone already", job.metadata.namespace, job.metadata.name)


def _refusal(what: str, error: Forbidden | Invalid) -> Problem:
    reason = QUOTA if "exceeded quota" in str(error) else "PodRefused"
    return Problem(reason, f"the API server refuses {what}: {error}")
