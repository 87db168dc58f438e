"""Beats: what is sent, and that sending never blocks and never fails."""

import contextlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_api import contract
from finetune_api.protocol import Beat, BeatKind, Evaluation, Metric, Phase, Progress, from_wire
from finetune_trainer.progress import Reporter, one_line
from tests.trainer.launch import listening


def reporter(folder: Path, *, rank: int = 0) -> Reporter:
    return Reporter({"RANK": str(rank), contract.GENERATION: "3", contract.PROGRESS_SOCKET: str(folder / "beats")})


def test_every_rank_tells_that_it_lives_and_why_it_ends_and_rank_0_the_rest(tmp_path: Path) -> None:
    with listening(tmp_path / "beats") as listener:
        for rank in (0, 1):
            worker = reporter(tmp_path, rank=rank)
            worker.phase(Phase.TRAINING, 4)
            worker.alive()
            worker.progress(Progress(step=4, total_steps=9, loss=0.5))
            worker.evaluation(Evaluation(step=4, metrics=[Metric("loss", 0.5)]))
            worker.model("s3://b/p/model")
            worker.failure(65, "bad\ndata")
    kinds = {rank: [beat.kind for beat in listener.beats if beat.rank == rank] for rank in (0, 1)}
    beats_of_all = [BeatKind.HEARTBEAT, BeatKind.HEARTBEAT, BeatKind.FAILURE]
    assert kinds[1] == beats_of_all
    assert kinds[0] == [*beats_of_all[:2], BeatKind.PROGRESS, BeatKind.EVALUATION, BeatKind.MODEL, BeatKind.FAILURE]
    assert {beat.generation for beat in listener.beats} == {3}
    assert listener.of(BeatKind.HEARTBEAT)[1].step == 4
    assert listener.of(BeatKind.FAILURE)[0].message == "bad data"


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    with listening(tmp_path / "beats") as listener:
        worker = reporter(tmp_path)
        worker.progress(Progress(step=1, loss=float("nan"), gradient_norm=float("inf"), learning_rate=0.1))
        worker.evaluation(Evaluation(1, [Metric("loss", 1.0), Metric("perplexity", float("inf"))]))
    assert listener.progress == [Progress(step=1, learning_rate=0.1)]
    assert listener.of(BeatKind.EVALUATION) == [Evaluation(1, [Metric("loss", 1.0)])]


def test_no_agent_costs_nothing(tmp_path: Path) -> None:
    reporter(tmp_path).phase(Phase.TRAINING, 1)
    Reporter({}).phase(Phase.TRAINING, 1)


def test_an_agent_that_does_not_read_costs_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "beats"))
        worker = reporter(tmp_path)
        for step in range(5000):  # more than any queue holds
            worker.phase(Phase.TRAINING, step)
        deaf.setblocking(False)
        kept = []
        with contextlib.suppress(BlockingIOError):
            while True:
                kept.append(deaf.recv(65536))
    assert 0 < len(kept) < 5000, "the queue was full, and the worker went on"


@pytest.mark.parametrize(
    ("tell", "kind"),
    [
        pytest.param(lambda worker: worker.model("s3://b/p/model"), BeatKind.MODEL, id="where the model is"),
        pytest.param(lambda worker: worker.progress(Progress(step=9, total_steps=9)), BeatKind.PROGRESS, id="the last step"),
    ],
)  # fmt: skip
def test_what_nothing_repeats_waits_for_room_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Callable[[Reporter], None], kind: BeatKind
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as slow:
        slow.bind(str(tmp_path / "beats"))
        worker = reporter(tmp_path)
        for step in range(5000):
            worker.phase(Phase.TRAINING, step)
        monkeypatch.setattr(time, "sleep", lambda _: slow.recv(65536))  # the agent reads while the worker waits
        tell(worker)
        slow.setblocking(False)
        received = []
        with contextlib.suppress(BlockingIOError):
            while True:
                received.append(from_wire(Beat, json.loads(slow.recv(65536))))
    assert received[-1].kind == kind


def test_an_agent_that_restarts_is_heard_again(tmp_path: Path) -> None:
    worker = reporter(tmp_path)
    for step in (1, 2):
        with listening(tmp_path / "beats") as listener:
            worker.phase(Phase.TRAINING, step)
        assert [beat.step for beat in listener.of(BeatKind.HEARTBEAT)] == [step]
        (tmp_path / "beats").unlink()


@pytest.mark.parametrize(
    ("message", "line"),
    [("a\n  b\tc", "a b c"), ("x" * 2000, "x" * (contract.MESSAGE_LIMIT - 1) + "…"), ("", "")],
)
def test_messages_are_one_bounded_line(message: str, line: str) -> None:
    assert one_line(message) == line


def test_rank_0_prints_seldom_but_always_the_last_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    worker = reporter(tmp_path)
    for step in range(1, 101):
        worker.progress(Progress(step=step, total_steps=100, loss=0.5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/100, loss 0.5000"
    assert lines[-1] == "step 100/100, loss 0.5000"
    assert len(lines) < 10
