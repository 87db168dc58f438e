"""One agent in its container, with workers that need no torch: what it does about orders, ends and the job server."""

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_agent import ports
from finetune_agent.reporting import KEEPALIVE, Access, HttpsJobServer
from finetune_api.contract import MESSAGE_LIMIT, ORDER_POLL_SECONDS, REPORT_BYTES_LIMIT, ExitCode
from finetune_api.protocol import Action, AgentState, CheckpointWish, JobCheckpoint, JobStorage, Order, to_wire
from tests.agent.job_server import make_certificates
from tests.agent.pod import command_line, is_agent, is_alive, wait_for

WORKER = Path(__file__).parent / "scripts" / "worker.py"
FAKE_TORCH = Path(__file__).parent / "fake_torch"
SLEEP = ("ready()", "time.sleep(1000)")
OLD_PYTHON = Path.home() / ".pyenv/versions/3.8.18/bin/python3"
OLDEST_PYTHON = Path.home() / ".pyenv/versions/3.9.18/bin/python3"


@pytest.fixture
async def pod(server, make_pod):
    """A pod that has reported in."""
    pod = make_pod()
    start(pod)
    await server.until(lambda: pod.report)
    return pod


def start(pod, **options):
    pod.start([sys.executable, str(WORKER), str(pod.folder)], **options)


async def test_a_new_agent_reports_itself_idle_with_a_port_for_the_rendezvous(pod):
    assert (pod.report.generation, pod.report.state, pod.report.exits) == (0, AgentState.IDLE, [])
    assert (pod.report.address, pod.report.port in ports.PORTS) == ("127.0.0.1", True)


async def test_all_local_workers_must_end_with_zero_for_success(server, pod):
    pod.script(0, "ready()")
    pod.script(1, "ready()", "wait_for('go')")
    await pod.run(1, workers=2)
    await pod.pid_of(0, 1)
    await server.until(lambda: pod.report.state is AgentState.RUNNING)
    (pod.folder / "go").touch()
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED)
    await server.order(pod.uid, Order(Action.FINISH, 1))
    assert await pod.wait() == 0


async def test_a_failure_beat_gives_the_message_and_the_wait_status_the_code(server, pod):
    failure = {"generation": 1, "rank": 0, "exitCode": 65, "message": "s3://d/train.jsonl line 7: no text"}
    pod.script(0, f"beat('failure', {failure!r})", "print('bye')", "sys.exit(65)")
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.FAILED)
    (end,) = pod.report.exits
    assert (end.rank, end.exit_code, end.message) == (0, ExitCode.BAD_DATA, failure["message"])
    assert end.log_tail == "bye"


@pytest.mark.parametrize(
    ("lines", "code", "number", "message"),
    [
        pytest.param(
            ["raise ValueError('wrong')"], 1, None, "ValueError: wrong", id="the last error line of a traceback"
        ),
        pytest.param(
            ["import atexit", "atexit.register(print, 'bye')", "raise KeyError(1)"],
            1,
            None,
            "KeyError: 1",
            id="an error before other output",
        ),
        pytest.param(
            [
                "json.dump({'message': {'message': 'RuntimeError: file'}}, open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w'))",
                "sys.exit(3)",
            ],
            3,
            None,
            "RuntimeError: file",
            id="torch's error file",
        ),
        pytest.param(
            [
                "error = {'message': {'message': 'KeyError: ' + 'x' * 300000}}",
                "json.dump(error, open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w'))",
                "sys.exit(1)",
            ],
            1,
            None,
            ("KeyError: " + "x" * MESSAGE_LIMIT)[:MESSAGE_LIMIT],
            id="as much of a long message as a report holds",
        ),
        pytest.param(["os.kill(os.getpid(), 11)"], None, 11, "", id="a signal, without a word"),
        pytest.param(["print('x' * 100000)", "sys.exit('gone')"], 1, None, "gone", id="the last line"),
        pytest.param(
            ["print('[rank0]: OSError: disk')", "sys.exit(4)"], 4, None, "OSError: disk", id="under torch's prefix"
        ),
    ],
)
async def test_the_end_of_a_worker_is_told_with(server, pod, *, lines, code, number, message):
    pod.script(0, *lines)
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.FAILED)
    (end,) = pod.report.exits
    assert (end.exit_code, end.signal, end.message) == (code, number, message)
    assert len(end.log_tail) <= 4096


async def test_a_command_that_is_not_there_is_told_by_name(server, make_pod):
    pod = make_pod()
    pod.start(["/no/such/program"])
    await server.until(lambda: pod.report)
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.FAILED)
    assert (pod.report.exits[0].exit_code, pod.report.exits[0].message) == (
        127,
        "/no/such/program cannot be run: No such file or directory",
    )


async def test_orphans_and_grandchildren_in_sessions_of_their_own_end_with_their_generation(server, pod):
    pod.script("0-g1", "grandchild()", *SLEEP)
    pod.script("0-g2", "ready()")
    await pod.run(1)
    worker = await pod.pid_of(0, 1)
    grandchild = int((pod.folder / "grandchild").read_text())
    await pod.run(2)
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED)
    assert not is_alive(worker)
    assert not is_alive(grandchild)


async def test_a_worker_whose_child_holds_its_output_open_has_ended_all_the_same(server, pod):
    pod.script(0, "grandchild()", "sys.exit(5)")
    await pod.run(1)
    await server.until(lambda: pod.report.exits)
    assert pod.report.exits[0].exit_code == 5


async def test_a_killed_agent_is_replaced_its_workers_die_and_its_generation_never_runs_again(server, pod):
    pod.script(0, "grandchild()", *SLEEP)
    await pod.run(7)
    worker = await pod.pid_of(0, 7)
    before = pod.report
    agent = await pod.agent_pid()
    os.kill(agent, signal.SIGKILL)
    await server.until(lambda: pod.report.instance != before.instance)
    assert not is_alive(worker)
    assert not is_alive(int((pod.folder / "grandchild").read_text()))
    (end,) = pod.report.exits
    assert (pod.report.state, pod.report.generation) == (AgentState.FAILED, 7)
    assert (end.rank, end.exit_code, end.signal) == (-1, None, None)
    assert "agent process ended" in end.message
    assert "signal 9" in end.message

    # The server still orders 7. It is not run; 6 neither, 8 is.
    await server.order(pod.uid, replace(server.orders[pod.uid], generation=6))
    (pod.folder / "pid-7-0").unlink()
    await pod.run(8)
    await pod.pid_of(0, 8)
    assert not (pod.folder / "pid-7-0").exists()
    assert not (pod.folder / "pid-6-0").exists()


async def test_a_restarted_container_answers_for_the_generation_that_ran_in_the_last_one(server, pod):
    pod.script(0, *SLEEP)
    await pod.run(1)
    worker, before = await pod.pid_of(0, 1), pod.report.instance
    below = pod.descendants()
    pod.process.kill()
    await wait_for(lambda: not any(is_alive(pid) for pid in [worker, *below]))
    pod.process.wait()
    start(pod)
    await server.until(lambda: pod.report.instance != before)
    assert (pod.report.state, pod.report.generation, pod.report.exits[0].rank) == (AgentState.FAILED, 1, -1)


async def test_an_agent_that_is_killed_before_it_answers_sigterm_still_ends_the_container(server, pod):
    agent = await pod.agent_pid()
    os.kill(agent, signal.SIGSTOP)
    pod.process.terminate()
    os.kill(agent, signal.SIGKILL)
    assert await pod.wait() == 143


async def test_nothing_is_lost_while_the_server_is_away(server, pod):
    pod.script(
        0,
        "wait_for('go')",
        "beat('checkpoint', {'step': 5, 'uri': 's3://b/c', 'sizeBytes': 3, 'commitTime': '2026-01-01T00:00:00Z'})",
        "beat('evaluation', {'step': 5, 'metrics': [{'name': 'accuracy', 'value': 0.5}]})",
        "(folder / 'gone').touch()",
        "sys.exit(9)",
    )
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.RUNNING)
    await server.stop()
    (pod.folder / "go").touch()
    await wait_for(lambda: '"exitCode": 9' in (pod.folder / "agent/journal.json").read_text())
    os.kill(await pod.agent_pid(), signal.SIGKILL)  # not even then
    await server.start()
    await server.until(lambda: pod.report.state is AgentState.FAILED)
    assert [(end.rank, end.exit_code) for end in pod.report.exits] == [(0, 9)]
    assert (pod.report.checkpoint.step, pod.report.evaluation.metrics[0].value) == (5, 0.5)


@pytest.mark.parametrize("status", [401, 403, 404, 409, 500, 503])
async def test_a_refusal_is_no_reason_to_stop_trying(server, pod, status):
    server.refuse_with = status
    pod.script(0, *SLEEP)
    server.orders[pod.uid] = Order(Action.RUN, 1, 0, 1, 1, "127.0.0.1", pod.report.port)
    await wait_for(lambda: len(server.refusals) >= 2)
    server.refuse_with = 0
    await server.until(lambda: pod.report.state is AgentState.RUNNING)
    assert (pod.report.generation, set(server.refusals)) == (1, {status})


async def test_a_rotated_token_is_used_at_once(server, pod):
    await wait_for(lambda: server.polls)  # none with the old one is on its way
    pod.token_file.write_text("second-token")
    server.tokens = {"second-token"}
    refused = len(server.refusals)
    pod.script(0)
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED)
    assert len(server.refusals) == refused, "the old one was not tried again"


async def test_a_server_with_another_ca_or_name_is_not_spoken_to_until_the_bundle_says_so(server, pod, tmp_path):
    await server.stop()
    other = tmp_path / "other"
    other.mkdir()
    make_certificates(other)
    for name in ("server.crt", "server.key"):
        shutil.copy(other / name, tmp_path / name)
    await server.start()
    seen = server.polls, len(server.reports[pod.uid])
    await wait_for(lambda: "CERTIFICATE_VERIFY_FAILED" in pod.log)
    assert (server.polls, len(server.reports[pod.uid])) == seen
    shutil.copy(other / "ca.crt", pod.config / "ca.crt")
    await wait_for(lambda: server.polls > seen[0])


async def test_a_certificate_for_another_host_is_refused(server, make_pod, tmp_path):
    await server.stop()
    make_certificates(tmp_path, host="example.org")
    await server.start()
    pod = make_pod()
    start(pod)
    await wait_for(lambda: "Hostname mismatch" in pod.log)
    assert pod.report is None


async def test_a_poll_that_waits_finds_out_when_the_server_s_machine_dies(server, pod, tmp_path):
    """In silence, by the kernel's own questions: there is nothing to send."""
    client = HttpsJobServer(Access(server.url, pod.uid, server.ca_file, pod.token_file))
    await asyncio.to_thread(client.poll, Order(Action.RUN))
    sock = client._connection.sock
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    idle, interval, count = (sock.getsockopt(socket.IPPROTO_TCP, option) for option, _ in KEEPALIVE)
    assert 0 < idle + interval * count < ORDER_POLL_SECONDS
    client._close()


async def test_hostile_datagrams_are_ignored_and_cannot_starve_orders(server, pod):
    pod.script(
        "0-g1",
        "beat('heartbeat', {'phase': 'Training', 'step': 3})",
        *(f"raw({data!r})" for data in hostile_datagrams()),
        "ready()",
        "flood()",
    )
    pod.script("0-g2", "ready()", "time.sleep(1000)")
    await pod.run(1)
    await server.until(lambda: pod.report.heartbeat and pod.report.checkpoint and pod.report.checkpoint.step > 1000)
    assert pod.report.heartbeat.step == 3
    assert pod.report.progress is None
    await pod.run(2)
    await server.until(lambda: pod.report.generation == 2, seconds=10)
    await pod.pid_of(0, 2)


def hostile_datagrams():
    good = {"kind": "progress", "rank": 0, "generation": 1, "progress": {"step": 1}}
    return [
        b"",
        b"\x00\xff",
        b"[" * 8000,
        b"x" * 20000,
        b"null",
        json.dumps({**good, "generation": 2}).encode(),
        json.dumps({**good, "rank": 1}).encode(),
        json.dumps({**good, "kind": "heartbeat"}).encode(),
        json.dumps({**good, "evaluation": {"step": 1}}).encode(),
        json.dumps({**good, "progress": {"step": 1, "loss": float("nan")}}).encode(),
        json.dumps({**good, "progress": {"step": "1"}}).encode(),
        b'{"kind":"progress","rank":0,"generation":1,"progress":{"step":1,"loss":1e999}}',
    ]


async def test_sigterm_lets_the_worker_save_and_the_container_say_saved(server, pod):
    pod.script(0, "on_term(75)", *SLEEP)
    await pod.run(1)
    await pod.pid_of(0, 1)
    pod.process.terminate()
    assert await pod.wait() == ExitCode.SAVED
    assert pod.report.state is AgentState.STOPPED
    assert pod.termination_message() == {
        "generation": 1,
        "state": "Stopped",
        "exits": [{"rank": 0, "exitCode": 75, "signal": None}],
        "message": "",
    }


async def test_a_worker_that_cannot_take_signals_finds_a_file_when_it_is_to_save(server, pod):
    pod.script(
        "0-g1",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "assert not os.path.exists(os.environ['FINETUNE_SAVE_NOW'])",
        "ready()",
        "wait_for(os.environ['FINETUNE_SAVE_NOW'])",
        "sys.exit(75)",
    )
    pod.script("0-g2", "(folder / 'again').write_text(str(os.path.exists(os.environ['FINETUNE_SAVE_NOW'])))")
    await pod.run(1)
    await pod.pid_of(0, 1)
    await server.order(pod.uid, Order(Action.STOP, 1, grace_seconds=30))
    await server.until(lambda: pod.report.state is AgentState.STOPPED)
    assert [end.exit_code for end in pod.report.exits] == [75]
    await pod.run(2)
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED)
    assert (pod.folder / "again").read_text() == "False", "what was meant for one generation is not for the next"


async def test_a_secret_that_was_given_back_is_there_for_the_next_generation(server, make_pod):
    pod = make_pod()
    secret = pod.folder / "secret"
    secret.mkdir()
    frozen = {"AWS_ACCESS_KEY_ID": "old", "AWS_SECRET_ACCESS_KEY": "old", "AWS_SESSION_TOKEN": "old"}
    start(pod, FINETUNE_CREDENTIALS_FOLDER=str(secret), **frozen)
    await server.until(lambda: pod.report)
    keep = "{k: v for k, v in os.environ.items() if 'AWS' in k or 'CREDENTIALS' in k}"
    pod.script(0, f"(folder / 'seen').write_text(json.dumps({keep}))", "sys.exit(77)")
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.FAILED)
    assert json.loads((pod.folder / "seen").read_text()) == frozen
    (secret / "AWS_ACCESS_KEY_ID").write_text("new")
    (secret / "AWS_SECRET_ACCESS_KEY").write_text("new")
    await pod.run(2)
    await server.until(lambda: pod.report.generation == 2 and pod.report.state is AgentState.FAILED)
    assert json.loads((pod.folder / "seen").read_text()) == {
        "AWS_ACCESS_KEY_ID": "new",
        "AWS_SECRET_ACCESS_KEY": "new",
    }


async def test_how_saving_goes_and_where_training_started_are_reported(server, pod):
    pod.script(
        0,
        "beat('resumed', {'step': 5, 'source': 'Storage', 'fallback': 'step 10 is torn'})",
        "beat('saves', {'savingStep': 15, 'savingSince': '2026-01-01T00:00:00Z', 'putOff': 1})",
        *SLEEP,
    )
    await pod.run(1)
    await server.until(lambda: pod.report.resumed and pod.report.saves)
    assert (pod.report.resumed.step, pod.report.resumed.fallback) == (5, "step 10 is torn")
    assert (pod.report.saves.saving_step, pod.report.saves.put_off) == (15, 1)
    before = pod.report.instance
    os.kill(await pod.agent_pid(), signal.SIGKILL)
    await server.until(lambda: pod.report.instance != before)
    assert (pod.report.resumed.step, pod.report.saves) == (5, None)


async def test_workers_of_a_pod_that_stays_save_with_those_of_one_that_goes(server, pod):
    """The ranks agree among themselves: the first to have saved must not have the others killed."""
    pod.script(0, "ready()", "wait_for('uploaded')", "sys.exit(75)")
    pod.script(1, "ready()", "wait_for('agreed')", "sys.exit(75)")
    await pod.run(1, workers=2)
    await asyncio.gather(pod.pid_of(0, 1), pod.pid_of(1, 1))
    (pod.folder / "agreed").touch()
    await server.until(lambda: pod.report.state is AgentState.FAILED)
    assert [(end.rank, end.exit_code) for end in pod.report.exits] == [(1, 75)]
    (pod.folder / "uploaded").touch()
    await server.until(lambda: len(pod.report.exits) == 2)
    assert [(end.rank, end.exit_code) for end in pod.report.exits] == [(1, 75), (0, 75)]


async def test_sigterm_kills_a_worker_that_will_not_end(server, make_pod):
    pod = make_pod()
    start(pod, FINETUNE_GRACE_SECONDS="0.5")
    await server.until(lambda: pod.report)
    pod.script(0, "signal.signal(signal.SIGTERM, signal.SIG_IGN)", *SLEEP)
    await pod.run(1)
    worker = await pod.pid_of(0, 1)
    pod.process.terminate()
    assert await pod.wait() == 143
    assert not is_alive(worker)
    assert pod.report.exits[0].message == "had to be killed: did not end in time after SIGTERM"


async def test_sigterm_with_the_server_away_ends_in_time(server, pod):
    await server.stop()
    pod.process.terminate()
    assert await pod.wait() == 143


async def test_stop_asks_and_a_later_run_starts_a_new_generation_in_place(server, pod):
    pod.script("0-g1", "on_term(75)", *SLEEP)
    pod.script("0-g2", "ready()")
    await pod.run(1)
    await pod.pid_of(0, 1)
    await server.order(pod.uid, Order(Action.STOP, 1, grace_seconds=30))
    await server.until(lambda: pod.report.state is AgentState.STOPPED)
    assert [end.exit_code for end in pod.report.exits] == [75]
    await pod.run(2)
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED)


async def test_one_worker_that_has_saved_does_not_have_the_others_killed(server, pod):
    pod.script(0, "on_term(75)", *SLEEP)
    pod.script(1, "signal.signal(signal.SIGTERM, lambda *_: (wait_for('uploaded'), os._exit(75)))", *SLEEP)
    await pod.run(1, workers=2)
    await asyncio.gather(pod.pid_of(0, 1), pod.pid_of(1, 1))
    await server.order(pod.uid, Order(Action.STOP, 1, grace_seconds=50))
    await server.until(lambda: [end.exit_code for end in pod.report.exits] == [75])
    (pod.folder / "uploaded").touch()
    await server.until(lambda: [end.exit_code for end in pod.report.exits] == [75, 75])
    assert pod.report.state is AgentState.STOPPED


async def test_wait_for_a_higher_generation_ends_the_lower_one(server, pod):
    pod.script(0, *SLEEP)
    await pod.run(1)
    worker = await pod.pid_of(0, 1)
    await server.order(pod.uid, Order(Action.WAIT, 2))
    await server.until(lambda: pod.report.state is AgentState.STOPPED)
    assert not is_alive(worker)


async def test_finish_ends_what_runs(server, pod):
    pod.script(0, *SLEEP)
    await pod.run(1)
    worker = await pod.pid_of(0, 1)
    await server.order(pod.uid, Order(Action.FINISH))
    assert await pod.wait() == 0
    assert not is_alive(worker)


async def test_a_port_in_use_is_told_as_such(server, pod):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", pod.report.port))
        taken.listen()
        first = pod.report.port
        await pod.run(1)
        await server.until(lambda: pod.report.state is AgentState.FAILED)
    (end,) = pod.report.exits
    assert (end.rank, end.exit_code) == (-1, ExitCode.PORT_IN_USE)
    assert end.message == f"port {first} of 127.0.0.1 is in use on rank 0's node"
    assert pod.report.port != first


async def test_an_order_that_makes_no_sense_is_a_failure_and_no_crash(server, pod):
    before = pod.report.instance
    await server.order(pod.uid, Order(Action.RUN, 1, rank=3, nodes=2, master_address="127.0.0.1", master_port=1))
    await server.until(lambda: pod.report.state is AgentState.FAILED)
    assert "makes no sense" in pod.report.exits[0].message
    assert pod.report.instance == before


async def test_a_launcher_that_fails_is_told_with_its_reason(server, make_pod):
    pod = make_pod()
    start(pod, FAKE_TORCH_FAILS="The server socket has failed to listen: EADDRINUSE")
    await server.until(lambda: pod.report)
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.FAILED)
    (end,) = pod.report.exits
    assert (end.rank, end.exit_code) == (-1, ExitCode.PORT_IN_USE)
    assert end.message.startswith("torchrun: RuntimeError: The server socket")


async def test_a_launcher_that_dies_has_its_workers_killed(server, pod):
    pod.script(0, *SLEEP)
    await pod.run(1)
    worker = await pod.pid_of(0, 1)
    torchrun = next(p for p in pod.descendants() if b"\0torchrun\0" in command_line(p))
    os.kill(torchrun, signal.SIGKILL)
    await server.until(lambda: pod.report.state is AgentState.FAILED)
    (end,) = pod.report.exits
    assert (end.rank, end.signal) == (-1, signal.SIGKILL)
    await wait_for(lambda: not is_alive(worker))


async def test_an_image_without_torch_is_told_as_such(server, make_pod):
    pod = make_pod()
    start(pod, fake_torch=False, python=sys._base_executable)
    await server.until(lambda: pod.report)
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.FAILED)
    (end,) = pod.report.exits
    assert (end.rank, end.exit_code) == (-1, ExitCode.BAD_CONFIG)
    assert end.message.startswith("python3 in this image has no torch: No module named 'torch'")


@pytest.mark.skipif(not OLDEST_PYTHON.exists(), reason="no Python 3.9 on this machine")
async def test_it_runs_under_the_oldest_python(server, make_pod):
    pod = make_pod()
    start(pod, python=str(OLDEST_PYTHON))
    await server.until(lambda: pod.report)
    pod.script(0, "beat('heartbeat', {'phase': 'Training', 'step': 3})", "sys.exit(66)")
    await pod.run(1)
    await server.until(lambda: pod.report.exits)
    assert (pod.report.exits[0].exit_code, pod.report.heartbeat.step) == (66, 3)
    await server.order(pod.uid, Order(Action.FINISH, 1))
    assert await pod.wait() == 0


@pytest.mark.skipif(not OLD_PYTHON.exists(), reason="no Python 3.8 on this machine")
def test_a_python_that_is_too_old_is_told_where_kubectl_shows_it(agent_file, tmp_path):
    log = tmp_path / "log"
    process = subprocess.run(
        [OLD_PYTHON, agent_file],
        env={"FINETUNE_TERMINATION_LOG": str(log)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == ExitCode.BAD_CONFIG
    assert process.stderr == "finetune-agent: python3 in this image is 3.8: the agent needs 3.9 or newer\n"
    assert "needs 3.9" in log.read_text()


async def test_a_full_disk_is_a_failure_and_starts_nothing(server, pod):
    journal = pod.folder / "agent" / "journal.new"
    journal.mkdir()  # whoever opens it for writing gets EISDIR, root too
    pod.script(0, *SLEEP)
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.FAILED)
    assert "journal cannot be written" in pod.report.exits[0].message
    assert not (pod.folder / "pid-1-0").exists()
    journal.rmdir()
    await pod.run(2)
    await pod.pid_of(0, 2)


async def test_workers_see_the_contracts_environment_and_none_of_an_outer_launcher(server, make_pod):
    pod = make_pod()
    start(pod, PET_NNODES="9", RANK="7", MASTER_PORT="1", http_proxy="http://proxy:1", OMP_NUM_THREADS="3")
    await server.until(lambda: pod.report)
    pod.script(1, "json.dump(dict(os.environ), open(folder / 'environment', 'w'))")
    pod.script(0)
    await pod.run(4, workers=2, has_checkpoint=True)
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED)
    environment = json.loads((pod.folder / "environment").read_text())
    assert environment["FINETUNE_GENERATION"] == "4"
    assert environment["FINETUNE_WORLD_SIZE"] == environment["WORLD_SIZE"] == "2"
    assert environment["FINETUNE_HAS_CHECKPOINT"] == "1"
    assert environment["FINETUNE_RECIPE_FILE"] == str(pod.config / "recipe.json")
    assert environment["FINETUNE_JOB_FILE"] == str(pod.config / "job.json")
    assert (environment["RANK"], environment["OMP_NUM_THREADS"], environment["no_proxy"]) == ("1", "3", "127.0.0.1")
    assert mode_of(environment["FINETUNE_PROGRESS_SOCKET"]) == "0o600"
    assert not {
        name for name in environment if name.startswith("PET_") or name in ("FINETUNE_POD_UID", "FINETUNE_EXITS_SOCKET")
    }


JOB_FILE_SEEN = "(folder / f'job-{generation}').write_bytes(open(os.environ['FINETUNE_JOB_FILE'], 'rb').read())"


def job_file_seen(pod, generation: int) -> dict:
    return json.loads((pod.folder / f"job-{generation}").read_text())


async def test_each_generation_saves_as_its_order_says_and_all_else_is_as_mounted(server, make_pod):
    pod = make_pod()
    unknown = {"fromTheFuture": {"a": [1]}}
    asked = JobCheckpoint(interval_steps=50, keep=9, resume_from="s3://bucket/old")
    start(pod, storage=JobStorage("s3://bucket/job"), checkpoint=asked, job_file=unknown)
    await server.until(lambda: pod.report)
    mounted = json.loads((pod.config / "job.json").read_text())
    assert mounted["fromTheFuture"] == {"a": [1]}
    pod.script(0, JOB_FILE_SEEN, "ready()", "time.sleep(1000)")
    await pod.run(1)
    await pod.pid_of(0, 1)
    assert job_file_seen(pod, 1) == mounted, "by an order that says nothing of it, as those of older operators"
    for generation, steps in ((2, 7), (3, 8)):
        await pod.run(generation, checkpoint=CheckpointWish(interval_steps=steps))
        await pod.pid_of(0, generation)
        wish = {"intervalSteps": steps, "intervalAuto": False, "keep": 2, "resumeFrom": "s3://bucket/old"}
        assert job_file_seen(pod, generation) == mounted | {"checkpoint": wish}
    assert json.loads((pod.config / "job.json").read_text()) == mounted


async def test_an_edit_while_a_generation_runs_starts_and_changes_nothing(server, pod):
    told = "beat('checkpoint', {'step': %d, 'uri': 's3://b/c', 'sizeBytes': 1, 'commitTime': 'now'})"
    commits = [line for step in (1, 2) for line in (f"wait_for('step-{step}')", told % step)]
    pod.script(0, JOB_FILE_SEEN, "ready()", *commits, "time.sleep(1000)")
    await pod.run(1, checkpoint=CheckpointWish(interval_steps=50))
    worker = await pod.pid_of(0, 1)
    seen, file = job_file_seen(pod, 1), pod.folder / "agent" / "g1" / "job.json"
    await pod.run(1, checkpoint=CheckpointWish(interval_steps=7))
    for step in (1, 2):  # the answer to the first report brings the edit, the second comes after it
        (pod.folder / f"step-{step}").touch()
        await server.until(lambda s=step: pod.report.checkpoint and pod.report.checkpoint.step == s)
    assert (await pod.pid_of(0, 1), is_alive(worker), pod.report.state) == (worker, True, AgentState.RUNNING)
    assert json.loads(file.read_text()) == seen


async def test_a_job_file_that_cannot_be_written_is_told_by_name_and_starts_nothing(server, make_pod):
    pod = make_pod()
    start(pod, job_file={"fromTheFuture": "x" * 16384})
    await server.until(lambda: pod.report)
    agent = await pod.agent_pid()
    _, hard = resource.prlimit(agent, resource.RLIMIT_FSIZE)
    resource.prlimit(agent, resource.RLIMIT_FSIZE, (8192, hard))  # like a disk that is full; the journal fits
    pod.script(0, *SLEEP)
    await pod.run(1, checkpoint=CheckpointWish())
    await server.until(lambda: pod.report.state is AgentState.FAILED)
    assert f"File too large: '{pod.folder}/agent/g1/job.json'" in pod.report.exits[0].message
    assert not (pod.folder / "pid-1-0").exists()
    resource.prlimit(agent, resource.RLIMIT_FSIZE, (hard, hard))
    await pod.run(2, checkpoint=CheckpointWish())
    await pod.pid_of(0, 2)


def mode_of(path) -> str:
    return oct(Path(path).stat().st_mode & 0o777)


async def test_many_long_exits_fit_into_a_report(server, pod):
    for rank in range(24):
        fails = ("print('\"' * 3000, file=sys.stderr)", "sys.exit(75)")  # then its peers have the time to do so too
        pod.script(rank, "[print('é' * 300) for _ in range(30)]", "ready()", "wait_for('go')", *fails)
    await pod.run(1, workers=24)
    await asyncio.gather(*(pod.pid_of(rank, 1) for rank in range(24)))
    (pod.folder / "go").touch()
    await server.until(lambda: len(pod.report.exits) == 24)
    assert len(json.dumps(to_wire(pod.report), ensure_ascii=False).encode()) <= REPORT_BYTES_LIMIT
    assert all(len(end.message) == MESSAGE_LIMIT for end in pod.report.exits)


async def test_the_dead_agents_successors_come_ever_slower(server, pod):
    instances = set()
    for _ in range(3):
        instances.add(pod.report.instance)
        os.kill(await pod.agent_pid(), signal.SIGKILL)
        await server.until(lambda: pod.report.instance not in instances)
    assert pod.log.count("the agent process ended by signal 9; starting another") == 3
    assert sum(is_agent(pid) for pid in pod.descendants()) == 1


async def test_without_a_command_the_images_trainer_runs(server, make_pod):
    pod = make_pod()
    (pod.folder / "finetune_trainer.py").write_text("print('trained', __name__)")
    pod.start([], PYTHONPATH=f"{FAKE_TORCH}:{pod.folder}")
    await server.until(lambda: pod.report)
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED)
    assert "[rank 0] trained __main__" in pod.log
