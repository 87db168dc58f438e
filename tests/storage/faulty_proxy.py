"""An HTTP proxy in front of an S3 server that misbehaves on demand, since a healthy server cannot be made to.

Requests are forwarded byte by byte with their headers, Host included, so that signatures hold. For each request the first fault whose
method matches is taken off the list: a fault happens once.
"""

import http.client
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Fault(Enum):
    """What may go wrong with one request."""

    ANSWER_LOST = auto()  # carried out, but the connection closes without an answer
    REQUEST_LOST = auto()  # not carried out, and the connection closes
    SLOW_DOWN = auto()  # not carried out, 503
    CONFLICT = auto()  # not carried out, 409
    REPEATED = auto()  # carried out twice, the second answer is given
    TRUNCATED = auto()  # half of the body, then the connection closes


@dataclass
class Proxy:
    """Where the proxy listens, what it will do wrong next, and what it was asked."""

    endpoint: str
    faults: list[tuple[str, Fault]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self, method: str) -> Fault | None:
        """Note a request and return what is to go wrong with it."""
        with self.lock:
            self.requests.append(method)
            for position, (wanted, fault) in enumerate(self.faults):
                if wanted == method:
                    del self.faults[position]
                    return fault
        return None


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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.proxy.next_fault(self.command)
        if fault is Fault.REQUEST_LOST:
            self.close_connection = True
        elif fault is Fault.SLOW_DOWN:
            self.answer_error(503, "SlowDown")
        elif fault is Fault.CONFLICT:
            self.answer_error(409, "ConditionalRequestConflict")
        else:
            self.forward(body, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_request  # noqa: N815

    def forward(self, body: bytes, fault: Fault | None) -> None:
        status, headers, content = self.ask_backend(body)
        if fault is Fault.REPEATED:
            status, headers, content = self.ask_backend(body)
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
        self.send_response_only(status)
        length = headers.get("content-length") if self.command == "HEAD" else None
        for name, value in {**headers, "content-length": length or str(len(content))}.items():
            if name not in {"transfer-encoding", "connection"}:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if truncated else content)
        self.close_connection |= truncated

    def log_message(self, *arguments: object) -> None:
        pass
