"""One real S3 server for the whole session."""

from collections.abc import Iterator

import pytest

from tests.storage.seaweedfs import S3Server, running_seaweedfs


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server
