"""Some short seeds on the real cluster; ``python -m tests.chaos`` plays any others."""

import pytest

from tests.chaos.run import Chaos
from tests.cluster.cluster import Cluster

SHORT = (1, 18, 23, 42, 54)
LONG = range(1, 101)


@pytest.mark.timeout(2400)
def test_short_seeds_break_no_promise(operator: Cluster, namespace: str) -> None:
    for outcome in Chaos(operator, namespace).play(SHORT, beside=len(SHORT)):
        assert not outcome.broken, f"{outcome}\n{outcome.scenario.replay}\n{outcome.story}"


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_hundred_seeds_break_no_promise(operator: Cluster, namespace: str) -> None:
    broken = [outcome for outcome in Chaos(operator, namespace).play(LONG, beside=3) if outcome.broken]
    assert not broken, "\n".join(f"{outcome}\n{outcome.scenario.replay}" for outcome in broken)
