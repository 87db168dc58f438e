"""What is being done, one line for each slow step, with its time.

Everything goes to stderr: stdout belongs to the answers of `status` and `logs`, which people pipe.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_started = time.monotonic()


class ClusterError(RuntimeError):
    """Something the user of the harness can act upon: the message says what is wrong and what to do."""


def say(text: str) -> None:
    with _lock:
        print(f"cluster {time.monotonic() - _started:6.1f}s  {text}", file=sys.stderr, flush=True)


@contextmanager
def step(text: str, expected: str | None = None) -> Iterator[None]:
    """One line when the step is done, with its time; one more before it when it is slow and `expected` says how slow."""
    if expected is not None:
        say(f"{text} ({expected}) …")
    began = time.monotonic()
    yield
    say(f"{text}: {time.monotonic() - began:.1f} s")
