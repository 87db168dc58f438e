"""The job server: ``POST /v1/report`` takes a report and answers with the order, ``GET /v1/order`` waits for another order.

A pod may speak for itself only: the token names its uid, and report and query must name the same. Orders are made from committed status
(``plan.orders``) as the cache knows it; a waiting request is answered as soon as its job's status changes.

Only the leader hears reports and gives orders: others answer 503, and an agent then connects anew, to whoever leads.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware
from pydantic import ValidationError

from finetune_api.contract import ORDER_PATH, ORDER_POLL_SECONDS, REPORT_BYTES_LIMIT, REPORT_PATH
from finetune_api.job import parse_job
from finetune_api.protocol import SERVED_VERSIONS, Action, Order, Report, from_wire, to_wire
from finetune_operator.cache import Cache, JobKey
from finetune_operator.jobserver.auth import Caller, TokenVerifier, Unauthorized
from finetune_operator.jobserver.flood import Allowances, Strangers
from finetune_operator.jobserver.plausible import check_plausible
from finetune_operator.jobserver.reports import Reports
from finetune_operator.kube.errors import KubeError
from finetune_operator.plan.orders import Orders, orders_for
from finetune_operator.views import PodView

logger = logging.getLogger(__name__)

JOBS_AT_HAND = 4096  # whose agents ask, each every few seconds; reading a job takes longer than all else of an answer
ORDERS_AT_HAND = 4096  # as JSON


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
        self._allowances, self.strangers = Allowances(), Strangers()
        self._changed: dict[JobKey, asyncio.Event] = {}
        self._at_hand: dict[
            JobKey, tuple[dict[str, Any], Orders]
        ] = {}  # with what they were made from; the oldest first

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
        self._check_that_it_leads()
        orders = self._orders(key, pod)
        if orders is not None and report.generation > orders.generation:
            why = f"generation {report.generation} is not known (yet): the newest is {orders.generation}"
            raise _refusal(web.HTTPConflict, why)
        if self._reports.hear(report):
            self._on_news(key)
        return _answer(_order(orders, pod))

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
            self._check_that_it_leads()
            order = _order(self._orders(key, pod), pod)
            left = until - loop.time()
            if (order.action.value, str(order.generation)) != known or left <= 0:
                return _answer(order)
            event = self._changed.setdefault(key, asyncio.Event())
            try:
                await asyncio.wait_for(event.wait(), left)
            except TimeoutError:
                continue

    def _orders(self, key: JobKey, pod: PodView) -> Orders | None:
        """Return what a job's agents are told, or None when nothing can be said: what runs goes on, for an agent obeys no lower generation."""
        body = self._cache.job(key)
        if body is None or body["metadata"]["uid"] != pod.job_uid:
            return None  # gone, and the garbage collector is on its way
        try:
            return self._read(key, body)
        except ValidationError:  # written by a newer version
            return None

    def _read(self, key: JobKey, body: dict[str, Any]) -> Orders:
        cached, orders = self._at_hand.pop(key, (None, None))
        if orders is None or cached is not body:  # the cache holds another object for each version
            orders = orders_for(parse_job(body))
        self._at_hand[key] = body, orders
        while len(self._at_hand) > JOBS_AT_HAND:
            del self._at_hand[next(iter(self._at_hand))]
        return orders

    def _check_that_it_leads(self) -> None:
        if not self._leads():
            raise _refusal(web.HTTPServiceUnavailable, "this replica does not lead")

    async def _caller(self, request: web.Request) -> Caller:
        self._check_that_it_leads()
        try:
            caller = await self._verifier.verify(request.headers.get("Authorization"))
        except Unauthorized as error:
            raise _refusal(web.HTTPUnauthorized, str(error)) from error
        except KubeError as error:
            logger.warning("the cluster's token keys cannot be read: %s", error)
            raise _refusal(web.HTTPServiceUnavailable, "the cluster's token keys cannot be read now") from error
        if not self._allowances.take(caller.pod_uid):
            raise _refusal(web.HTTPTooManyRequests, "this pod asks too often")
        self.strangers.accept(request.protocol)
        return caller

    def _own_pod(self, caller: Caller, claimed_uid: str) -> PodView:
        if claimed_uid != caller.pod_uid:
            raise _refusal(web.HTTPForbidden, "a pod may speak for itself only")
        pod = self._cache.pod(caller.pod_uid)
        if pod is None:
            raise _refusal(web.HTTPNotFound, "this pod is not known (yet) as one of a job's")
        return pod


def _order(orders: Orders | None, pod: PodView) -> Order:
    return orders.to(pod.uid) if orders is not None else Order(action=Action.WAIT)


def _answer(order: Order) -> web.Response:
    return web.Response(body=_encoded(order), content_type="application/json")


@lru_cache(maxsize=ORDERS_AT_HAND)
def _encoded(order: Order) -> bytes:
    return json.dumps(to_wire(order)).encode()


def _refusal(kind: type[web.HTTPException], why: str) -> web.HTTPException:
    return kind(text=json.dumps({"error": why}), content_type="application/json")
