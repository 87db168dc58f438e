"""What counts as a loss spike, and what does not."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.spikes import ENOUGH, FACTOR, FLOOR, WINDOW, is_spike, remembered

STEADY = (2.0,) * ENOUGH


@pytest.mark.parametrize(
    ("loss", "recent", "expected"),
    [
        (6.1, STEADY, True),
        (6.0, STEADY, False),
        (6.1, STEADY[1:], False),
        (100.0, (), False),
        (6.1, (*STEADY, 2.1), False),
        (0.99, (0.01,) * ENOUGH, False),
        (1.01, (0.01,) * ENOUGH, True),
        (math.nan, STEADY, False),
        (math.inf, STEADY, False),
    ],
    ids=["a multiple", "just not", "too early", "the first", "one was higher", "small", "not small", "nan", "infinite"],
)
def test_a_spike_is_a_multiple_of_the_largest_recent_loss_and_not_small(loss, recent, expected):
    assert is_spike(loss, recent) is expected


@given(st.lists(st.floats(0.0, 1e6) | st.sampled_from([math.nan, math.inf]), max_size=3 * WINDOW))
def test_the_newest_finite_losses_are_remembered(losses):
    recent = ()
    for loss in losses:
        recent = remembered(recent, loss)
    assert recent == tuple(loss for loss in losses if math.isfinite(loss))[-WINDOW:]


@given(st.lists(st.floats(0.5, 1.4), min_size=ENOUGH, max_size=200))
def test_noise_within_the_factor_is_never_a_spike(losses):
    recent = ()
    for loss in losses:
        assert not is_spike(loss, recent), (FACTOR, FLOOR)
        recent = remembered(recent, loss)
