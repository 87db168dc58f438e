"""An engine in the test process, and gangs of real ranks where one does not do."""

import tempfile
from collections.abc import Iterator

import pytest

from finetune_api.protocol import Resumed, ResumeSource
from finetune_trainer.checkpoint.manifest import Position
from tests.trainer.checkpoint.faulty_store import FaultyStore
from tests.trainer.checkpoint.gangs import running_nursery
from tests.trainer.checkpoint.incarnations import checkpoints, close_all, mark, save
from tests.trainer.checkpoint.site import Site, leave_a_commit_and_a_save_under_way
from tests.trainer.checkpoint.trainee import Case, new_engine, train


@pytest.fixture(scope="module")
def engine(alone):
    engine = new_engine(Case("alone", stage=2, precision="BF16"))
    train(engine, range(1))
    return engine


@pytest.fixture(scope="session")
def site(store_server, tmp_path_factory):
    """Where gangs of real ranks train (see site)."""
    with running_nursery() as nursery:
        site = Site(nursery, store_server, tmp_path_factory.mktemp("site"))
        site.train_undisturbed()
        yield site


@pytest.fixture(scope="session")
def remains(site):
    return leave_a_commit_and_a_save_under_way(site)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("finetune_trainer.checkpoint.commit.FIRST_PAUSE_SECONDS", 0.0)


@pytest.fixture
def store():
    return FaultyStore()


@pytest.fixture
def two_saved(engine, store):
    """Steps 10 and 20, saved by generation 1."""
    first = checkpoints(engine, store, 1)
    assert first.resume() == (Position(0, 0), Resumed(0, ResumeSource.START))
    save(engine, first, 10)
    save(engine, first, 20)
    mark(engine, -1)
    return store


@pytest.fixture(autouse=True)
def pods(tmp_path, monkeypatch):
    """Each incarnation runs in a pod of its own unless a test gives it the memory of another."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(autouse=True)
def incarnations_end() -> Iterator[None]:
    yield
    close_all()
