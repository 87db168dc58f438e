"""All jobs together, counted from the cache whenever Prometheus asks: sums, so that the number of series does not grow with the jobs.

Only the leader tells them: every replica knows the jobs, and two that count them would make twice as many.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from finetune_api.status import ConditionType, JobPhase
from finetune_operator.plan.observation import instant

TROUBLES = (
    ConditionType.STALLED,
    ConditionType.CHECKPOINTS_DELAYED,
    ConditionType.CHECKPOINT_FALLBACK,
    ConditionType.STRAGGLER,
)
ENDED = frozenset({JobPhase.SUCCEEDED, JobPhase.FAILED})

Body = Mapping[str, Any]


class Fleet(Collector):
    """Counts jobs. ``jobs`` returns them as the API server wrote them."""

    def __init__(
        self, *, jobs: Callable[[], Iterable[Body]], leads: Callable[[], bool], clock: Callable[[], datetime]
    ) -> None:
        self._jobs, self._leads, self._clock = jobs, leads, clock

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return what is so now."""
        return list(_families(list(self._jobs()), self._clock())) if self._leads() else ()


def _families(jobs: list[Body], now: datetime) -> Iterable[GaugeMetricFamily]:
    active = [job for job in jobs if _phase(job) not in ENDED]
    yield _counted("jobs", "Jobs by phase.", "phase", JobPhase, Counter(map(_phase, jobs)))
    conditions = Counter(kind for job in active for kind in _holding(job))
    text = "Jobs that have not ended and of which a condition holds that may need somebody."
    yield _counted("jobs_with_condition", text, "condition", TROUBLES, conditions)
    ages = [(now - instant(since)).total_seconds() for job in active if (since := _saved_at(job))]
    text = "The longest time for which a running recipe job has committed no checkpoint."
    yield GaugeMetricFamily("finetune_operator_oldest_checkpoint_age_seconds", text, value=max([0.0, *ages]))
    goodput = _goodput(active)
    if goodput is not None:
        text = "Share of their time that jobs which have not ended have spent on training that counts."
        yield GaugeMetricFamily("finetune_operator_goodput_ratio", text, value=goodput)


def _counted(name: str, text: str, label: str, values: Iterable[str], counts: Counter[str]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"finetune_operator_{name}", text, labels=(label,))
    for value in values:
        family.add_metric((value,), counts[value])
    return family


def _phase(job: Body) -> str:
    """Return a job's phase; one without any waits for its first look."""
    return str(job["status"].get("phase") or JobPhase.PENDING)


def _holding(job: Body) -> Iterable[str]:
    return (item["type"] for item in job["status"].get("conditions", ()) if item["status"] == "True")


def _saved_at(job: Body) -> str | None:
    """Return up to when a running job is safe: its newest checkpoint's time, or when its gang started."""
    status = job["status"]
    if status.get("phase") != JobPhase.RUNNING or "recipe" not in job["spec"]:
        return None
    started: str | None = status.get("gang", {}).get("startTime")
    saved: str | None = status.get("checkpoint", {}).get("commitTime")
    return saved or started


def _goodput(jobs: Iterable[Body]) -> float | None:
    known = [job["status"]["goodput"] for job in jobs if "goodput" in job["status"]]
    counted = sum(one.get("productiveSeconds", 0.0) for one in known)
    whole = counted + sum(sum(one.get("lostSeconds", {}).values()) for one in known)
    return counted / whole if whole > 0 else None
