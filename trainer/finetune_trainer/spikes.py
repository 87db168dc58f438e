"""What a loss spike is: a pure function of the losses before it, so that a resumed run decides as an uninterrupted one.

A single hard batch moves the loss by some percent, a diverging model by multiples. So a spike is a loss of several times the *largest* of
the recent ones, and one that matters: late in fine-tuning losses of hundredths jump by multiples and mean nothing.

The samples of the steps right before are suspected too: a batch spoils the weights in its own step, and shows in the next ones.
"""

import math
from collections.abc import Sequence

WINDOW = 64
"""How many losses are remembered."""

ENOUGH = 16
"""Below so many nothing is judged: the first steps from random weights fall steeply and are noisy."""

FACTOR = 3.0
"""How many times the largest recent loss."""

FLOOR = 1.0
"""Losses below this many nats per target are never spikes."""

SUSPECT_STEPS = 8
"""How many steps before a spike are left out with it."""


def remembered(recent: Sequence[float], loss: float) -> tuple[float, ...]:
    """Return the recent losses after one more. One that is not finite (FP16 overflows are stepped over) is not remembered."""
    return tuple([*recent, loss][-WINDOW:]) if math.isfinite(loss) else tuple(recent)


def is_spike(loss: float, recent: Sequence[float]) -> bool:
    """Tell whether a loss is one, after ``recent`` ones."""
    return len(recent) >= ENOUGH and math.isfinite(loss) and loss > max(FLOOR, FACTOR * max(recent))
