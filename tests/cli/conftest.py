"""One S3 server and one launch of two ranks, whose jobs the commands are run on."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.jobs import cases, save_models
from tests.storage.seaweedfs import S3Server, running_seaweedfs
from tests.trainer.launch import Case, Launcher, train_all
from tests.trainer.sentences import counting_texts, rated_sentences, write_jsonl


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_seaweedfs(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_models(folder)
    write_jsonl(folder / "train.jsonl", rated_sentences(151))
    write_jsonl(folder / "evaluation.jsonl", rated_sentences(41, seed=2))
    write_jsonl(folder / "texts.jsonl", counting_texts(200))
    write_jsonl(folder / "other-texts.jsonl", counting_texts(31, seed=2))
    return folder


@pytest.fixture(scope="session")
def models(files: Path, server: S3Server) -> str:
    """The models in the store."""
    uri = server.create_bucket("models")
    for path in files.glob("*/*"):
        server.client().upload_file(str(path), "models", f"{path.parent.name}/{path.name}")
    return uri


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory, server: S3Server, files: Path, models: str) -> dict[str, Case]:
    """Jobs of two ranks, trained to their end; each has the prefix ``s3://jobs/<name>``."""
    launcher = Launcher(tmp_path_factory.mktemp("jobs"), server, server.create_bucket("jobs"))
    trained = cases(files, models)
    for name, case in trained.items():
        case.prefix = name
    train_all(launcher, trained, ranks=2)
    failed = {name: case.outcomes[0]["message"] for name, case in trained.items() if case.outcomes[0]["code"]}
    assert not failed, failed
    return trained
