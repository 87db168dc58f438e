"""An HTTP proxy in front of an S3 server that misbehaves on demand, since a healthy server cannot be made to.

Requests are forwarded byte by byte with their headers, Host included, so that signatures hold. For each request the first fault whose
method matches is taken off the list: a fault happens once.
"""

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    faults: list[tuple[str, Fault]]
    requests: list[str]


@contextmanager
def faulty_proxy(backend: str) -> Iterator[Proxy]:
    """Run a proxy in front of the server at ``backend`` until the block is left."""
    target = urlsplit(backend)
    proxy = Proxy("", [], [])
    lock = threading.Lock()

    def next_fault(method: str) -> Fault | None:
        with lock:
            proxy.requests.append(method)
            for position, (wanted, fault) in enumerate(proxy.faults):
                if wanted == method:
                    del proxy.faults[position]
                    return fault
        return None

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = next_fault(self.command)
            if fault is Fault.REQUEST_LOST:
                self.close_connection = True
            elif fault in {Fault.SLOW_DOWN, Fault.CONFLICT}:
                status, code = (503, "SlowDown") if fault is Fault.SLOW_DOWN else (409, "ConditionalRequestConflict")
                error = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>secret text</Message></Error>".encode()
                self.answer(status, [("Content-Type", "application/xml")], error)
            else:
                self.forward(body, fault)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_request  # noqa: N815

        def forward(self, body: bytes, fault: Fault | None) -> None:
            for _ in range(2 if fault is Fault.REPEATED else 1):
                backend_connection = http.client.HTTPConnection(target.hostname, target.port, timeout=30)
                backend_connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in {"expect", "connection"}:
                        backend_connection.putheader(name, value)
                backend_connection.endheaders(body)
                response = backend_connection.getresponse()
                content = response.read()
                backend_connection.close()
            if fault is Fault.ANSWER_LOST:
                self.close_connection = True
                return
            self.answer(response.status, response.getheaders(), content, truncated=fault is Fault.TRUNCATED)

        def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, truncated: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                    self.send_header(name, value)
            length = dict((name.lower(), value) for name, value in headers).get("content-length", str(len(content)))
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if truncated else content)
            self.close_connection |= truncated

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
