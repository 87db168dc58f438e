"""What Prometheus is told of this process, all names in one place but for the sums over jobs (``fleet``).

The values of every label are few, and known from the code: no job, pod, node, namespace or user is among them, so the number of series does
not grow with the cluster. A label's values are there from the start where they can be listed: a counter that appears with its first event
hides that event from ``increase()``.

Everything is served as plain HTTP on a port of its own, by every replica.
"""

from collections.abc import Callable
from typing import Literal

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.aiohttp import make_aiohttp_handler

from finetune_api.reasons import ENDINGS
from finetune_api.status import LostSeconds
from finetune_operator.observability.api_answers import ApiAnswers

Outcome = Literal["done", "conflict", "error", "bug"]
OUTCOMES: tuple[Outcome, ...] = ("done", "conflict", "error", "bug")

_SHORT = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300)
_LAG = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_RECOVERY = (0.5, 1, 2, 3, 5, 8, 15, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """The instruments of one process, and where they are registered."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nobody asks for
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.api = ApiAnswers(self.registry)
        self.queue_seconds = self._histogram("queue_seconds", "Time that a job waited for a worker.", _SHORT)
        self.reconcile_seconds = self._histogram("reconcile_seconds", "Time that a look at a job took.", _SHORT)
        self.reconciles = self._counter(
            "reconciles",
            "Looks at jobs, by how they ended: error is the API server's, bug is the operator's.",
            "outcome",
        )
        self.job_server_requests = self._counter(
            "job_server_requests", "Requests of agents, by path and HTTP status.", "endpoint", "code"
        )
        self.restarts = self._counter("restarts", "Restarts of gangs, by reason as in status.restarts.", "reason")
        self.recovery_seconds = self._histogram(
            "recovery_seconds", "Time from when a job was told to be Recovering until it was Running again.", _RECOVERY
        )
        self.lost_seconds = self._counter(
            "lost_seconds", "Time of recipe jobs that did not go into training, as in status.goodput.", "kind"
        )
        self.event_loop_lag = self._histogram("event_loop_lag_seconds", "How late the event loop runs timers.", _LAG)
        for outcome in OUTCOMES:
            self.reconciles.labels(outcome)
        for reason in ENDINGS.reasons:
            self.restarts.labels(reason.name)
        for kind in LostSeconds.model_fields:
            self.lost_seconds.labels(kind)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Register a number that is asked for whenever Prometheus asks."""
        Gauge(f"finetune_operator_{name}", text, registry=self.registry).set_function(value)

    def app(self) -> web.Application:
        """Return the web application that serves all of this."""
        app = web.Application()
        app.add_routes([web.get("/metrics", make_aiohttp_handler(self.registry))])
        return app

    def counting_requests(self) -> Middleware:
        """Return the middleware that counts what the job server answers."""

        @web.middleware
        async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
            resource, status = request.match_info.route.resource, 500
            try:
                response = await handler(request)
                status = response.status
            except web.HTTPException as refusal:
                status = refusal.status
                raise
            else:
                return response
            finally:
                endpoint = resource.canonical if resource is not None else "other"
                self.job_server_requests.labels(endpoint, str(status)).inc()

        return count

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"finetune_operator_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"finetune_operator_{name}", text, buckets=buckets, registry=self.registry)
