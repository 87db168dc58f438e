"""The recipe's workers, forked from a process that has imported the trainer: here one that imports nothing and does what a test tells it."""

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from finetune_agent import processes
from finetune_api.contract import ExitCode
from finetune_api.protocol import Action, AgentState, Order
from tests.agent.pod import Pod, command_line, is_alive, wait_for

FAKE_TRAINER = Path(__file__).parent / "fake_trainer"
TELL = "(folder / 'forked').open('a').write(f'{was_forked}\\n')"
SLEEP = (TELL, "ready()", "time.sleep(1000)")
WAITS_FOR_GO = "import time\nwhile not (folder / 'go').exists():\n    time.sleep(0.01)"


@pytest.fixture
async def pod(server, make_pod):
    """A pod of a recipe job that has reported in."""
    pod = make_pod()
    await start(pod)
    return pod


async def start(pod: Pod, **environment: str) -> None:
    pod.start([], PYTHONPATH=str(FAKE_TRAINER), TEST_FOLDER=str(pod.folder), **environment)
    await pod.server.until(lambda: pod.report)


async def ordered_while_importing(pod: Pod) -> Pod:
    """Start a pod whose fork server imports until told to go on, and order the first generation."""
    (pod.folder / "load").write_text(WAITS_FOR_GO)
    await start(pod)
    pod.script(0, *SLEEP)
    await pod.run(1)
    return pod


async def run(pod: Pod, generation: int, **order: int) -> int:
    """Run a generation until the worker of the pod's first rank is ready; return its pid."""
    await pod.run(generation, **order)
    return await pod.pid_of(order.get("rank", 0) * order.get("workers", 1), generation)


async def until_failed(pod: Pod, generation: int) -> None:
    await pod.server.until(
        lambda: pod.report.generation == generation and pod.report.state is AgentState.FAILED and pod.report.exits
    )


def fork_servers(pod: Pod) -> list[int]:
    """Those that imported, not what was forked from them."""
    return [pid for pid in pod.descendants() if (pod.folder / f"loaded-{pid}").exists()]


async def fork_server(pod: Pod) -> int:
    return (await wait_for(lambda: fork_servers(pod)))[0]


def was_forked(pod: Pod) -> list[bool]:
    """Tell of each worker so far, in order, whether it was."""
    file = pod.folder / "forked"
    return [line == "True" for line in file.read_text().splitlines()] if file.exists() else []


async def test_a_worker_that_dies_is_told_at_once_and_the_next_is_forked_from_the_same_process(server, pod):
    pod.script(0, *SLEEP)
    server_pid = await fork_server(pod)
    for generation in (1, 2, 3):
        os.kill(await run(pod, generation), signal.SIGKILL)
        await until_failed(pod, generation)
        (end,) = pod.report.exits
        assert (end.rank, end.signal, end.exit_code) == (0, signal.SIGKILL, None)
    assert fork_servers(pod) == [server_pid]
    assert was_forked(pod) == [True] * 3


@pytest.mark.parametrize(
    ("lines", "code", "message"),
    [
        pytest.param(["raise ValueError('wrong')"], 1, "ValueError: wrong", id="an error"),
        pytest.param(["print('x' * 100000)", "sys.exit(65)"], 65, "x", id="a code of the contract"),
        pytest.param(
            [
                "json.dump({'message': {'message': 'RuntimeError: file'}}, open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w'))",
                "sys.exit(3)",
            ],
            3,
            "RuntimeError: file",
            id="torch's error file",
        ),
        pytest.param(["grandchild()", "sys.exit(5)"], 5, "", id="a child that holds its output open"),
    ],
)
async def test_the_end_of_a_forked_worker_is_told_with(server, pod, lines, code, message):
    pod.script(0, TELL, *lines)
    await pod.run(1)
    await until_failed(pod, 1)
    (end,) = pod.report.exits
    assert (end.exit_code, end.signal) == (code, None)
    assert message in end.message
    assert len(end.log_tail) <= 4096
    assert was_forked(pod) == [True]


async def test_workers_have_the_environment_that_torchrun_gives_and_nothing_of_an_earlier_one(server, make_pod):
    pod = make_pod()
    secret = pod.folder / "secret"
    secret.mkdir()
    await start(pod, FINETUNE_CREDENTIALS_FOLDER=str(secret), AWS_SESSION_TOKEN="old", OMP_NUM_THREADS="7")
    await fork_server(pod)
    for rank in (2, 3):
        pod.script(rank, f"(folder / 'environment{rank}').write_text(json.dumps(dict(os.environ)))", *SLEEP)
    await run(pod, 1, rank=1, nodes=3, workers=2)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        (secret / name).write_text("new")
    await run(pod, 2, rank=1, nodes=3, workers=2)
    await pod.pid_of(3, 2)
    seen = json.loads((pod.folder / "environment3").read_text())
    port = str(server.orders[pod.uid].master_port)
    folder = str(pod.folder.resolve() / "agent/g2")
    assert {name: seen[name] for name in sorted(seen) if name.startswith(TORCHRUN_PREFIXES)} == {
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "3",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "RANK": "3",
        "ROLE_NAME": "default",
        "ROLE_RANK": "3",
        "ROLE_WORLD_SIZE": "6",
        "TORCHELASTIC_ERROR_FILE": f"{folder}/error-1.json",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "g2",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "WORLD_SIZE": "6",
    }
    assert (seen["FINETUNE_GENERATION"], seen["FINETUNE_WORLD_SIZE"], seen["OMP_NUM_THREADS"]) == ("2", "6", "7")
    assert {name: value for name, value in seen.items() if name.startswith("AWS_")} == {
        "AWS_ACCESS_KEY_ID": "new",
        "AWS_SECRET_ACCESS_KEY": "new",
    }
    assert not [name for name in seen if name in {"FINETUNE_POD_UID", "FINETUNE_EXITS_SOCKET", "FINETUNE_END_PIPE"}]
    assert set(was_forked(pod)) == {True}


TORCHRUN_PREFIXES = ("GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCH", "WORLD_")


async def test_several_workers_of_a_pod_are_told_apart(server, pod):
    pod.script(0, *SLEEP)
    pod.script(1, TELL, "ready()", "print('I am one')", "wait_for('go')", "sys.exit(9)")
    await pod.run(1, workers=2)
    await asyncio.gather(pod.pid_of(0, 1), pod.pid_of(1, 1))
    (pod.folder / "go").touch()
    await until_failed(pod, 1)
    assert [(end.rank, end.exit_code, end.log_tail.splitlines()[-1]) for end in pod.report.exits] == [
        (1, 9, "I am one")
    ]
    assert "[rank 1] I am one" in pod.log
    assert was_forked(pod) == [True, True]


async def test_success_of_all_forked_workers_is_the_generations(server, pod):
    pod.script(0, TELL)
    pod.script(1, TELL, "wait_for('go')")
    await pod.run(1, workers=2)
    await server.until(lambda: pod.report.state is AgentState.RUNNING)
    (pod.folder / "go").touch()
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED)
    await server.order(pod.uid, Order(Action.FINISH, 1))
    assert await pod.wait() == 0
    assert pod.descendants() == []


async def test_sigterm_lets_forked_workers_save_and_the_container_say_so(server, pod):
    pod.script(0, "on_term(75)", *SLEEP)
    worker = await run(pod, 1)
    below = pod.descendants()
    pod.process.terminate()
    assert await pod.wait() == ExitCode.SAVED
    assert not any(is_alive(pid) for pid in (worker, *below)), "the fork server goes with its container"


async def test_what_a_generation_started_ends_with_it_and_the_fork_server_does_not(server, pod):
    pod.script("0-g1", "grandchild()", *SLEEP)
    pod.script("0-g2", *SLEEP)
    worker = await run(pod, 1)
    grandchild = int((pod.folder / "grandchild").read_text())
    kept = {await fork_server(pod), await pod.agent_pid()}
    of_the_first = set(pod.descendants()) - kept
    await run(pod, 2)
    assert {worker, grandchild} <= of_the_first
    assert not any(is_alive(pid) for pid in of_the_first)
    assert kept <= set(pod.descendants())
    assert len(set(pod.descendants()) - kept) == 2, "a worker and its parent"


async def test_a_killed_fork_server_disturbs_nobody_and_the_next_workers_are_started_without_it(server, pod):
    pod.script(0, *SLEEP)
    worker = await run(pod, 1)
    os.kill(await fork_server(pod), signal.SIGKILL)
    await wait_for(lambda: "the fork server is lost" in pod.log)
    assert is_alive(worker)
    assert pod.report.state is AgentState.RUNNING
    os.kill(worker, signal.SIGKILL)
    await until_failed(pod, 1)
    await run(pod, 2)
    assert was_forked(pod) == [True, False]


async def test_a_fork_server_that_does_not_answer_is_killed_and_not_waited_for(server, pod):
    pod.script(0, *SLEEP)
    os.kill(await run(pod, 1), signal.SIGKILL)
    await until_failed(pod, 1)
    stopped = await fork_server(pod)
    os.kill(stopped, signal.SIGSTOP)
    await run(pod, 2)
    assert was_forked(pod) == [True, False]
    assert "no answer in 5" in pod.log
    assert not is_alive(stopped)


@pytest.mark.parametrize(
    ("load", "refusal", "why"),
    [
        pytest.param(
            "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
            "",
            "the import started threads",
            id="a thread",
        ),
        pytest.param("", "refusal = 'CUDA is up'", "CUDA is up", id="a CUDA context"),
        pytest.param(
            "", "refusal = 'CUDA is gone' if in_child else ''", "CUDA is gone", id="a child that cannot use CUDA"
        ),
        pytest.param(
            "", "import os\nif in_child: os.abort()", "a forked child ended with -6", id="a child that crashes"
        ),
        pytest.param("raise ImportError('no deepspeed')", "", "ImportError: no deepspeed", id="an import that fails"),
    ],
)
async def test_it_forks_nothing_and_says_so_once_after(server, make_pod, load, refusal, why):
    pod = make_pod()
    (pod.folder / "load").write_text(load)
    (pod.folder / "refusal").write_text(refusal)
    await start(pod)
    pod.script(0, *SLEEP)
    for generation in (1, 2):
        os.kill(await run(pod, generation), signal.SIGKILL)
        await until_failed(pod, generation)
    assert was_forked(pod) == [False, False]
    assert pod.log.count("workers are not forked: ") == 1
    assert why in pod.log
    assert fork_servers(pod) == []


async def test_a_fork_server_that_crashes_while_it_imports_is_started_again_later(server, make_pod):
    pod = make_pod()
    (pod.folder / "load").write_text("import os; os.abort()")
    await start(pod)
    pod.script(0, *SLEEP)
    await run(pod, 1)
    assert was_forked(pod) == [False]
    await wait_for(lambda: "another starts in 30 s" in pod.log)


async def test_an_image_without_the_warm_trainer_is_told_once(server, make_pod):
    pod = make_pod()
    trainer = pod.folder / "older" / "finetune_trainer"
    trainer.mkdir(parents=True)
    (trainer / "__init__.py").touch()
    (trainer / "__main__.py").write_text("import os, pathlib\npathlib.Path('pid-1-0').write_text(str(os.getpid()))")
    pod.start([], PYTHONPATH=str(trainer.parent))
    await server.until(lambda: pod.report)
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED)
    assert "No module named 'finetune_trainer.warm'" in pod.log


async def test_a_generation_ordered_during_the_import_waits_for_it(server, make_pod):
    pod = await ordered_while_importing(make_pod())
    await server.until(lambda: pod.report.state is AgentState.RUNNING)
    (pod.folder / "go").touch()
    await pod.pid_of(0, 1)
    await wait_for(lambda: was_forked(pod))
    assert was_forked(pod) == [True]


async def test_a_generation_that_waits_for_the_import_can_be_replaced_and_never_runs(server, make_pod):
    pod = await ordered_while_importing(make_pod())
    await server.until(lambda: pod.report.generation == 1)
    importing = await fork_server(pod)
    await pod.run(2)
    await server.until(lambda: pod.report.generation == 2)
    assert fork_servers(pod) == [importing], "its work was not thrown away"
    (pod.folder / "go").touch()
    await pod.pid_of(0, 2)
    assert not (pod.folder / "pid-1-0").exists()


async def test_a_fork_server_that_dies_during_the_import_keeps_nobody_waiting(server, make_pod):
    pod = await ordered_while_importing(make_pod())
    await server.until(lambda: pod.report.generation == 1)
    os.kill(await fork_server(pod), signal.SIGKILL)
    await pod.pid_of(0, 1)
    await wait_for(lambda: was_forked(pod))
    assert was_forked(pod) == [False]


async def test_sigterm_during_the_import_ends_the_container(server, make_pod):
    pod = await ordered_while_importing(make_pod())
    await server.until(lambda: pod.report.generation == 1)
    pod.process.terminate()
    assert await pod.wait() == 143
    assert pod.descendants() == []


async def test_the_next_agent_takes_the_fork_server_over_and_ends_the_workers(server, pod):
    pod.script(0, *SLEEP)
    worker = await run(pod, 1)
    server_pid, before = await fork_server(pod), pod.report.instance
    os.kill(await pod.agent_pid(), signal.SIGKILL)
    await server.until(lambda: pod.report.instance != before)
    assert not is_alive(worker)
    assert (pod.report.state, pod.report.exits[0].rank) == (AgentState.FAILED, -1)
    await run(pod, 2)
    assert fork_servers(pod) == [server_pid]
    assert was_forked(pod) == [True, True]


async def test_an_agent_does_not_take_over_a_fork_server_that_is_stopped(server, pod):
    pod.script(0, *SLEEP)
    await run(pod, 1)
    stopped, before = await fork_server(pod), pod.report.instance
    os.kill(stopped, signal.SIGSTOP)
    os.kill(await pod.agent_pid(), signal.SIGKILL)
    await server.until(lambda: pod.report.instance != before)
    await run(pod, 2)
    assert not is_alive(stopped)
    assert was_forked(pod) == [True, True], "by another one"


async def test_the_parent_of_a_worker_that_is_killed_fails_the_generation_at_once(server, pod):
    pod.script(0, *SLEEP)
    worker = await run(pod, 1)
    parent = next(pid for pid in pod.descendants() if worker in processes.descendants(pid) and is_parent(pid, worker))
    os.kill(parent, signal.SIGKILL)
    await until_failed(pod, 1)
    assert not is_alive(worker)
    (end,) = pod.report.exits
    assert (end.rank, end.message) == (-1, "the parent process of rank 0's worker was killed")
    await run(pod, 2)
    assert was_forked(pod) == [True, True]


def is_parent(pid: int, child: int) -> bool:
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1] == str(pid)


async def test_nothing_outlives_a_stub_that_is_killed(server, pod):
    pod.script(0, *SLEEP)
    worker = await run(pod, 1)
    os.kill(await fork_server(pod), signal.SIGKILL)  # its orphans must not be forgotten
    await wait_for(lambda: not fork_servers(pod))
    below = pod.descendants()
    assert worker in below
    pod.process.kill()
    await wait_for(lambda: not any(is_alive(pid) for pid in below))


async def test_a_script_job_has_no_fork_server(server, make_pod):
    pod = make_pod()
    pod.start(["true"], TEST_FOLDER=str(pod.folder))
    await server.until(lambda: pod.report)
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED)
    assert not (pod.folder / "agent/fork-server.sock").exists()
    assert b"fork-server" not in b"".join(command_line(pid) for pid in pod.descendants())
