"""What a worker tells its agent, and what rank 0 prints.

Beats are datagrams to a Unix socket. Sending never fails: no agent, a dead one or a full queue (ten datagrams on many machines) cost a beat and
nothing else. Heartbeats and progress, which the next one replaces, are not even waited for; the rare others, which nothing repeats, and the
last step's are tried again for up to half a second when the queue is full.
"""

import json
import math
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from finetune_api import contract
from finetune_api.protocol import (
    Beat,
    BeatKind,
    Checkpoint,
    Evaluation,
    Exit,
    Heartbeat,
    Metric,
    Model,
    Phase,
    Progress,
    Resumed,
    Saves,
    to_wire,
)

QUEUE_SECONDS = 0.5
"""How long a beat that nothing repeats waits for room in the agent's queue."""

REPLACED = (BeatKind.HEARTBEAT, BeatKind.PROGRESS)

PRINT_SECONDS = 3.0
"""Rank 0 prints at most one line of progress in so many seconds; a log is read by people."""


class Reporter:
    """Sends beats of one rank; on rank 0 it prints as well."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.rank = int(environment.get("RANK", "0"))
        generation = environment.get(contract.GENERATION, "")
        self._generation = int(generation) if generation.isdigit() else 0
        self._address = environment.get(contract.PROGRESS_SOCKET)
        self._socket: socket.socket | None = None
        self._phase = Phase.INITIALIZING
        self._step = 0
        self._printed = -math.inf

    def phase(self, phase: Phase, step: int | None = None, *, busy_seconds: float | None = None) -> None:
        """Tell that this rank is alive, what it does, how many steps are done, and what the newest took of this rank alone."""
        self._phase = phase
        self._step = self._step if step is None else step
        self._send(BeatKind.HEARTBEAT, heartbeat=Heartbeat(phase=phase, step=self._step, busy_seconds=busy_seconds))

    def alive(self) -> None:
        """Repeat the newest heartbeat, between two parts of something long."""
        self.phase(self._phase)

    def progress(self, progress: Progress) -> None:
        """Tell how far training is (rank 0)."""
        if self.rank != 0:
            return
        is_last = progress.step == progress.total_steps
        self._send(BeatKind.PROGRESS, is_last=is_last, progress=_finite(progress))
        now = time.monotonic()
        if now - self._printed >= PRINT_SECONDS or is_last:
            self._printed = now
            self.say(_progress_line(progress))

    def evaluation(self, evaluation: Evaluation) -> None:
        """Tell the result of an evaluation (rank 0)."""
        if self.rank != 0:
            return
        told = Evaluation(evaluation.step, [metric for metric in evaluation.metrics if math.isfinite(metric.value)])
        self._send(BeatKind.EVALUATION, evaluation=told)
        self.say(f"evaluation at step {evaluation.step}: {metrics_text(evaluation.metrics)}")

    def newest_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Tell which committed checkpoint is the newest (rank 0)."""
        if self.rank == 0:
            self._send(BeatKind.CHECKPOINT, checkpoint=checkpoint)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Tell of a checkpoint that was just committed (rank 0)."""
        if self.rank != 0:
            return
        self.newest_checkpoint(checkpoint)
        self.say(f"checkpoint of step {checkpoint.step} committed: {checkpoint.uri} ({checkpoint.size_bytes:,} bytes)")

    def saves(self, saves: Saves) -> None:
        """Tell how saving goes (rank 0)."""
        if self.rank == 0:
            self._send(BeatKind.SAVES, saves=saves)

    def resumed(self, resumed: Resumed) -> None:
        """Tell where this generation starts (rank 0)."""
        if self.rank != 0:
            return
        self._send(BeatKind.RESUMED, resumed=resumed)
        if resumed.fallback:
            self.say(f"falling back to step {resumed.step}: {resumed.fallback}")

    def model(self, uri: str) -> None:
        """Tell where the result is (rank 0)."""
        if self.rank != 0:
            return
        self._send(BeatKind.MODEL, model=Model(uri=uri))
        self.say(f"model uploaded: {uri}")

    def failure(self, exit_code: int, message: str) -> None:
        """Tell why this worker is about to exit."""
        line = one_line(message)
        told = Exit(generation=self._generation, rank=self.rank, exit_code=exit_code, message=line)
        self._send(BeatKind.FAILURE, failure=told)

    def say(self, line: str) -> None:
        """Print one line on rank 0."""
        if self.rank == 0:
            print(line, flush=True)  # noqa: T201  the log of a training pod is its standard output

    def _send(self, kind: BeatKind, *, is_last: bool = False, **member: object) -> None:
        if self._address is None:
            return
        beat = Beat(kind=kind, rank=self.rank, generation=self._generation, **member)  # type: ignore[arg-type]
        body = json.dumps(to_wire(beat), separators=(",", ":")).encode()
        deadline = time.monotonic() + (0 if kind in REPLACED and not is_last else QUEUE_SECONDS)
        while True:
            try:
                self._open().sendto(body, self._address)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return
                time.sleep(0.01)
            except OSError:
                return  # no agent listens
            else:
                return

    def _open(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        return self._socket


def one_line(message: str) -> str:
    """Return the message as one line of at most the contract's length."""
    line = " ".join(message.split())
    limit = contract.MESSAGE_LIMIT
    return line if len(line) <= limit else line[: limit - 1] + "…"


def metrics_text(metrics: list[Metric]) -> str:
    """Return metrics as people read them."""
    return ", ".join(f"{metric.name} {metric.value:.4f}" for metric in metrics)


def _finite(progress: Progress) -> Progress:
    """Return the progress without numbers that JSON has no word for."""
    odd = {
        name: None for name, value in vars(progress).items() if isinstance(value, float) and not math.isfinite(value)
    }
    told: Progress = replace(cast("Any", progress), **odd)
    return told


def _progress_line(progress: Progress) -> str:
    parts = [f"step {progress.step}/{progress.total_steps}"]
    if progress.epoch is not None:
        parts.append(f"epoch {progress.epoch:.2f}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.gradient_norm is not None:
        parts.append(f"gradient norm {progress.gradient_norm:.3f}")
    if progress.learning_rate is not None:
        parts.append(f"learning rate {progress.learning_rate:.2e}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.remaining_seconds is not None:
        parts.append(f"{progress.remaining_seconds:,.0f} s left")
    return ", ".join(parts)
