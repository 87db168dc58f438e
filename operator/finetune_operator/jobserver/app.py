"""The job server: ``POST /v1/report`` takes a report and answers with the order, ``GET /v1/order`` waits for another order.

A pod may speak for itself only: the token names its uid, and report and query must name the same. Orders are made from committed status
(``plan.orders``) as the cache knows it; a waiting request is answered as soon as its job's status changes.

Only the leader hears reports and gives orders: others answer 503, and an agent then connects anew, to whoever leads.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware
from pydantic import ValidationError

from finetune_api.contract import ORDER_PATH, ORDER_POLL_SECONDS, REPORT_BYTES_LIMIT, REPORT_PATH
from finetune_api.job import FineTuneJob, parse_job
from finetune_api.protocol import SERVED_VERSIONS, Action, Order, Report, from_wire, to_wire
from finetune_operator.cache import Cache, JobKey
from finetune_operator.jobserver.auth import Caller, TokenVerifier, Unauthorized
from finetune_operator.jobserver.plausible import check_plausible
from finetune_operator.jobserver.reports import Reports
from finetune_operator.kube.errors import KubeError
from finetune_operator.plan.orders import order_for
from finetune_operator.views import PodView

logger = logging.getLogger(__name__)

JOBS_AT_HAND = (
    64  # whose agents ask: all of a gang do at once when its status changes, and a large status takes long to parse
)


class JobServer:
    """Answers agents. ``on_news`` is called with the key of a job of which an agent has told something new."""

    def __init__(
        self,
        *,
        cache: Cache,
        reports: Reports,
        verifier: TokenVerifier,
        leads: Callable[[], bool],
        on_news: Callable[[JobKey], None],
    ) -> None:
        self._cache, self._reports, self._verifier = cache, reports, verifier
        self._leads, self._on_news = leads, on_news
        self._changed: dict[JobKey, asyncio.Event] = {}
        self._at_hand: dict[JobKey, tuple[dict[str, Any], FineTuneJob]] = {}  # as cached, and parsed; the oldest first

    def app(self, *middlewares: Middleware) -> web.Application:
        """Return the web application."""
        app = web.Application(client_max_size=REPORT_BYTES_LIMIT, middlewares=middlewares)
        app.add_routes([web.post(REPORT_PATH, self._post_report), web.get(ORDER_PATH, self._get_order)])
        return app

    def job_changed(self, key: JobKey) -> None:
        """Answer the requests that wait for another order of this job."""
        event = self._changed.pop(key, None)
        if event is not None:
            event.set()

    def dismiss_all(self) -> None:
        """Have every waiting request look again: after the lease's end they are told to go elsewhere."""
        for key in list(self._changed):
            self.job_changed(key)

    async def _post_report(self, request: web.Request) -> web.Response:
        caller = await self._caller(request)
        try:
            report = from_wire(Report, json.loads(await request.read()))
            check_plausible(report)
        except (ValueError, OverflowError, RecursionError) as error:
            raise _refusal(web.HTTPBadRequest, f"not a report: {error}") from error
        if report.protocol not in SERVED_VERSIONS:
            raise _refusal(web.HTTPBadRequest, f"protocol {report.protocol} is not served; served: {SERVED_VERSIONS}")
        pod = self._own_pod(caller, report.pod_uid)
        key = JobKey((pod.namespace, pod.job))
        order, committed = self._order(key, pod), self._committed_generation(key, pod)
        if committed is not None and report.generation > committed:
            why = f"generation {report.generation} is not known (yet): the newest is {committed}"
            raise _refusal(web.HTTPConflict, why)
        if self._reports.hear(report):
            self._on_news(key)
        return web.json_response(to_wire(order))

    async def _get_order(self, request: web.Request) -> web.Response:
        caller = await self._caller(request)
        pod = self._own_pod(caller, request.query.get("pod_uid", ""))
        key = JobKey((pod.namespace, pod.job))
        if self._reports.hear_question(pod.uid):
            self._on_news(key)
        known = (request.query.get("known_action"), request.query.get("known_generation"))
        loop = asyncio.get_running_loop()
        until = loop.time() + ORDER_POLL_SECONDS
        while True:
            order = self._order(key, pod)
            left = until - loop.time()
            if (order.action.value, str(order.generation)) != known or left <= 0:
                return web.json_response(to_wire(order))
            event = self._changed.setdefault(key, asyncio.Event())
            try:
                await asyncio.wait_for(event.wait(), left)
            except TimeoutError:
                continue

    def _order(self, key: JobKey, pod: PodView) -> Order:
        self._check_that_it_leads()
        job = self._job(key, pod)
        return order_for(job, pod.uid) if job else Order(action=Action.WAIT)

    def _committed_generation(self, key: JobKey, pod: PodView) -> int | None:
        job = self._job(key, pod)
        if job is None:
            return None
        return job.status.gang.generation if job.status and job.status.gang else 0

    def _job(self, key: JobKey, pod: PodView) -> FineTuneJob | None:
        """Return a pod's job, or None when nothing can be said of it: what runs goes on, for an agent obeys no lower generation."""
        body = self._cache.job(key)
        if body is None or body["metadata"]["uid"] != pod.job_uid:
            return None  # gone, and the garbage collector is on its way
        try:
            return self._parsed(key, body)
        except ValidationError:  # written by a newer version
            return None

    def _parsed(self, key: JobKey, body: dict[str, Any]) -> FineTuneJob:
        cached, job = self._at_hand.pop(key, (None, None))
        if job is None or cached is not body:  # the cache holds another object for each version
            job = parse_job(body)
        self._at_hand[key] = body, job
        while len(self._at_hand) > JOBS_AT_HAND:
            del self._at_hand[next(iter(self._at_hand))]
        return job

    def _check_that_it_leads(self) -> None:
        if not self._leads():
            raise _refusal(web.HTTPServiceUnavailable, "this replica does not lead")

    async def _caller(self, request: web.Request) -> Caller:
        self._check_that_it_leads()
        try:
            return await self._verifier.verify(request.headers.get("Authorization"))
        except Unauthorized as error:
            raise _refusal(web.HTTPUnauthorized, str(error)) from error
        except KubeError as error:
            logger.warning("the cluster's token keys cannot be read: %s", error)
            raise _refusal(web.HTTPServiceUnavailable, "the cluster's token keys cannot be read now") from error

    def _own_pod(self, caller: Caller, claimed_uid: str) -> PodView:
        if claimed_uid != caller.pod_uid:
            raise _refusal(web.HTTPForbidden, "a pod may speak for itself only")
        pod = self._cache.pod(caller.pod_uid)
        if pod is None:
            raise _refusal(web.HTTPNotFound, "this pod is not known (yet) as one of a job's")
        return pod


def _refusal(kind: type[web.HTTPException], why: str) -> web.HTTPException:
    return kind(text=json.dumps({"error": why}), content_type="application/json")
