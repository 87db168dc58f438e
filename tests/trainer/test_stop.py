"""The two ways in which a worker is asked to save and leave."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api import contract
from finetune_trainer.stop import StopRequest


@pytest.fixture
def listening() -> Iterator[StopRequest]:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest({})
    stop.listen()
    yield stop
    signal.signal(signal.SIGTERM, before)


def test_a_signal_is_heard_and_stays(listening: StopRequest) -> None:
    assert not listening.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert listening.requested
    assert listening.requested


def test_a_file_that_appears_is_heard(tmp_path: Path) -> None:
    stop = StopRequest({contract.SAVE_NOW: str(tmp_path / "save-now")})
    assert not stop.requested
    (tmp_path / "save-now").touch()
    assert stop.requested
