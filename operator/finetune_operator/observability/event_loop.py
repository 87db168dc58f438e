"""How late the event loop is: a timer that fires late shows how long everything else waits."""

import asyncio
from collections.abc import Callable

PERIOD_SECONDS = 0.5


async def measure_lag(observe: Callable[[float], None]) -> None:
    """Tell, for ever, by how many seconds a timer was late."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + PERIOD_SECONDS
        await asyncio.sleep(PERIOD_SECONDS)
        observe(max(0.0, loop.time() - due))
