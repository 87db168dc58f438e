"""What the API server has answered: counted, and when it last failed to.

Requests of kopf's watches are not among them; whether those are alive is told by what they show (``Cache.unshown_seconds``).
"""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram

from finetune_operator.kube.client import Answer

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class ApiAnswers:
    """Takes in every answer, and every request that got none. Used by two threads: the lease has a connection of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "finetune_operator_api_requests",
            "Requests to the API server, by verb, resource and HTTP status; code is none when there was no answer.",
            ("verb", "resource", "code"),
            registry=registry,
        )
        self._seconds = Histogram(
            "finetune_operator_api_request_seconds",
            "Time until the API server had answered, or was given up.",
            ("verb", "resource"),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._failed_at = float("-inf")

    def record(self, answer: Answer) -> None:
        """Take in one answer."""
        self._requests.labels(answer.verb, answer.resource, str(answer.status or "none")).inc()
        self._seconds.labels(answer.verb, answer.resource).observe(answer.seconds)
        if not answer.status or answer.status >= 500:
            self._failed_at = time.monotonic()

    def seconds_since_failure(self) -> float:
        """Return for how long the API server has answered every request."""
        return time.monotonic() - self._failed_at
