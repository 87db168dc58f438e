"""Any world size, stage and precision goes on at any other, full and LoRA, as if it had not been interrupted. Real ranks, a real S3 server."""

import numpy as np
import pytest

from tests.trainer.checkpoint.matrix import MOVES, Move, missing_pairs
from tests.trainer.checkpoint.rounds import SAVE_AT
from tests.trainer.checkpoint.test_round_trips import Launches

TOLERANCES = {"FP32": 1e-5, "BF16": 1e-3, "FP16": 1e-3}
"""Of a loss of about 1.6."""


def test_every_value_meets_every_other():
    assert missing_pairs() == set()


@pytest.fixture(scope="module")
def launches(store_server, tmp_path_factory) -> Launches:
    return Launches(store_server, tmp_path_factory.mktemp("matrix"), bucket="matrix")


@pytest.fixture(scope="module")
def moved(launches: Launches) -> tuple[dict[str, dict], dict[str, dict]]:
    """What was saved, and what became of it elsewhere."""
    seen: dict[str, dict[str, dict]] = {"save_to_move": {}, "move": {}}
    for activity, found in seen.items():
        for ranks in (1, 2, 3):
            done = launches.run(ranks, activity)
            assert done.returncode == 0, done.stdout + done.stderr
            found.update(launches.seen(activity, ranks)[0])
    return seen["save_to_move"], seen["move"]


@pytest.mark.long
@pytest.mark.parametrize("move", MOVES, ids=[move.name for move in MOVES])
def test_a_job_goes_on_elsewhere(launches: Launches, moved: tuple[dict[str, dict], dict[str, dict]], move: Move):
    before, after = (seen[move.name] for seen in moved)
    expected, found = launches.state(before["uri"]), launches.state(after["uri"])
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[key], found[key]) for key in expected), "to the bit, where it starts"
    assert launches.manifest(after["uri"]).world_size == move.to_ranks
    uninterrupted = before["losses"][SAVE_AT:]
    worst = max(abs(one - other) for one, other in zip(after["losses"], uninterrupted, strict=True))
    print(f"{move.name}: {uninterrupted[0]:.3f} to {uninterrupted[-1]:.3f}, apart by at most {worst:.1e}")
    assert worst < TOLERANCES[move.precision]
    assert before["losses"][SAVE_AT] - uninterrupted[-1] > 10 * TOLERANCES[move.precision], (
        "it learns, or this says nothing"
    )
