"""How this process is: what gauges and probes are told, asked of the parts that do the work."""

from collections.abc import Callable, Sized
from datetime import datetime

from finetune_operator.cache import Cache
from finetune_operator.jobserver.reports import Reports
from finetune_operator.leader import Lease
from finetune_operator.observability.fleet import Fleet
from finetune_operator.observability.metrics import Metrics

WATCH_DEAD_SECONDS = 360.0  # more than between two lists: an object that is gone needs no watch to show it, but a list


class Vitals:
    """Registers the gauges of one process, and judges its watches."""

    def __init__(
        self,
        *,
        cache: Cache,
        queue: Sized,
        reports: Reports,
        lease: Lease,
        metrics: Metrics,
        silent_seconds: float,
        clock: Callable[[], datetime],
    ) -> None:
        self._cache, self._reports, self._metrics = cache, reports, metrics
        self._silent_seconds, self._clock = silent_seconds, clock
        metrics.gauge("leader", "1 while this replica leads.", lease.has_time)
        metrics.gauge("queue_depth", "Jobs that wait for a worker.", lambda: len(queue))
        metrics.gauge("agents_connected", "Agents that this replica has heard of late.", self._count_agents)
        text = "Time for which watches have been silent on what lists and answers have shown."
        metrics.gauge("watch_lag_seconds", text, self._watch_lag)
        metrics.registry.register(Fleet(jobs=cache.jobs, leads=lease.has_time, clock=clock))

    def trouble(self) -> str:
        """Return why this process has to be started anew, if so."""
        lag = self._watch_lag()
        return f"the watches have been silent for {lag:.0f} s on what lists show" if lag > WATCH_DEAD_SECONDS else ""

    def _watch_lag(self) -> float:
        """Return for how long the watches have been silent while the API server answered."""
        return min(self._cache.unshown_seconds(), self._metrics.api.seconds_since_failure())

    def _count_agents(self) -> int:
        now = self._clock()
        return sum((now - one.at).total_seconds() <= self._silent_seconds for one in self._reports.heard.values())
