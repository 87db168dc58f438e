"""Two agents, real torchrun, gloo: what a gang does under orders."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from finetune_api.contract import ExitCode
from finetune_api.protocol import Action, AgentState, Doing, Order
from tests.agent.pod import Pod, is_alive

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture
async def gang(server, make_pod):
    """Two pods that share one folder and have reported in."""
    pods = [make_pod("pod-0"), make_pod("pod-1")]
    for pod in pods:
        pod.start([sys.executable, str(SCRIPTS / "gang.py"), str(pods[0].folder)], fake_torch=False)
    await server.until(lambda: all(pod.report for pod in pods))
    return pods


async def run(gang: list[Pod], generation: int, *, hang_seconds: int = 60) -> None:
    for rank, pod in enumerate(gang):
        await pod.run(generation, rank=rank, nodes=2, master=gang[0], hang_seconds=hang_seconds)
    await gang[0].server.until(
        lambda: all(
            p.report.generation == generation and p.report.heartbeat and p.report.heartbeat.step > 2 for p in gang
        )
    )


async def test_a_killed_worker_fails_both_pods_and_the_next_generation_runs_in_place_to_success(server, gang):
    await run(gang, 1)
    first = [(pod.report.instance, pod.report.port) for pod in gang]
    killed = time.monotonic()
    os.kill(await gang[0].pid_of(1, 1), signal.SIGKILL)
    await server.until(lambda: gang[1].report.state is AgentState.FAILED)
    print(f"MEASURED kill to the cause reported: {time.monotonic() - killed:.3f} s")
    await server.until(lambda: all(pod.report.state is AgentState.FAILED and pod.report.exits for pod in gang))
    print(f"MEASURED kill to both Failed: {time.monotonic() - killed:.3f} s")

    cause, echo = gang[1].report.exits[0], gang[0].report.exits[0]
    assert (cause.rank, cause.signal, cause.exit_code) == (1, signal.SIGKILL, None)
    assert (echo.rank, echo.exit_code) == (0, 1)
    assert "gloo" in echo.message.lower() or "connection" in echo.message.lower(), echo
    assert "Traceback" in echo.log_tail

    ordered = time.monotonic()
    await run(gang, 2)
    print(f"MEASURED order to step 3 of the next generation: {time.monotonic() - ordered:.2f} s")
    assert [pod.report.instance for pod in gang] == [instance for instance, _ in first]
    assert all(pod.report.port != port for pod, (_, port) in zip(gang, first, strict=True))
    assert all(pod.report.exits == [] for pod in gang)
    (gang[0].folder / "finish").touch()
    await server.until(lambda: all(pod.report.state is AgentState.SUCCEEDED for pod in gang))
    assert gang[0].report.progress.loss is not None
    assert "[rank 0] ready" in gang[0].log
    assert "[rank 1] ready" in gang[1].log
    for pod in gang:
        await server.order(pod.uid, Order(Action.FINISH, 2))
    assert [await pod.wait() for pod in gang] == [0, 0]
    assert gang[0].termination_message() == {"generation": 2, "state": "Succeeded", "exits": [], "message": ""}


async def test_one_pods_sigterm_has_all_ranks_save_and_its_container_say_so(server, gang):
    await run(gang, 1)
    workers = [await gang[0].pid_of(rank, 1) for rank in (0, 1)]
    gang[1].process.terminate()
    assert await gang[1].wait() == ExitCode.SAVED
    await server.until(lambda: gang[0].report.state is AgentState.FAILED)
    assert [end.exit_code for end in gang[0].report.exits] == [ExitCode.SAVED]
    assert gang[1].report.state is AgentState.STOPPED
    assert [end.exit_code for end in gang[1].report.exits] == [ExitCode.SAVED]
    assert not any(is_alive(pid) for pid in workers)


@pytest.mark.parametrize(("how", "doing"), [("stopped", Doing.STOPPED), ("asleep in its data", Doing.WORKING)])
async def test_of_a_gang_that_hangs_the_rank_that_the_others_wait_for_is_told_apart(server, gang, how, doing):
    await run(gang, 1, hang_seconds=2)
    if how == "stopped":
        os.kill(await gang[0].pid_of(1, 1), signal.SIGSTOP)
    else:
        (gang[0].folder / "hang-1-1").touch()
    hung = time.monotonic()
    await server.until(lambda: all(pod.report.stalled for pod in gang))
    print(f"MEASURED hang to both pods stalled: {time.monotonic() - hung:.2f} s")
    waiting, culprit = (pod.report.stalled for pod in gang)
    assert (waiting.rank, waiting.doing) == (0, Doing.WAITING), waiting
    assert "distributed_c10d" in waiting.place
    assert (culprit.rank, culprit.doing) == (1, doing), culprit
    assert culprit.innocence < waiting.innocence
    await run(gang, 2)
    (gang[0].folder / "finish").touch()
    await server.until(lambda: all(pod.report.state is AgentState.SUCCEEDED for pod in gang))
