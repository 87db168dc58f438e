"""A queue of keys: each key at most once in it, at most one worker on a key, failures later and later.

A key that is added while a worker has it is handed out again after that worker is done, so no change is missed and no key is worked on
twice at a time. That is all that level-based reconciling needs of its events.
"""

import asyncio
import random
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

FIRST_BACKOFF_SECONDS = 0.005
LAST_BACKOFF_SECONDS = 300.0


K = TypeVar("K", bound=Hashable)


def _ignore(_: float) -> None:
    pass


class WorkQueue(Generic[K]):
    """Hands out keys. Must be used from one event loop. ``on_wait`` is told for how many seconds each has waited for a worker."""

    def __init__(self, on_wait: Callable[[float], None] = _ignore) -> None:
        self._on_wait = on_wait
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._waiting: dict[K, float] = {}  # in _ready → since when
        self._working: set[K] = set()
        self._again: set[K] = set()  # added while a worker has them
        self._failures: dict[K, int] = {}
        self._timers: dict[K, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        """How many keys wait to be handed out now."""
        return len(self._waiting)

    def add(self, key: K) -> None:
        """Hand ``key`` out as soon as a worker is free."""
        if key in self._working:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting[key] = asyncio.get_running_loop().time()
            self._ready.put_nowait(key)

    def add_after(self, key: K, seconds: float) -> None:
        """Hand ``key`` out in ``seconds``, or sooner if an earlier time is set already."""
        loop = asyncio.get_running_loop()
        at = loop.time() + seconds
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= at:
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_at(at, self._fire, key)

    def add_failed(self, key: K) -> float:
        """Hand ``key`` out after its own, growing delay, and return that delay in seconds."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay = min(LAST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 30))
        delay *= random.uniform(0.5, 1.0)  # noqa: S311
        self.add_after(key, delay)
        return delay

    async def take(self) -> K:
        """Wait for a key. The caller must call ``done`` with it."""
        key = await self._ready.get()
        self._on_wait(asyncio.get_running_loop().time() - self._waiting.pop(key))
        self._working.add(key)
        return key

    def succeeded(self, key: K) -> None:
        """Forget the failures of ``key``."""
        self._failures.pop(key, None)

    def done(self, key: K) -> None:
        """Give a key back."""
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def close(self) -> None:
        """Cancel all timers."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _fire(self, key: K) -> None:
        del self._timers[key]
        self.add(key)
