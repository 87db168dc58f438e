"""What tests of several folders share: one cluster for the whole session, and the operator on it.

FINETUNE_CLUSTER=attach uses a cluster that ``python -m tests.cluster up`` has started, and leaves it running.
"""

from __future__ import annotations

import gc
import os
import secrets
import unittest
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.cluster import Cluster
from tests.cluster.console import ClusterError
from tests.cluster.jobs import Job

# How long an example takes is the machine's, not the code's.
# And the same examples each time: what is new is looked for where that is what is run for (FINETUNE_RANDOM=1, as `make test-long` does).
settings.register_profile(
    "steady",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=not os.environ.get("FINETUNE_RANDOM"),
)
settings.load_profile("steady")

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if os.environ.get("FINETUNE_CLUSTER") == "attach":
        yield Cluster.attach()
        return
    started = Cluster.start(nodes=2)
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def operator(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The cluster, with the operator installed and what the jobs train on in its store."""
    from tests.cluster.installation import install_on
    from tests.cluster.training_inputs import upload_inputs

    install_on(cluster)
    upload_inputs(cluster, tmp_path_factory.mktemp("inputs"))
    return cluster


@pytest.fixture(scope="session")
def namespace(operator: Cluster) -> Iterator[str]:
    """A namespace that enforces the Pod Security Standard "restricted", with the store's credentials in it."""
    from tests.cluster.training_inputs import make_namespace

    name = f"jobs-{secrets.token_hex(3)}"
    make_namespace(operator, name)
    yield name
    operator.kubectl("delete", "namespace", name, "--wait=false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark whatever uses a cluster, so that none is forgotten, and sort: clusters of a test's own first, what looks back at all that was done last.

    Of two processes one runs the trainer's, which compute, while the other runs what mostly waits: each a folder at a time.
    """
    turns = {}
    for item in items:
        folder = item.path.relative_to(ROOT).parts[0]
        item.add_marker(pytest.mark.xdist_group(folder))
        shares_cluster = "cluster" in getattr(item, "fixturenames", ())
        if shares_cluster or folder == "cluster":
            item.add_marker(pytest.mark.cluster)
        turns[item] = 2 if item.path.name == "test_rights.py" else int(shares_cluster or folder != "cluster")
    items.sort(key=turns.__getitem__)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The jobs of a test that failed go, or they would take the processors from those after it."""
    report = yield
    used = getattr(item, "funcargs", {})
    shares_a_job = any(isinstance(value, Job) for value in used.values())
    if report.failed and {"operator", "namespace"} <= used.keys() and not shares_a_job:
        with suppress(ClusterError):  # the API server may be what the test had stopped
            used["operator"].kubectl("delete", "ftj", "--all", "--namespace", used["namespace"], "--wait=false")
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave no garbage to a state machine: hypothesis parses its source, at which CPython 3.11 fails if finalizers run."""
    if issubclass(getattr(item, "cls", None) or object, unittest.TestCase):
        gc.collect()
