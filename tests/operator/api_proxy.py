"""An HTTP proxy in front of an API server that misbehaves on demand, since a healthy server cannot be made to.

What goes wrong with a request is decided by ``break_request``, what goes wrong with an event of a watch by ``break_event``; without them all is
passed on as it is. Writes are carried out one at a time, so that ``before`` and ``after`` see a crash point that is a point: when the client
is killed there (``cut_off``), nothing more of what it has sent is carried out.
"""

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Self

import aiohttp
from aiohttp import web
from yarl import URL

SWAP_SECONDS = 0.5  # for the next event, which is to come first
NOT_PASSED_ON = {
    *("host", "connection", "keep-alive", "accept-encoding", "content-encoding", "content-length", "transfer-encoding")
}
GONE_EVENT = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}}


class Fault(Enum):
    """What may go wrong with one request."""

    GONE = auto()  # not carried out, 410
    TOO_MANY = auto()  # not carried out, 429 with Retry-After
    SERVER_ERROR = auto()  # not carried out, 500
    RESET = auto()  # not carried out, and the connection is reset
    ANSWER_LOST = auto()  # carried out, and the connection is reset
    LATE = auto()  # carried out, and answered some time later
    TRUNCATED = auto()  # carried out; half of the answer's body, then the connection is reset


REFUSALS = {Fault.GONE: 410, Fault.TOO_MANY: 429, Fault.SERVER_ERROR: 500}


class EventFault(Enum):
    """What may go wrong with one event of a watch."""

    GONE = auto()  # 410 comes instead of it, and the stream ends
    TORN = auto()  # half of it, then the connection is reset
    STALLED = auto()  # neither it nor any later one of this stream; the connection stays
    REPEATED = auto()  # it comes twice, and once more after the next one
    SWAPPED = auto()  # it comes after the next one


@dataclass(frozen=True, slots=True)
class Request:
    """What the client asks."""

    method: str
    path: str
    is_watch: bool

    @property
    def is_write(self) -> bool:
        return self.method != "GET"

    @property
    def is_list(self) -> bool:
        """Whether jobs or pods are asked for, all of them."""
        return not self.is_write and not self.is_watch and self.path.endswith(("/pods", "/finetunejobs"))


async def _nothing(_: Request) -> None:
    return


class ApiProxy:
    """Where the proxy listens, and what it does wrong. ``context`` is how the API server at ``backend`` is to be trusted."""

    def __init__(self, backend: str, context: ssl.SSLContext | None = None) -> None:
        self.break_request: Callable[[Request], Fault | None] = lambda _: None
        self.break_event: Callable[[Request, bytes], EventFault | None] = lambda *_: None
        self.before: Callable[[Request], Awaitable[None]] = _nothing
        self.after: Callable[[Request], Awaitable[None]] = _nothing
        self.retry_after_seconds = 1
        self.late_seconds = 1.0
        self.requests: list[Request] = []
        self.url = ""
        self._backend, self._context = backend, context
        self._one_write = asyncio.Lock()
        self._connections: set[asyncio.Transport] = set()
        self._stopping = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._context or False),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=2**22,  # the longest line that can be read
        )
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        self._stopping.set()
        self.cut_off()
        await self._runner.cleanup()
        await self._session.close()

    def cut_off(self) -> None:
        """End all connections: what was sent over them and not yet carried out never is."""
        for transport in self._connections:
            transport.abort()
        self._connections.clear()

    async def _handle(self, incoming: web.Request) -> web.StreamResponse:
        transport = incoming.transport
        assert transport is not None
        self._connections = {one for one in self._connections if not one.is_closing()} | {transport}
        try:
            return await self._answer(incoming, transport)
        except aiohttp.ClientError:  # the API server itself has ended the connection, or is not there
            return _reset(transport)

    async def _answer(self, incoming: web.Request, transport: asyncio.Transport) -> web.StreamResponse:
        request = Request(incoming.method, incoming.path, "watch" in incoming.query)
        body = await incoming.read()
        self.requests.append(request)
        fault = self.break_request(request)
        if fault is Fault.RESET:
            return _reset(transport)
        if fault in REFUSALS:
            return self._refusal(REFUSALS[fault])
        if request.is_write:
            async with self._one_write:
                if not transport.is_closing():
                    await self.before(request)
                if transport.is_closing():
                    return _reset(transport)
                answer = await self._forward(incoming, body, fault)
                await self.after(request)
        elif request.is_watch:
            return await self._watch(incoming, request)
        else:
            answer = await self._forward(incoming, body, fault)
        if fault is Fault.ANSWER_LOST:
            return _reset(transport)
        if fault is Fault.LATE:
            await asyncio.sleep(self.late_seconds)
        return answer

    def _refusal(self, status: int) -> web.Response:
        headers = {"Retry-After": str(self.retry_after_seconds)} if status == 429 else {}
        said = {"kind": "Status", "apiVersion": "v1", "code": status, "message": "as the test wants it"}
        return web.json_response(said, status=status, headers=headers)

    async def _forward(self, incoming: web.Request, body: bytes, fault: Fault | None) -> web.StreamResponse:
        async with self._ask(incoming, body) as answer:
            content = await answer.read()
            if fault is Fault.TRUNCATED:
                return await _half(incoming, content)
            headers = {name: value for name, value in answer.headers.items() if name.lower() not in NOT_PASSED_ON}
            return web.Response(status=answer.status, headers=headers, body=content)

    def _ask(self, incoming: web.Request, body: bytes) -> Any:
        headers = {name: value for name, value in incoming.headers.items() if name.lower() not in NOT_PASSED_ON}
        url = URL(self._backend + incoming.raw_path, encoded=True)
        return self._session.request(incoming.method, url, data=body or None, headers=headers)

    async def _watch(self, incoming: web.Request, request: Request) -> web.StreamResponse:
        async with self._ask(incoming, b"") as answer:
            stream = web.StreamResponse(status=answer.status, headers={"Content-Type": "application/json"})
            await stream.prepare(incoming)
            with suppress(ConnectionError):
                async for line in self._broken(request, _lines(answer.content)):
                    await stream.write(line)
                    if not line.endswith(b"\n"):
                        assert incoming.transport is not None
                        await asyncio.sleep(0.05)  # for what was written to leave
                        return _reset(incoming.transport)
        return stream

    async def _broken(self, request: Request, lines: AsyncIterator[bytes | None]) -> AsyncIterator[bytes]:
        """Yield what the client is to see; a line without an end is the last."""
        held: list[bytes] = []
        async for line in lines:
            fault = self.break_event(request, line) if line else None
            if fault is EventFault.STALLED:
                await self._stopping.wait()
            elif fault is EventFault.GONE:
                yield json.dumps(GONE_EVENT).encode() + b"\n"
                return
            elif fault is EventFault.TORN:
                assert line is not None
                yield line[: len(line) // 2]
                return
            elif fault is EventFault.SWAPPED:
                assert line is not None
                held.append(line)
                continue
            if line:
                yield line
            for late in held:
                yield late
            held = []
            if line and fault is EventFault.REPEATED:
                yield line
                held = [line]


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes | None]:
    """Yield the lines of a stream as they come, and None whenever none has come for a while."""
    line = asyncio.ensure_future(content.readline())
    try:
        while True:
            await asyncio.wait({line}, timeout=SWAP_SECONDS)
            if not line.done():
                yield None
            elif text := line.result():
                yield text
                line = asyncio.ensure_future(content.readline())
            else:
                return
    finally:
        line.cancel()
        with suppress(asyncio.CancelledError, aiohttp.ClientError):
            await line


async def _half(incoming: web.Request, content: bytes) -> web.StreamResponse:
    stream = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(content))})
    await stream.prepare(incoming)
    await stream.write(content[: len(content) // 2])
    await asyncio.sleep(0.05)  # for what was written to leave
    assert incoming.transport is not None
    return _reset(incoming.transport)


def _reset(transport: asyncio.Transport) -> web.Response:
    """End a connection without the usual farewell; what is returned goes nowhere."""
    with suppress(OSError):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
    return web.Response()
