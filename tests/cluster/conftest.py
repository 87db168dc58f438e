"""One cluster for the whole session. FINETUNE_CLUSTER=attach uses one that `python -m tests.cluster up` has started, and leaves it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster import Cluster


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
