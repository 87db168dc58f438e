"""An API server that says what a test has it say, for what a real one cannot be made to do: to break off, to be away, to talk nonsense."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml


@dataclass(frozen=True)
class Answer:
    """One answer. ``breaks``: the connection ends in the middle of the last chunk."""

    status: int = 200
    chunks: Sequence[str] = ()
    breaks: bool = False


def document(body: Any, status: int = 200) -> Answer:
    return Answer(status, [json.dumps(body)])


def refusal(status: int, message: str, **details: Any) -> Answer:
    return document({"kind": "Status", "code": status, "message": message, "details": details}, status)


def listing(*items: Any) -> Answer:
    return document({"metadata": {}, "items": list(items)})


def watched(*events: tuple[str, Any]) -> Answer:
    return Answer(200, [json.dumps({"type": kind, "object": body}) + "\n" for kind, body in events])


@dataclass
class StandIn:
    """Answers by path; the last answer of a path is given again and again. ``asked`` has every request: path and query."""

    kubeconfig: Path
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def on(self, path: str, *answers: Answer) -> None:
        self.answers[path] = list(answers)

    def next(self, path: str, query: dict[str, str]) -> Answer:
        self.asked.append((path, query))
        kind = f"{path}?previous" if "previous" in query else f"{path}?watch" if "watch" in query else path
        answers = self.answers.get(kind, [refusal(404, "not found")])
        return answers.pop(0) if len(answers) > 1 else answers[0]


@contextmanager
def standing_in(folder: Path) -> Iterator[StandIn]:
    kubeconfig = folder / "kubeconfig"
    stand_in = StandIn(kubeconfig)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with suppress(ConnectionError):  # whoever asked has gone
                self._answer()

        def _answer(self) -> None:
            url = urlsplit(self.path)
            answer = stand_in.next(url.path, dict(parse_qsl(url.query)))
            self.send_response(answer.status)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for chunk in answer.chunks:
                raw = chunk.encode()
                self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
            if answer.breaks:
                self.wfile.write(b"ff\r\nhalf a li")
                self.close_connection = True
            else:
                self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    write_kubeconfig(kubeconfig, f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()


def write_kubeconfig(file: Path, server: str, namespace: str = "team-a") -> None:
    """Write a kubeconfig of one context, ``here``."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
    }
    file.write_text(yaml.safe_dump(document))
