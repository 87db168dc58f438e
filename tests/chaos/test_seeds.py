"""Seeds without a cluster: the same story each time, every kind of fault among the first hundred, and the plan under many of them."""

import pytest

from tests.chaos.plan_seeds import play
from tests.chaos.scenario import OF_A_JOB, Kind, scenario
from tests.operator.simulation import Cluster

SEEDS = range(1, 101)


def test_a_seed_is_the_same_story_each_time() -> None:
    assert [scenario(seed) for seed in SEEDS] == [scenario(seed) for seed in SEEDS]


def test_a_hundred_seeds_have_every_kind_of_fault() -> None:
    assert {fault.kind for seed in SEEDS for fault in scenario(seed).faults} == set(Kind)


def test_every_seed_has_something_that_a_job_must_get_over() -> None:
    assert all(any(fault.kind in OF_A_JOB for fault in scenario(seed).faults) for seed in SEEDS)


@pytest.mark.parametrize("first", [1, 21])
def test_the_plan_keeps_its_promises_whatever_the_seed(first: int) -> None:
    for seed in range(first, first + 20):
        play(seed)


def test_a_seed_that_breaks_a_promise_says_what_happened_and_how_to_replay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "check", lambda cluster: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        play(3)
    assert error.value.__notes__[0].startswith("python -m tests.chaos --plan --seed 3\n")
