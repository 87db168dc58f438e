"""An HTTP proxy in front of an S3 server that misbehaves on demand, since a healthy server cannot be made to.

Requests are read whole and forwarded with their headers, Host included, so that signatures hold. What goes wrong with one is decided, in
this order, by the hook ``before``, by the first of ``faults`` that matches (which then is used up) and by ``outage`` (which lasts).
Hooks run in the thread of their request: one that blocks holds the request, or its answer, back, even when the client
is dead by then; everyone else's go on. Everything that is held back must be let go before the proxy is left.
"""

import http.client
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Fault(Enum):
    """What may go wrong with one request."""

    ANSWER_LOST = auto()  # carried out, but the connection closes without an answer
    REQUEST_LOST = auto()  # not carried out, and the connection closes
    RESET = auto()  # not carried out, and the connection is reset
    SLOW_DOWN = auto()  # not carried out, 503
    UNAVAILABLE = auto()  # not carried out, 503 with another code
    INTERNAL_ERROR = auto()  # not carried out, 500
    CONFLICT = auto()  # not carried out, 409
    EXPIRED = auto()  # not carried out, 400 about the credentials
    FORBIDDEN = auto()  # not carried out, 403
    NO_BUCKET = auto()  # not carried out, 404 about the bucket
    NONSENSE = auto()  # not carried out, 400 with a code of no S3 server
    ERROR_IN_OK = auto()  # not carried out, 200 with an error for a body
    REPEATED = auto()  # carried out twice, the second answer is given
    CORRUPTED = auto()  # a byte of the request's body changes on its way
    TRUNCATED = auto()  # half of the answer's body, then the connection closes


REFUSALS = {
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.UNAVAILABLE: (503, "ServiceUnavailable"),
    Fault.INTERNAL_ERROR: (500, "InternalError"),
    Fault.CONFLICT: (409, "ConditionalRequestConflict"),
    Fault.EXPIRED: (400, "ExpiredToken"),
    Fault.FORBIDDEN: (403, "AccessDenied"),
    Fault.NO_BUCKET: (404, "NoSuchBucket"),
    Fault.NONSENSE: (400, "GatewayIsBeingReplaced"),
    Fault.ERROR_IN_OK: (200, "InternalError"),
}


@dataclass(frozen=True)
class Request:
    """The ``number``-th request, counted from 1, in the order in which they had arrived whole."""

    number: int
    method: str
    path: str
    """With its query."""

    def matches(self, pattern: str) -> bool:
        """Whether it is what a pattern means: a method, or a method, a space and a part of the path."""
        method, _, part = pattern.partition(" ")
        return method == self.method and part in self.path


@dataclass
class Proxy:
    """Where the proxy listens, what it will do wrong next, and what it was asked."""

    endpoint: str
    faults: list[tuple[str, Fault]] = field(default_factory=list)
    """Pattern of a request (``Request.matches``) and what goes wrong with the next such, once."""
    outage: Fault | None = None
    """What goes wrong with every request, until it is None again."""
    delay_seconds: float = 0.0
    """How long every answer takes longer."""
    before: Callable[[Request], Fault | None] = lambda request: None
    """Called before a request is forwarded; a fault that it returns happens."""
    after: Callable[[Request], None] = lambda request: None
    """Called when the server has carried a request out, before its answer is passed on."""
    requests: list[Request] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    """What the server answered, by the number of the request; nothing of those that were not carried out."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def methods(self) -> list[str]:
        """The methods of all requests."""
        return [request.method for request in self.requests]

    def count(self, pattern: str) -> int:
        """How many requests matched a pattern."""
        return sum(request.matches(pattern) for request in self.requests)

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """Let every request fail until the block is left."""
        self.outage = fault
        try:
            yield
        finally:
            self.outage = None

    def fail_for(self, fault: Fault, seconds: float) -> None:
        """Let every request fail for so long, from now."""
        self.outage = fault
        timer = threading.Timer(seconds, setattr, (self, "outage", None))
        timer.daemon = True
        timer.start()

    def note(self, method: str, path: str) -> Request:
        """Count a request."""
        with self.lock:
            request = Request(len(self.requests) + 1, method, path)
            self.requests.append(request)
        return request

    def next_fault(self, request: Request) -> Fault | None:
        """Return what is to go wrong with a request."""
        if (fault := self.before(request)) is not None:
            return fault
        with self.lock:
            for position, (pattern, fault) in enumerate(self.faults):
                if request.matches(pattern):
                    del self.faults[position]
                    return fault
        return self.outage


@contextmanager
def faulty_proxy(backend: str) -> Iterator[Proxy]:
    """Run a proxy in front of the server at ``backend`` until the block is left."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.backend = urlsplit(backend).netloc
        server.proxy = Proxy(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.proxy
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    backend: str
    proxy: Proxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that die in the middle of a request: that is what the tests are about."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = self.server.proxy.note(self.command, self.path)
        fault = self.server.proxy.next_fault(request)
        if fault is Fault.REQUEST_LOST:
            self.close_connection = True
        elif fault is Fault.RESET:
            self.reset()
        elif fault in REFUSALS:
            self.answer_error(*REFUSALS[fault])
        else:
            self.forward(request, body, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_request  # noqa: N815

    def forward(self, request: Request, body: bytes, fault: Fault | None) -> None:
        if fault is Fault.CORRUPTED:
            body = body[:-1] + bytes([body[-1] ^ 1])
        status, headers, content = self.ask_backend(body)
        if fault is Fault.REPEATED:
            status, headers, content = self.ask_backend(body)
        self.server.proxy.statuses[request.number] = status
        self.server.proxy.after(request)
        if fault is Fault.ANSWER_LOST:
            self.close_connection = True
        else:
            self.answer(status, headers, content, truncated=fault is Fault.TRUNCATED)

    def ask_backend(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        with closing(http.client.HTTPConnection(self.server.backend, timeout=30)) as connection:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"expect", "connection"}:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return response.status, headers, response.read()

    def answer_error(self, status: int, code: str) -> None:
        error = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>secret text</Message></Error>"
        self.answer(status, {"content-type": "application/xml"}, error.encode())

    def answer(self, status: int, headers: dict[str, str], content: bytes, *, truncated: bool = False) -> None:
        time.sleep(self.server.proxy.delay_seconds)
        self.send_response_only(status)
        length = headers.get("content-length") if self.command == "HEAD" else None
        for name, value in {**headers, "content-length": length or str(len(content))}.items():
            if name not in {"transfer-encoding", "connection"}:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if truncated else content)
        self.close_connection |= truncated

    def reset(self) -> None:
        """End the connection without the usual farewell: what was under way is lost on both sides."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass
