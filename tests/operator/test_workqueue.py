"""The queue of keys, in virtual time."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from finetune_operator.workqueue import LAST_BACKOFF_SECONDS, WorkQueue


class VirtualTime(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        self._offset = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self._offset

    def jump(self, seconds: float) -> None:
        self._offset += seconds


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: VirtualTime) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list:
        if timeout:
            self._loop.jump(timeout)
        return super().select(0 if timeout is not None else None)


def in_virtual_time(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        loop = VirtualTime()
        try:
            loop.run_until_complete(asyncio.wait_for(test(), 10**6))
        finally:
            loop.close()

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def now() -> float:
    return asyncio.get_running_loop().time()


@in_virtual_time
async def test_a_key_is_handed_out_once_however_often_it_is_added() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    queue.add("b")
    queue.add("a")
    assert len(queue) == 2
    assert [await queue.take(), await queue.take()] == ["a", "b"]
    assert len(queue) == 0


@in_virtual_time
async def test_a_key_that_is_added_while_it_is_worked_on_comes_again_afterwards_and_not_before() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    assert await queue.take() == "a"
    queue.add("a")
    queue.add("a")
    assert len(queue) == 0
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(), 100)
    queue.done("a")
    assert await queue.take() == "a"
    queue.done("a")
    assert len(queue) == 0


@in_virtual_time
async def test_a_delayed_key_comes_at_its_time_and_the_soonest_wins() -> None:
    queue: WorkQueue[str] = WorkQueue()
    start = now()
    queue.add_after("a", 50)
    queue.add_after("a", 10)
    queue.add_after("a", 30)
    assert await queue.take() == "a"
    assert now() - start == pytest.approx(10)
    queue.done("a")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(), 1000)


@in_virtual_time
async def test_a_delayed_key_does_not_keep_the_same_key_from_coming_now() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add_after("a", 50)
    queue.add("a")
    start = now()
    assert await queue.take() == "a"
    assert now() == start


@in_virtual_time
async def test_failures_come_again_later_and_later_up_to_five_minutes() -> None:
    queue: WorkQueue[str] = WorkQueue()
    delays = []
    for _ in range(40):
        start = now()
        promised = queue.add_failed("a")
        assert await queue.take() == "a"
        queue.done("a")
        assert now() - start == pytest.approx(promised)
        delays.append(promised)
    for number, delay in enumerate(delays, start=1):
        longest = min(LAST_BACKOFF_SECONDS, 0.005 * 2.0**number)
        assert longest / 2 <= delay <= longest


@in_virtual_time
async def test_success_and_other_keys_start_from_the_shortest_delay() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(10):
        queue.add_failed("a")
    assert queue.add_failed("b") <= 0.01
    queue.succeeded("a")
    assert queue.add_failed("a") <= 0.01


@in_virtual_time
async def test_many_failures_overflow_nothing() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue._failures["a"] = 10**6
    assert queue.add_failed("a") <= LAST_BACKOFF_SECONDS


@in_virtual_time
async def test_many_workers_never_have_the_same_key_at_the_same_time() -> None:
    queue: WorkQueue[int] = WorkQueue()
    at_work: set[int] = set()
    turns = 0

    async def work() -> None:
        nonlocal turns
        while True:
            key = await queue.take()
            assert key not in at_work
            at_work.add(key)
            await asyncio.sleep(0.1)
            at_work.discard(key)
            turns += 1
            queue.done(key)

    workers = [asyncio.create_task(work()) for _ in range(4)]
    for number in range(200):
        queue.add(number % 3)
        await asyncio.sleep(0.03)
    await asyncio.sleep(1)
    assert len(queue) == 0
    assert turns >= 60
    assert not [worker for worker in workers if worker.done()]
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)


@in_virtual_time
async def test_a_closed_queue_hands_nothing_out_later() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add_after("a", 1)
    queue.close()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(), 1000)


@in_virtual_time
async def test_how_long_a_key_waited_for_a_worker_is_told_when_it_is_handed_out() -> None:
    waits: list[float] = []
    queue: WorkQueue[str] = WorkQueue(on_wait=waits.append)
    queue.add("a")
    await asyncio.sleep(2)
    queue.add("a")
    await queue.take()
    queue.add("a")
    await asyncio.sleep(50)
    queue.done("a")
    await asyncio.sleep(3)
    await queue.take()
    queue.add_after("b", 20)
    assert await queue.take() == "b"
    assert waits == pytest.approx([2, 3, 0]), "neither work on it nor its own delay is waiting"
