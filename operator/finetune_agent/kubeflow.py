"""Speaks the HTTP dialect of transformers' KubeflowCallback, so that unmodified Trainer, TRL and axolotl scripts show progress.

transformers (>= 5) adds the callback by itself when KUBEFLOW_TRAINER_SERVER_URL is set; it reads the token from the file
KUBEFLOW_TRAINER_SERVER_TOKEN and, at most every five seconds, POSTs from rank 0::

    {"trainerStatus": {"progressPercentage": 40, "estimatedRemainingSeconds": 12, "lastUpdatedTime": "…",
                       "metrics": [{"name": "current_step", "value": "4"}, {"name": "loss", "value": "0.7"}, …]}}

(``integration_utils.KubeflowCallback``, 5.23.0.) Loopback without TLS; on the host's network other pods share it, hence
the token, a new one for each generation, which also tells a late post of the old one. One request at a time: there is
one client.
"""

import json
import math
import secrets
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer
from typing import Any, Dict, Optional, Tuple

from finetune_agent.beats import Board
from finetune_api.protocol import Evaluation, Metric, Progress

BODY_BYTES = 65536
REQUEST_SECONDS = 2.0
METRICS_LIMIT = 64
NAME_LIMIT = 128
# What the Trainer logs under eval_ and is no metric.
TIMINGS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_jit_compilation_time")


class KubeflowServer:
    """The server; levels go to the board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._token = secrets.token_urlsafe(32)
        self._generation = 0
        self._evaluated: Dict[str, float] = {}
        self._last = Progress(step=0)
        # Not HTTPServer: it looks up a name for its address, which takes seconds where DNS is broken.
        self._server = TCPServer(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        """Where workers post."""
        return "http://127.0.0.1:" + str(self._server.server_address[1]) + "/"

    def begin(self, generation: int, folder: Path) -> str:
        """Expect a new generation; return the path of its token."""
        self._token = secrets.token_urlsafe(32)
        self._generation, self._evaluated, self._last = generation, {}, Progress(step=0)
        file = folder / "kubeflow-token"
        file.touch(mode=0o600)
        file.write_text(self._token, encoding="utf-8")
        return str(file)

    def run(self) -> None:
        """Serve for ever."""
        self._server.serve_forever()

    def accept(self, authorization: str, body: bytes) -> int:
        """Take one post and return the HTTP status for it."""
        generation = self._generation
        if not secrets.compare_digest(authorization.encode(), ("Bearer " + self._token).encode()):
            return 401
        try:
            status = json.loads(body)["trainerStatus"]
            numbers = read_metrics(status)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return 400
        self._last, evaluation = self._interpret(status, numbers)
        self._board.put(generation, progress=self._last, **({"evaluation": evaluation} if evaluation else {}))
        return 200

    def _interpret(self, status: Dict[str, Any], numbers: Dict[str, float]) -> Tuple[Progress, Optional[Evaluation]]:
        progress = read_progress(status, numbers, self._last)
        evaluated = {name: value for name, value in numbers.items() if name.startswith("eval_") and name not in TIMINGS}
        if not evaluated or evaluated == self._evaluated:
            return progress, None
        self._evaluated = evaluated
        metrics = [Metric(name[len("eval_") :][:NAME_LIMIT], value) for name, value in evaluated.items()]
        return progress, Evaluation(progress.step, metrics[:METRICS_LIMIT])

    def _handler(self) -> Any:
        server = self

        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_SECONDS

            def do_POST(self) -> None:
                length = self.headers.get("Content-Length", "")
                if not length.isdigit() or int(length) > BODY_BYTES:
                    self.send_error(413)
                    return
                status = server.accept(self.headers.get("Authorization", ""), self.rfile.read(int(length)))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name is http.server's
                """Say nothing: the log belongs to the workers."""

        return Handler


def read_metrics(status: Dict[str, Any]) -> Dict[str, float]:
    """Return the finite numbers among a post's metrics, which come as strings."""
    numbers = {}
    for metric in status.get("metrics") or []:
        try:
            value = float(metric["value"])
        except ValueError:
            continue
        if math.isfinite(value):
            numbers[str(metric["name"])] = value
    return numbers


def read_progress(status: Dict[str, Any], numbers: Dict[str, float], last: Progress) -> Progress:
    """Return the progress in a post. The last post of a training names no step: it is then at its end."""
    total = int(numbers["total_steps"]) if "total_steps" in numbers else last.total_steps
    finished = status.get("progressPercentage") == 100
    step = numbers.get("current_step", total if finished and total else last.step)
    remaining = status.get("estimatedRemainingSeconds")
    return Progress(
        step=int(step),
        total_steps=total,
        epoch=numbers.get("current_epoch", numbers.get("epoch", last.epoch)),
        loss=numbers.get("loss", numbers.get("train_loss", last.loss)),
        learning_rate=numbers.get("learning_rate", last.learning_rate),
        gradient_norm=numbers.get("grad_norm", last.gradient_norm),
        remaining_seconds=float(remaining) if isinstance(remaining, (int, float)) else None,
    )
