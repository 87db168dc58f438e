import tempfile
from pathlib import Path

import pytest

from finetune_agent.build import build_agent
from tests.agent.job_server import JobServer, make_certificates
from tests.agent.pod import Pod


@pytest.fixture(scope="session")
def agent_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("agent") / "agent.pyz"
    build_agent(file)
    return file


@pytest.fixture
async def server(tmp_path):
    make_certificates(tmp_path)
    job_server = JobServer(tmp_path)
    await job_server.start()
    yield job_server
    await job_server.stop()


@pytest.fixture
def make_pod(agent_file, server):
    """Make pods in folders with short names (a Unix socket's path has 107 bytes); they end with the test."""
    pods = []

    def make(uid: str = "pod-0") -> Pod:
        pods.append(Pod(uid, Path(tempfile.mkdtemp(prefix="pod-")), agent_file, server))
        return pods[-1]

    yield make
    for pod in pods:
        print(f"--- log of {pod.uid}")
        if (pod.folder / "log").exists():
            print(pod.log)
        pod.remove()
