"""One real S3 server for the whole session, and the stores that every case of conformance is run against."""

import uuid
from collections.abc import Iterator

import pytest

from finetune_trainer.object_store import MemoryObjectStore, ObjectStore, S3ObjectStore
from tests.storage.seaweedfs import S3Server, running_seaweedfs


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


BUCKET = "s3://conformance"


@pytest.fixture(scope="session")
def real_store(seaweedfs: S3Server) -> ObjectStore:
    seaweedfs.create_bucket("conformance")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seaweedfs.environment.items():
            patch.setenv(name, value)
        return S3ObjectStore(seaweedfs.endpoint)


@pytest.fixture(params=["memory", "seaweedfs"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    return MemoryObjectStore() if request.param == "memory" else request.getfixturevalue("real_store")


@pytest.fixture
def prefix() -> str:
    return f"{BUCKET}/{uuid.uuid4().hex}"
