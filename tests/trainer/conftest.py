"""Files, a store and launches that the trainer's tests share: one launch per number of ranks trains all cases."""

import os
import tempfile

# Both are read when they are imported, which the test modules below do.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.storage.seaweedfs import S3Server, running_seaweedfs
from tests.trainer.cases import cases_of_one_rank, cases_of_three_ranks, cases_of_two_ranks
from tests.trainer.launch import Case, Launcher, train_all
from tests.trainer.sentences import counting_texts, poisoned, rated_sentences, spiked, write_jsonl
from tests.trainer.tiny_models import save_bert, save_llama


@pytest.fixture(scope="session", autouse=True)
def _temporary_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Staging folders that the tests make as a pod's agent would: beside their other files, and gone with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("staging")))
        yield


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process is rank 0 of 1."""
    import deepspeed

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        rendezvous = tmp_path_factory.mktemp("group") / "store"
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        yield
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models and data sets."""
    folder = tmp_path_factory.mktemp("files")
    save_bert(folder / "bert")
    save_bert(folder / "bert-overflowing", overflowing=True)
    save_bert(folder / "bert-poisoned", poisoned=True)
    save_llama(folder / "llama")
    save_llama(folder / "llama-config", weights=False)
    write_jsonl(folder / "train.jsonl", rated_sentences(151))
    write_jsonl(folder / "train-poisoned.jsonl", poisoned(rated_sentences(151)))
    write_jsonl(folder / "train-spiked.jsonl", spiked(rated_sentences(400)))
    write_jsonl(folder / "evaluation.jsonl", rated_sentences(41, seed=2))
    write_jsonl(folder / "texts.jsonl", counting_texts(200))
    write_jsonl(folder / "other-texts.jsonl", counting_texts(31, seed=2))
    return folder


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_seaweedfs(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory, store_server: S3Server) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("jobs"), store_server, store_server.create_bucket("jobs"))


@pytest.fixture(scope="session")
def one_rank(launcher: Launcher, files: Path) -> dict[str, Case]:
    return train_all(launcher, cases_of_one_rank(files), ranks=1)


@pytest.fixture(scope="session")
def two_ranks(launcher: Launcher, files: Path) -> dict[str, Case]:
    return train_all(launcher, cases_of_two_ranks(files), ranks=2)


@pytest.fixture(scope="session")
def three_ranks(launcher: Launcher, files: Path, two_ranks: dict[str, Case]) -> dict[str, Case]:
    """After those of two ranks, one of which is continued here."""
    return train_all(launcher, cases_of_three_ranks(files), ranks=3)
