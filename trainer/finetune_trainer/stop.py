"""The wish to stop: SIGTERM sets a flag, and nothing else happens until all ranks have agreed on a step.

A save is collective. A rank that saved as soon as it heard the signal would wait for peers that are in the middle of a step, so the loop
sums the flags of all ranks once per step and acts on the sum (transformers' Trainer does not, and hung).
"""

import signal
from types import FrameType


class StopRequest:
    """Whether this worker was asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Take SIGTERM from now on. Call from the main thread."""
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.requested = True
