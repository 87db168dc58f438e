"""One agent in its container whose workers fall silent: what it finds, says and leaves in the log."""

import os
import signal
import sys
from pathlib import Path

import pytest

from finetune_api.protocol import AgentState, Doing, Phase
from tests.agent.pod import is_alive

WORKER = Path(__file__).parent / "scripts" / "worker.py"
STEPS = 60
HANGS = ("show_stacks()", f"train(steps={STEPS})", "load_batch()")


@pytest.fixture
async def pod(server, make_pod):
    """A pod that has reported in."""
    pod = make_pod()
    pod.start([sys.executable, str(WORKER), str(pod.folder)])
    await server.until(lambda: pod.report)
    return pod


async def test_a_hung_worker_is_named_with_its_place_its_stacks_are_logged_and_nothing_is_ended(server, pod):
    pod.script(0, *HANGS)
    pod.script(1, "show_stacks()", f"train(steps={STEPS + 1})", "load_batch()")
    await pod.run(1, workers=2, hang_seconds=1)
    workers = [await pod.pid_of(rank, 1) for rank in (0, 1)]
    await server.until(lambda: pod.report.stalled and pod.report.stalled.step == STEPS)  # not before, on a busy machine
    stalled = pod.report.stalled
    assert (stalled.rank, stalled.phase, stalled.step, stalled.doing) == (0, Phase.TRAINING, STEPS, Doing.WORKING), (
        "it has done a step less"
    )
    assert stalled.place.startswith("scripts/worker.py:")
    assert stalled.place.endswith("in load_batch")
    assert 1.0 < stalled.silent_seconds < 30.0
    for rank in (0, 1):
        assert f"[rank {rank}] stacks of all threads" in pod.log
        assert any(line.startswith(f"[rank {rank}]") and "in load_batch" in line for line in pod.log.splitlines())
    assert pod.report.state is AgentState.RUNNING
    assert all(is_alive(worker) for worker in workers)
    assert [pace.busy_seconds for pace in pod.report.paces] == [0.02, 0.04]


async def test_a_stopped_worker_is_told_from_one_that_hangs_and_the_next_generation_ends_it(server, pod):
    pod.script("0-g1", *HANGS)
    pod.script("1-g1", *HANGS)
    pod.script("0-g2", "ready()")
    pod.script("1-g2", "ready()")
    await pod.run(1, workers=2, hang_seconds=2)
    stopped = await pod.pid_of(1, 1)
    os.kill(stopped, signal.SIGSTOP)
    await server.until(lambda: pod.report.stalled and pod.report.stalled.doing is Doing.STOPPED)
    assert pod.report.stalled.rank == 1
    assert "[rank 1] does not answer SIGUSR1" in pod.log
    await pod.run(2, workers=2)
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED)
    assert (pod.report.stalled, pod.report.paces) == (None, [])
    assert not is_alive(stopped)


async def test_workers_that_go_on_take_the_word_back(server, pod):
    pod.script(0, "train(steps=40)", "wait_for('go')", "train(steps=5, start=41)", "wait_for('end')")
    await pod.run(1, hang_seconds=1)
    await server.until(lambda: pod.report.stalled)
    assert pod.report.stalled.doing is Doing.UNKNOWN, "it does not show its stacks, and got no signal"
    (pod.folder / "go").touch()
    await server.until(lambda: pod.report.stalled is None and pod.report.heartbeat.step == 46)
    (pod.folder / "end").touch()
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED)


async def test_of_a_script_those_workers_count_that_speak(server, pod):
    pod.script(0, "ready()", "wait_for('end')")
    pod.script(1, "show_stacks()", "train(steps=40)", "wait_for('end')")
    await pod.run(1, workers=2, hang_seconds=1)
    await server.until(lambda: pod.report.stalled and pod.report.stalled.step == 40)
    assert pod.report.stalled.rank == 1
    assert is_alive(await pod.pid_of(0, 1)), "the other one got no signal"
