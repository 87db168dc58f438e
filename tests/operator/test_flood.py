"""How often a pod may ask, by a clock of the test's."""

from finetune_operator.jobserver.flood import BURST, PODS_AT_HAND, REQUESTS_PER_SECOND, Allowances


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def taken(allowances: Allowances, pod: str, times: int) -> int:
    return sum(allowances.take(pod) for _ in range(times))


def test_a_burst_and_then_so_many_a_second_however_many_are_asked_for() -> None:
    clock = Clock()
    allowances = Allowances(clock)
    assert taken(allowances, "a", 1000) == BURST
    clock.now += 2
    assert taken(allowances, "a", 1000) == 2 * REQUESTS_PER_SECOND
    clock.now += 3600
    assert taken(allowances, "a", 1000) == BURST


def test_each_pod_has_its_own() -> None:
    allowances = Allowances(Clock())
    assert taken(allowances, "a", 1000) == taken(allowances, "b", 1000) == BURST


def test_who_asks_as_agents_do_is_never_put_off() -> None:
    """Two reports at most every two seconds, a poll that is answered at once each time, and ten of both in a moment of trouble."""
    clock = Clock()
    allowances = Allowances(clock)
    for _ in range(100):
        assert taken(allowances, "a", 4) == 4
        clock.now += 2
    assert taken(allowances, "a", 20) == 20


def test_no_more_pods_are_remembered_than_there_is_room_for() -> None:
    clock = Clock()
    allowances = Allowances(clock)
    assert taken(allowances, "first", 1000) == BURST
    for number in range(PODS_AT_HAND):
        allowances.take(f"pod-{number}")
    assert len(allowances._left) == PODS_AT_HAND
    assert allowances.take("first"), "forgotten, and so as new"
