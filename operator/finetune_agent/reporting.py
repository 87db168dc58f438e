"""Talks to the job server over HTTPS: one thread posts reports, one long-polls for orders.

Reports are levels, so nothing queues up while the server is away: the newest one is posted when it is back. The TLS
context is built anew for each connection, since the CA bundle may change under a running pod, and the token is read
anew for each request, since the kubelet rotates it. Any answer but success closes the connection: a Service then leads
the next one to whoever leads (a follower answers 503).
"""

import http.client
import itertools
import json
import random
import socket
import ssl
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Protocol, Tuple
from urllib.parse import urlencode, urlsplit

from finetune_agent.stub import say
from finetune_api.contract import ORDER_PATH, ORDER_POLL_SECONDS, REPORT_BYTES_LIMIT, REPORT_PATH
from finetune_api.protocol import Action, Exit, Order, Report, from_wire, to_wire

PROGRESS_SECONDS = 2.0  # progress, heartbeats and how saving goes are posted at most this often
SILENCE_SECONDS = 10.0  # and something is posted at least this often
REPORT_SECONDS = 10.0  # for one answer to a report
POLL_MARGIN_SECONDS = 10.0  # for an answer to a poll, beyond the server's own wait
QUICK_ANSWER_SECONDS = 1.0  # an unchanged order that comes sooner is a server that does not wait
ANSWER_BYTES = 65536
# A poll waits in silence, and a machine that dies says nothing: the kernel asks after 5 s, and gives up after 11.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))
FIRST_BACKOFF_SECONDS = 0.2
LONGEST_BACKOFF_SECONDS = 5.0
NOT_LEADER_SECONDS = 1.0
NOT_LEADER = 503


class Unavailable(Exception):
    """The job server gave no order: it is away, refused us or makes no sense."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class JobServer(Protocol):
    """What the threads need of the job server."""

    def report(self, body: bytes) -> Optional[Order]:
        """Post a report and return the order of the answer.

        Raises:
            Unavailable: try again later.
        """

    def poll(self, known: Order) -> Optional[Order]:
        """Return an order that differs from ``known``, or any after a while.

        Raises:
            Unavailable: try again later.
        """


@dataclass(frozen=True)
class Access:
    """How to reach the job server and who we are to it."""

    url: str
    pod_uid: str
    ca_file: Path
    token_file: Path


class HttpsJobServer:
    """One connection to the job server; not for two threads."""

    def __init__(self, access: Access) -> None:
        self._access = access
        parts = urlsplit(access.url)
        if parts.scheme != "https" or not parts.hostname:
            raise ValueError("jobServer: must be https://host:port, not " + access.url)
        self._host, self._port = parts.hostname, parts.port or 443
        self._connection: Optional[http.client.HTTPSConnection] = None

    def report(self, body: bytes) -> Optional[Order]:
        """See JobServer."""
        return self._exchange("POST", REPORT_PATH, body, REPORT_SECONDS)

    def poll(self, known: Order) -> Optional[Order]:
        """See JobServer."""
        query = {
            "pod_uid": self._access.pod_uid,
            "known_generation": known.generation,
            "known_action": known.action.value,
        }
        return self._exchange(
            "GET", ORDER_PATH + "?" + urlencode(query), None, ORDER_POLL_SECONDS + POLL_MARGIN_SECONDS
        )

    def _exchange(self, method: str, path: str, body: Optional[bytes], seconds: float) -> Optional[Order]:
        reused = self._connection is not None
        try:
            status, answer = self._request(method, path, body, seconds)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
            self._close()
            if not reused:
                raise Unavailable(str(error) or type(error).__name__) from error
            return self._exchange(method, path, body, seconds)  # the server had closed an idle connection
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._close()
            raise Unavailable(str(error) or type(error).__name__) from error
        return self._read(status, answer)

    def _request(self, method: str, path: str, body: Optional[bytes], seconds: float) -> Tuple[int, bytes]:
        token = self._access.token_file.read_text(encoding="ascii").strip()
        connection = self._connect(seconds)
        headers = {"Authorization": "Bearer " + token, "Content-Type": "application/json"}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = response.read(ANSWER_BYTES + 1)
        if len(answer) > ANSWER_BYTES:
            raise ValueError("the answer is too long")
        return response.status, answer

    def _connect(self, seconds: float) -> http.client.HTTPSConnection:
        if self._connection is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_verify_locations(cafile=str(self._access.ca_file))
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=seconds, context=context)
            connection.connect()
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE:
                connection.sock.setsockopt(socket.IPPROTO_TCP, option, value)
            self._connection = connection
        return self._connection

    def _read(self, status: int, answer: bytes) -> Optional[Order]:
        if status == 204:
            return None
        if status != 200:
            self._close()
            text = answer[:200].decode("utf-8", "replace")
            raise Unavailable("the job server answers " + str(status) + ": " + text, status)
        try:
            return from_wire(Order, json.loads(answer))
        except (ValueError, RecursionError) as error:
            self._close()
            raise Unavailable("the job server's answer is no order: " + str(error)) from error

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


class Backoff:
    """How long to wait after failures in a row: doubling, with jitter, so that agents do not all return at once."""

    def __init__(self) -> None:
        self._failures = 0
        self._told = ""

    def succeeded(self) -> None:
        """Start over."""
        if self._failures:
            say("the job server is back")
        self._failures, self._told = 0, ""

    def failed(self, error: Unavailable) -> float:
        """Return the seconds to wait."""
        if str(error) != self._told:
            say("no order from the job server, trying on: " + str(error))
            self._told = str(error)
        longest = NOT_LEADER_SECONDS if error.status == NOT_LEADER else LONGEST_BACKOFF_SECONDS
        seconds = min(longest, FIRST_BACKOFF_SECONDS * 2.0 ** min(self._failures, 10))
        self._failures += 1
        return seconds * random.uniform(0.5, 1.0)  # noqa: S311  jitter


class Orders:
    """Passes each order on once. Both threads hear orders, and most are the one that is known."""

    def __init__(self, emit: Callable[[Order], None]) -> None:
        self._emit = emit
        self._lock = threading.Lock()
        self.known = Order(Action.WAIT)

    def hear(self, order: Optional[Order]) -> bool:
        """Take an order; tell whether it is news."""
        with self._lock:
            if order is None or order == self.known:
                return False
            if order.generation < self.known.generation and order.action is not Action.FINISH:
                return False
            self.known = order
        self._emit(order)
        return True


class Poller:
    """Long-polls for orders, for ever."""

    def __init__(self, server: JobServer, orders: Orders) -> None:
        self._server = server
        self._orders = orders

    def run(self) -> None:
        """Be the thread."""
        backoff = Backoff()
        while True:
            asked = time.monotonic()
            try:
                news = self._orders.hear(self._server.poll(self._orders.known))
            except Unavailable as error:
                time.sleep(backoff.failed(error))
                continue
            backoff.succeeded()
            if not news and time.monotonic() - asked < QUICK_ANSWER_SECONDS:
                time.sleep(QUICK_ANSWER_SECONDS)


class Reporter:
    """Posts the newest report: at once if more than progress changed, else every few seconds."""

    def __init__(self, server: JobServer, orders: Orders, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._orders = orders
        self._clock = clock
        self._changed = threading.Condition()
        self._newest: Optional[Report] = None
        self._posted: Optional[Report] = None
        self._posted_at = 0.0

    def publish(self, report: Report) -> None:
        """Replace the report."""
        with self._changed:
            if report != self._newest:
                self._newest = report
                self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until the newest report has arrived; tell whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self._posted == self._newest, seconds)

    def run(self) -> None:
        """Be the thread."""
        backoff = Backoff()
        for number in itertools.count(1):
            report = self._wait_until_due()
            try:
                order = self._server.report(fit(replace(report, number=number)))
            except Unavailable as error:
                time.sleep(backoff.failed(error))
                continue
            backoff.succeeded()
            with self._changed:
                self._posted, self._posted_at = report, self._clock()
                self._changed.notify_all()
            self._orders.hear(order)

    def _wait_until_due(self) -> Report:
        with self._changed:
            while True:
                seconds = self._seconds_until_due()
                if seconds is not None and seconds <= 0:
                    assert self._newest is not None
                    return self._newest
                self._changed.wait(seconds)

    def _seconds_until_due(self) -> Optional[float]:
        if self._newest is None:
            return None
        if self._posted is None or facts(self._newest) != facts(self._posted):
            return 0.0
        interval = SILENCE_SECONDS if self._newest == self._posted else PROGRESS_SECONDS
        return self._posted_at + interval - self._clock()


def facts(report: Report) -> Report:
    """Return the part of a report that may not wait."""
    return replace(report, heartbeat=None, progress=None, saves=None, paces=[])


def fit(report: Report) -> bytes:
    """Return a report as JSON within the server's limit, shortening the log tails, then the list of exits.

    The first exits stay whole the longest: the first is the cause, the others are mostly its echoes.
    """
    for tail in (4096, 1024, 256, 0):
        body = encode(
            replace(
                report,
                exits=[replace(end, log_tail=end.log_tail[-tail or len(end.log_tail) :]) for end in report.exits],
            )
        )
        if len(body) <= REPORT_BYTES_LIMIT:
            return body
    exits = [bare(end) for end in report.exits]
    while True:
        body = encode(replace(report, exits=exits))
        if len(body) <= REPORT_BYTES_LIMIT or not exits:
            return body
        exits = exits[: len(exits) // 2]


def bare(end: Exit) -> Exit:
    """Return an exit without what can be missed."""
    return replace(end, log_tail="", message=end.message[:256])


def encode(report: Report) -> bytes:
    """Return a report as JSON."""
    wire: Dict[str, Any] = to_wire(report)
    return json.dumps(wire, ensure_ascii=False).encode("utf-8", "replace")
