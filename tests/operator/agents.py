"""Agents of training pods as coroutines: the real protocol over real TLS, with the mind of a ``SimulatedAgent`` and no processes.

As the real agent does, each one has two connections to the job server, on one of which it reports, at once when it has something to tell and
every so often when it has not, while it waits for another order on the other. Any answer but an order closes the connection, and it tries again later.

Thousands of them fit into one process: HTTP is written by hand, and asyncio's buffer for TLS, 256 KiB a connection, is cut to the
16 KiB that a TLS record may have.
"""

import asyncio
import json
import math
import random
import ssl
from asyncio import sslproto
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from finetune_agent.reporting import (
    FIRST_BACKOFF_SECONDS,
    LONGEST_BACKOFF_SECONDS,
    NOT_LEADER,
    NOT_LEADER_SECONDS,
    POLL_MARGIN_SECONDS,
    PROGRESS_SECONDS,
    QUICK_ANSWER_SECONDS,
    REPORT_SECONDS,
    SILENCE_SECONDS,
    Orders,
    encode,
    facts,
)
from finetune_api.contract import ORDER_PATH, ORDER_POLL_SECONDS, REPORT_PATH
from finetune_api.protocol import Order, Report, from_wire
from tests.operator.simulation import SimulatedAgent

TLS_RECORD_BYTES = 16 * 1024
sslproto.SSLProtocol.max_size = TLS_RECORD_BYTES  # of each connection made from now on


class NoOrder(Exception):
    """The job server is away or refuses; ``status`` is what it answered, or 0."""

    def __init__(self, why: str, status: int = 0) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class JobServerAccess:
    """Where the job server is, and under which name it shows its certificate. The port is asked for anew for each connection."""

    port: Callable[[], int]
    server_name: str
    context: ssl.SSLContext
    address: str = "127.0.0.1"


class Agent:
    """One agent. ``run`` ends when it is told to finish; ``token`` returns the token to show with the next request."""

    def __init__(
        self,
        mind: SimulatedAgent,
        access: JobServerAccess,
        token: Callable[[], Awaitable[str]],
        *,
        on_start: Callable[[SimulatedAgent], None] = lambda _: None,
    ) -> None:
        self.mind = mind
        self.requests = 0
        self.answered_at = -math.inf  # by the loop's clock, with an order
        self._access, self._token, self._on_start = access, token, on_start
        self._orders = Orders(self._obey)
        self._changed = asyncio.Event()

    def tell(self) -> None:
        """Have it look at its mind, in which somebody has changed something."""
        self._changed.set()

    async def run(self) -> None:
        """Report and obey until told to finish."""
        talkers = [asyncio.create_task(talk) for talk in (self._report(), self._poll())]
        try:
            await asyncio.wait(talkers, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for talker in talkers:
                talker.cancel()
            outcomes = await asyncio.gather(*talkers, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _report(self) -> None:
        connection = _Connection(self._access)
        loop = asyncio.get_running_loop()

        async def post() -> Report:
            report = self.mind.report()
            self._orders.hear(await self._ask(connection, "POST", REPORT_PATH, encode(report), REPORT_SECONDS))
            return report

        try:
            while not self.mind.finished:
                self._changed.clear()
                posted, at = await self._persistently(post), loop.time()
                while not self.mind.finished and loop.time() < at + _patience(posted, self.mind.report()):
                    await _set_within(self._changed, PROGRESS_SECONDS)
                    self._changed.clear()
        finally:
            connection.close()

    async def _poll(self) -> None:
        connection = _Connection(self._access)
        seconds = ORDER_POLL_SECONDS + POLL_MARGIN_SECONDS

        async def poll() -> bool:
            known = self._orders.known
            query = {
                "pod_uid": self.mind.uid,
                "known_generation": known.generation,
                "known_action": known.action.value,
            }
            path = f"{ORDER_PATH}?{urlencode(query)}"
            return self._orders.hear(await self._ask(connection, "GET", path, b"", seconds))

        loop = asyncio.get_running_loop()
        try:
            while not self.mind.finished:
                asked = loop.time()
                if not await self._persistently(poll) and loop.time() - asked < QUICK_ANSWER_SECONDS:
                    await asyncio.sleep(QUICK_ANSWER_SECONDS)
        finally:
            connection.close()

    async def _persistently(self, do: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        wait = FIRST_BACKOFF_SECONDS
        while True:
            try:
                return await do()
            except NoOrder as error:
                longest = NOT_LEADER_SECONDS if error.status == NOT_LEADER else LONGEST_BACKOFF_SECONDS
                await asyncio.sleep(min(wait, longest) * random.uniform(0.5, 1.0))
                wait *= 2

    async def _ask(self, connection: "_Connection", method: str, path: str, body: bytes, seconds: float) -> Order:
        token = await self._token()
        self.requests += 1
        try:
            async with asyncio.timeout(seconds):
                status, answer = await connection.ask(method, path, token, body)
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            connection.close()
            raise NoOrder(str(error) or type(error).__name__) from error
        if status != 200:
            connection.close()
            raise NoOrder(answer.decode(), status)
        self.answered_at = asyncio.get_running_loop().time()
        return from_wire(Order, json.loads(answer))

    def _obey(self, order: Order) -> None:
        if self.mind.obey(order):
            self._on_start(self.mind)
        self._changed.set()


class _Connection:
    """One kept connection, opened when it is needed."""

    def __init__(self, access: JobServerAccess) -> None:
        self._access = access
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, token: str, body: bytes) -> tuple[int, bytes]:
        """Return the status and the body of the answer to one request."""
        if self._streams is None:
            access = self._access
            self._streams = await asyncio.open_connection(
                access.address, access.port(), ssl=access.context, server_hostname=access.server_name
            )
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._access.server_name}\r\nAuthorization: Bearer {token}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
        headers = dict(line.split(": ", 1) for line in lines if line)
        return int(status_line.split()[1]), await reader.readexactly(int(headers["content-length"]))

    def close(self) -> None:
        if self._streams is not None:
            with suppress(OSError):
                self._streams[1].transport.abort()  # type: ignore[attr-defined]
        self._streams = None


def _patience(posted: Report, now: Report) -> float:
    """Return how long after a report the next one is due, as the real agent has it."""
    if facts(posted) != facts(now):
        return 0.0
    return SILENCE_SECONDS if posted == now else PROGRESS_SECONDS


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
