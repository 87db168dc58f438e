"""What keeps one caller from taking the job server away from all others: so many requests a pod, and no connection without one.

An agent posts its progress every two seconds at most, news as it comes, and polls as its order changes. A pod that asks far more often is
answered 429, and loses nothing by it: a report says all that there is to say.

Who has no token can still connect, say half a request or nothing, and stay: aiohttp waits for the head of a first request for ever. So
a connection is closed on which no request has been accepted for a while, be it idle, slow or refused. Agents are never silent for so long.
"""

import time
from collections.abc import Callable, Iterable

from aiohttp.web_protocol import RequestHandler

REQUESTS_PER_SECOND = 5.0
BURST = 30.0
PODS_AT_HAND = 16384
STRANGER_SECONDS = 60.0


class Allowances:
    """A token bucket for each pod; the pods that asked least recently are forgotten first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # by uid: requests, and when it was so

    def take(self, pod_uid: str) -> bool:
        """Count a request of a pod, and tell whether it may have it."""
        now = self._clock()
        left, at = self._left.pop(pod_uid, (BURST, now))
        left = min(BURST, left + (now - at) * REQUESTS_PER_SECOND)
        self._left[pod_uid] = max(0.0, left - 1), now
        if len(self._left) > PODS_AT_HAND:
            del self._left[next(iter(self._left))]
        return left >= 1


class Strangers:
    """The connections on which no request has been accepted for a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[RequestHandler, float] = {}

    def accept(self, connection: RequestHandler) -> None:
        """Take in that a request was accepted on a connection."""
        self._since[connection] = self._clock()

    def close(self, connections: Iterable[RequestHandler]) -> None:
        """Close those of all open connections that have been strangers for too long; to be called again and again."""
        now = self._clock()
        self._since = {connection: self._since.get(connection, now) for connection in connections}
        for connection, since in self._since.items():
            if now - since > STRANGER_SECONDS:
                connection.force_close()
