"""What a rank that is slow, and one that hangs, look like to the agent: real ranks, DeepSpeed, and the agent's own eyes."""

import os
import time
from pathlib import Path
from statistics import median

import pytest

from finetune_agent import stacks
from finetune_api import contract
from finetune_api.protocol import BeatKind, Doing, Phase
from tests.trainer.launch import Launcher, Listener, listening
from tests.trainer.recipes import classification
from tests.trainer.slow_rank import SECONDS

DEADLINE_SECONDS = 300
STEPS = 10


def wait_for(condition) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def steps(listener: Listener, rank: int) -> list[float | None]:
    """Return what each step told of took of a rank alone."""
    beats = [beat.heartbeat for beat in listener.beats if beat.kind is BeatKind.HEARTBEAT and beat.rank == rank]
    return [beat.busy_seconds for beat in beats if beat.phase is Phase.TRAINING and beat.busy_seconds is not None]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3])
def test_a_slow_rank_and_one_that_hangs_are_told_from_their_peers(launcher: Launcher, files: Path, stage: int) -> None:
    recipe = classification(files, training={"steps": 100000}, zero={"stage": stage})
    folder = launcher.folder / f"hangs-{stage}"
    offers = folder / "stacks"
    offers.mkdir(parents=True)
    variables = launcher.environment(world_size=2, SLOW_RANK_HANGS=str(folder / "hang"))
    variables |= launcher.write_case(folder, recipe, prefix=f"hangs-{stage}")
    variables[contract.STACKS_FOLDER] = str(offers)
    with listening(folder / "beats") as listener:
        process = launcher.start("tests.trainer.slow_rank", ranks=2, environment=variables)
        wait_for(lambda: all(len(steps(listener, rank)) >= STEPS for rank in (0, 1)) or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        busy = [median(steps(listener, rank)) for rank in (0, 1)]
        (folder / "hang").touch()
        told = -1
        while told != len(listener.beats):  # until all are silent
            told = len(listener.beats)
            time.sleep(3)
        pids = {rank: pid for rank, (pid, _) in stacks.find_offers(offers).items()}
        findings = stacks.examine(offers, pids)
        for pid in pids.values():
            os.kill(pid, 9)
        process.communicate()
    assert busy[1] >= SECONDS > busy[0], "a step takes as long on both, but not of both"
    assert sorted(pids) == [0, 1]
    assert findings[0].doing is Doing.WAITING, findings
    assert findings[1].doing is Doing.WORKING, findings
    assert findings[1].place.endswith("in load_slowly")
    assert findings[1].place.startswith("trainer/slow_rank.py:")
