"""Two agents and the recipe's own trainer, forked: what a gang that trains does when something in its pods dies."""

import os
import secrets
import signal
from pathlib import Path

import pytest

from finetune_agent import processes
from finetune_api.contract import ExitCode
from finetune_api.protocol import Action, AgentState, JobCheckpoint, Order, ResumeSource
from tests.agent.job_server import JobServer
from tests.agent.pod import wait_for
from tests.agent.recipe_gang import RecipeGang
from tests.storage.seaweedfs import S3Server, running_seaweedfs
from tests.trainer.recipes import language_modelling
from tests.trainer.sentences import counting_texts, write_jsonl
from tests.trainer.tiny_models import save_llama

pytestmark = pytest.mark.slow

STEPS = 60
NOT_FORKED = ("workers are not forked", "without the fork server", "fork server is lost")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_llama(folder / "llama")
    write_jsonl(folder / "texts.jsonl", counting_texts(200))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with running_seaweedfs(tmp_path_factory.mktemp("s3")) as server:
        server.create_bucket("gangs")
        yield server


@pytest.fixture
def make_gang(server: JobServer, make_pod, store: S3Server, files: Path):
    def make(name: str = "gang", *, steps: int = STEPS, processes_per_node: int = 1) -> RecipeGang:
        return RecipeGang(
            [make_pod(f"{name}-{rank}") for rank in (0, 1)],
            server,
            store,
            recipe=language_modelling(files, evaluation=None, training={"steps": steps}),
            prefix=f"s3://gangs/{secrets.token_hex(4)}",
            checkpoint=JobCheckpoint(interval_steps=5),
            processes_per_node=processes_per_node,
        )

    return make


async def start(gang: RecipeGang) -> None:
    for pod in gang.pods:
        gang.start(pod)
    await gang.ready()


async def until_all(gang: RecipeGang, state: AgentState) -> None:
    server = gang.pods[0].server
    await server.until(
        lambda: all(p.report.generation == gang.generation and p.report.state is state for p in gang.pods), 200
    )


async def recover(gang: RecipeGang) -> int:
    """Order the next generation once all pods have failed; return the step it started after, from memory."""
    await until_all(gang, AgentState.FAILED)
    await gang.run()
    server = gang.pods[0].server
    first = gang.pods[0]
    await server.until(lambda: first.report.generation == gang.generation and first.report.resumed, 200)
    assert first.report.resumed.source is ResumeSource.MEMORY
    return first.report.resumed.step


def assert_all_forked(gang: RecipeGang) -> None:
    assert [
        line for pod in gang.pods for line in pod.log.splitlines() if any(word in line for word in NOT_FORKED)
    ] == []


async def test_killed_workers_resume_from_memory_in_place_with_the_losses_of_an_undisturbed_run(make_gang):
    """Rank 1, then rank 0, which holds the store, then the parent of a worker."""
    calm, gang = make_gang("calm"), make_gang()
    await start(calm)
    await calm.run()
    await until_all(calm, AgentState.SUCCEEDED)
    for pod in calm.pods:
        await pod.server.order(pod.uid, Order(Action.FINISH, calm.generation))
    await start(gang)
    await gang.run()
    for rank in (1, 0):
        await gang.until_trained(6, beyond=6)
        gang.kill(rank)
        step = await recover(gang)
        assert 5 <= step <= max(one.trained_step or 0 for one in gang.said(gang.generation - 1))
    await gang.until_trained(6, beyond=6)
    parent = parent_of(gang.worker(1))
    os.kill(parent, signal.SIGKILL)
    await recover(gang)
    await until_all(gang, AgentState.SUCCEEDED)
    assert_all_forked(gang)
    undisturbed, disturbed = calm.losses(), gang.losses()
    assert sorted(disturbed) == sorted(undisturbed) == list(range(1, STEPS + 1))
    assert disturbed == undisturbed


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_several_processes_per_node_are_forked_and_save_on_sigterm(make_gang):
    gang = make_gang(steps=20000, processes_per_node=2)
    await start(gang)
    await gang.run()
    await gang.until_trained(6, beyond=6)
    gang.kill(3)
    assert await recover(gang) >= 5
    await gang.until_trained(3)
    leaving, staying = gang.pods[1], gang.pods[0]
    leaving.process.terminate()
    assert await leaving.wait() == ExitCode.SAVED
    await leaving.server.until(lambda: len(staying.report.exits) == 2)
    assert [end.exit_code for pod in gang.pods for end in pod.report.exits] == [ExitCode.SAVED] * 4
    assert_all_forked(gang)


@pytest.mark.parametrize("cold", [0, 1], ids=["rank 0 is started anew", "rank 1 is started anew"])
async def test_a_forked_worker_and_one_that_was_not_train_together(make_gang, cold):
    gang = make_gang(steps=20000)
    await start(gang)
    await gang.run()
    await gang.until_trained(6, beyond=6)
    os.kill(await fork_server(gang, cold), signal.SIGKILL)
    await wait_for(lambda: "fork server is lost" in gang.pods[cold].log)
    gang.kill(1)
    assert await recover(gang) >= 5
    await gang.until_trained(3)
    assert [was_forked(gang.worker(rank)) for rank in (0, 1)] == [rank != cold for rank in (0, 1)]


def was_forked(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().startswith("worker ")


async def fork_server(gang: RecipeGang, rank: int) -> int:
    path = gang.pods[rank].folder / "agent" / "fork-server.sock"
    return await wait_for(lambda: processes.listener(path))


async def test_the_next_agent_forks_from_what_the_last_one_had_imported(make_gang):
    gang = make_gang(steps=20000)
    await start(gang)
    await gang.run()
    await gang.until_trained(6, beyond=6)
    server, before = await fork_server(gang, 1), gang.pods[1].report.instance
    os.kill(await gang.pods[1].agent_pid(), signal.SIGKILL)
    await gang.pods[1].server.until(lambda: gang.pods[1].report.instance != before)
    assert await recover(gang) >= 5
    await gang.until_trained(3)
    assert await fork_server(gang, 1) == server
    assert_all_forked(gang)
