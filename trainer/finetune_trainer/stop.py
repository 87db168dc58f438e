"""The wish to stop: SIGTERM, or a file that appears, and nothing else happens until all ranks have agreed on a step.

A save is collective. A rank that saved as soon as it heard the signal would wait for peers that are in the middle of a step, so the loop
sums the flags of all ranks once per step and acts on the sum (transformers' Trainer does not, and hung).
"""

import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from finetune_api import contract


class StopRequest:
    """Whether this worker was asked to stop."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._was_signalled = False
        file = environment.get(contract.SAVE_NOW)
        self._file = Path(file) if file else None

    @property
    def requested(self) -> bool:
        """Whether it was."""
        return self._was_signalled or (self._file is not None and self._file.exists())

    def listen(self) -> None:
        """Take SIGTERM from now on. Call from the main thread."""
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self._was_signalled = True
