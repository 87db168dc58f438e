"""Small parts on their own: output, ports, backoff, the size of reports, when a report is due."""

import json
import os
import random
import socket
from dataclasses import replace

import pytest

from finetune_agent import environment, ports, processes, worker
from finetune_agent.beats import Board, Levels
from finetune_agent.launcher import bracketed
from finetune_agent.reporting import Backoff, Orders, Reporter, Unavailable, encode, fit
from finetune_agent.worker import Printer
from finetune_api.contract import MESSAGE_LIMIT, REPORT_BYTES_LIMIT
from finetune_api.protocol import (
    Action,
    AgentState,
    Beat,
    BeatKind,
    Checkpoint,
    CheckpointWish,
    Exit,
    Heartbeat,
    Order,
    Phase,
    Progress,
    Report,
    Resumed,
    ResumeSource,
    Saves,
    from_wire,
    to_wire,
)


@pytest.fixture
def printer():
    """A printer of rank 3; ``printed()`` is what it wrote."""
    read, write = os.pipe()
    printer = Printer("3", write)

    def printed():
        os.close(write)
        with os.fdopen(read, "rb") as file:
            return file.read()

    printer.printed = printed
    return printer


def test_lines_come_whole_under_their_rank(printer):
    for piece in (b"one\ntw", b"o\r\nth", b"ree"):
        printer.feed(piece)
    printer.finish()
    assert printer.tail() == "one\ntwo\nthree"
    assert printer.printed() == b"[rank 3] one\n[rank 3] two\n[rank 3] three\n"


def test_a_progress_bar_is_thinned_out_but_for_its_last_state(printer):
    printer.feed(b"".join(b"\r%d%%" % percent for percent in range(100)) + b"\r100%\n")
    assert printer.tail() == "100%"
    lines = printer.printed().splitlines()
    assert (lines[0], lines[-1], len(lines)) == (b"[rank 3] 0%", b"[rank 3] 100%", 2)


def test_the_tail_is_bounded_and_free_of_control_characters(printer):
    printer.feed(b"\x1b[31mred\x1b[0m\x00\x07\tend\n")
    assert printer.tail() == "red\tend"
    printer.feed(b"y" * 50000 + b"\n" + b"x\n" * 50)
    assert len(printer.tail().splitlines()) == 20
    assert len(printer.tail()) <= 4096


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("Traceback\n  x\ntorch.OutOfMemoryError: 3 GiB\nwarning: leak", "torch.OutOfMemoryError: 3 GiB"),
        ("one\ntwo\n\n", "two"),
        ("", ""),
    ],
)
def test_the_message_of_an_end(tail, message):
    assert worker.error_message(None, tail) == message


def test_a_message_that_is_too_long_for_the_agent_is_cut(tmp_path):
    file = tmp_path / "error.json"
    file.write_text(json.dumps({"message": {"message": "Missing key(s) in state_dict: " + "x" * 300_000}}))
    message = worker.error_message(str(file), "")
    assert (message[:14], len(message)) == ("Missing key(s)", MESSAGE_LIMIT)


def report(**changes) -> Report:
    return Report(
        **{
            "pod_uid": "u",
            "instance": "i",
            "agent_version": "1",
            "generation": 1,
            "state": AgentState.FAILED,
            "address": "a",
            "port": 1,
            **changes,
        }
    )


@pytest.mark.parametrize("count", [1, 16, 64, 2000])
def test_a_report_fits_and_keeps_the_first_exit(count):
    exits = [Exit(1, rank, 1, None, "é" * 1024, "\x01" * 4096) for rank in range(count)]
    body = fit(report(exits=exits))
    assert len(body) <= REPORT_BYTES_LIMIT
    assert from_wire(Report, json.loads(body)).exits[0].rank == 0


def test_a_report_that_fits_is_left_alone():
    whole = report(exits=[Exit(1, 0, 1, None, "message", "tail"), Exit(1, 1, 1)])
    assert fit(whole) == encode(whole)


def test_backoff_doubles_to_a_limit_and_starts_over():
    backoff = Backoff()
    waits = [backoff.failed(Unavailable("away")) for _ in range(12)]
    assert 0.1 <= waits[0] <= 0.2
    assert all(2.5 <= wait <= 5 for wait in waits[6:])
    backoff.succeeded()
    assert backoff.failed(Unavailable("away")) <= 0.2


def test_a_follower_is_asked_again_soon():
    backoff = Backoff()
    assert max(backoff.failed(Unavailable("not leader", 503)) for _ in range(12)) <= 1


def test_orders_are_news_once_and_never_go_back_but_for_finish():
    heard = []
    orders = Orders(heard.append)
    run, older, finish = Order(Action.RUN, 2), Order(Action.WAIT, 1), Order(Action.FINISH, 0)
    assert [orders.hear(order) for order in (None, run, run, older, finish, finish)] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    assert heard == [run, finish]


def test_an_order_that_differs_in_what_the_next_generation_is_to_do_is_news_once():
    heard = []
    orders = Orders(heard.append)
    run = Order(Action.RUN, 2, checkpoint=CheckpointWish(interval_steps=50))
    edited = replace(run, checkpoint=CheckpointWish(interval_steps=7))
    assert [orders.hear(order) for order in (run, edited, edited)] == [True, True, False]
    assert heard == [run, edited]


@pytest.mark.parametrize(
    ("before", "after", "seconds"),
    [
        (None, report(), 0),
        (report(), report(state=AgentState.RUNNING), 0),
        (report(), report(exits=[Exit(1, 0, 1)]), 0),
        (report(), report(progress=Progress(3)), 2),
        (report(), report(heartbeat=Heartbeat(Phase.TRAINING, 3)), 2),
        (report(), report(saves=Saves(saving_step=3)), 2),
        (report(), report(resumed=Resumed(3, ResumeSource.STORAGE)), 0),
        (report(), report(), 10),
    ],
)
def test_a_report_is_due(before, after, seconds):
    reporter = Reporter(None, None, clock=lambda: 100.0)
    reporter.publish(after)
    reporter._posted, reporter._posted_at = before, 100.0
    assert reporter._seconds_until_due() == seconds


def test_a_proposed_port_is_free_and_out_of_the_way_of_outgoing_connections():
    port = ports.propose_port(random.Random(1))
    assert port in ports.PORTS
    with socket.create_server(("", port)):
        assert not ports.is_free(port)
        assert ports.propose_port(random.Random(1)) != port


def test_levels_nudge_once_until_they_are_taken():
    nudges = []
    board = Board(lambda: nudges.append(1))
    board.begin(1, range(1))
    for step in range(100):
        board.put(1, progress=Progress(step))
    assert (len(nudges), board.take().progress) == (1, Progress(99))
    board.put(1, progress=Progress(100))
    board.put(0, progress=Progress(101))
    assert (len(nudges), board.take().progress) == (2, Progress(100))


LEVELS = {
    BeatKind.HEARTBEAT: Heartbeat(Phase.TRAINING, 3),
    BeatKind.PROGRESS: Progress(3),
    BeatKind.CHECKPOINT: Checkpoint(3, "s3://b/c", 1, "2026-01-01T00:00:00Z"),
    BeatKind.SAVES: Saves(saving_step=4, put_off=2, stall_seconds=0.25),
    BeatKind.RESUMED: Resumed(2, ResumeSource.MEMORY, skipped_samples=8, rollbacks=1),
}


@pytest.mark.parametrize("kind", LEVELS)
def test_what_a_worker_tells_is_a_level_until_the_next_generation(kind):
    board = Board(lambda: None)
    board.begin(1, range(1))
    beat = Beat(kind, 0, 1, **{kind.value: LEVELS[kind]})
    board.hear(json.dumps(to_wire(beat)).encode())
    assert replace(board.take(), pulses={}) == Levels(**{kind.value: LEVELS[kind]})
    board.begin(2, range(1))
    assert board.take() == Levels()


def test_beat_and_report_carry_the_same_levels():
    names = {kind.value for kind in BeatKind} - {"failure"}
    assert names == set(Levels.__dataclass_fields__) - {"pulses"}
    for message in (Beat, Report):
        assert names <= set(message.__dataclass_fields__)


def test_a_long_answer_of_a_store_is_cut_before_the_job_server_has_to_refuse_it():
    board = Board(lambda: None)
    board.begin(1, range(1))
    for kind, level in (
        ("saves", {"message": "x" * 4000}),
        ("resumed", {"step": 1, "source": "Storage", "fallback": "y" * 4000}),
    ):
        board.hear(json.dumps({"kind": kind, "rank": 0, "generation": 1, kind: level}).encode())
    levels = board.take()
    assert (len(levels.saves.message), len(levels.resumed.fallback)) == (MESSAGE_LIMIT, MESSAGE_LIMIT)


SECRET = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.mark.parametrize(
    ("files", "credentials"),
    [
        pytest.param(SECRET, SECRET, id="a secret as it is"),
        pytest.param(
            {**SECRET, "AWS_SESSION_TOKEN": "t"}, {**SECRET, "AWS_SESSION_TOKEN": "t"}, id="with a session token"
        ),
        pytest.param({**SECRET, "OTHER": "x"}, SECRET, id="and nothing else of it"),
        pytest.param({"AWS_ACCESS_KEY_ID": "key"}, None, id="half a secret is none"),
        pytest.param({}, None, id="a secret that is gone"),
    ],
)
@pytest.mark.parametrize("swapped", [True, False], ids=["as a kubelet mounts it", "as plain files"])
def test_the_credentials_of_a_generation_are(tmp_path, files, credentials, swapped):
    folder = tmp_path / "..2026" if swapped else tmp_path
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    if swapped:
        (tmp_path / "..data").symlink_to("..2026")
    assert environment.read_credentials(tmp_path) == credentials


def test_no_secret_is_mounted_for_a_job_that_names_none(tmp_path):
    assert environment.read_credentials(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("address", "written"), [("10.0.0.1", "10.0.0.1"), ("::1", "[::1]"), ("[::1]", "[::1]")])
def test_an_address_before_a_port(address, written):
    assert bracketed(address) == written


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_cpu_limit_of_a_cgroup(tmp_path, monkeypatch, files, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(environment, "CGROUP", tmp_path)
    usable = float(len(os.sched_getaffinity(0)))
    assert environment.available_cpus() == (usable if cpus is None else min(cpus, usable))


def test_only_the_living_below_a_process_are_its_descendants():
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
    assert ended not in processes.descendants(os.getpid())
    os.waitpid(ended, 0)


def test_reports_are_counted_those_that_did_not_arrive_too(monkeypatch):
    class Enough(BaseException):
        pass

    class Server:
        def __init__(self):
            self.numbers = []

        def report(self, body):
            self.numbers.append(from_wire(Report, json.loads(body)).number)
            if len(self.numbers) == 3:
                raise Enough
            raise Unavailable("away")

    monkeypatch.setattr("finetune_agent.reporting.time.sleep", lambda seconds: None)
    server = Server()
    reporter = Reporter(server, Orders(lambda order: None))
    reporter.publish(report())
    with pytest.raises(Enough):
        reporter.run()
    assert server.numbers == [1, 2, 3]
