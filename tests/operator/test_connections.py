"""TLS connections with small buffers: as small as they should be, and whole messages get through."""

import asyncio
import ssl
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from finetune_api.contract import REPORT_BYTES_LIMIT
from finetune_operator.jobserver.certificate_store import server_context
from finetune_operator.jobserver.connections import BUFFER_BYTES, cut_buffers
from finetune_operator.jobserver.tls import make_certificates

HOST = "finetune-operator.finetune-system.svc"


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio.sslproto.SSLProtocol, "max_size", asyncio.sslproto.SSLProtocol.max_size)
    cut_buffers()


@pytest.mark.usefixtures("small_buffers")
async def test_a_report_larger_than_the_buffer_arrives_whole() -> None:
    certificates = make_certificates(HOST, datetime.now(UTC))
    buffers: list[int] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        buffers.append(len(writer.transport._ssl_protocol._ssl_buffer))  # type: ignore[attr-defined]
        writer.write(await reader.readexactly(REPORT_BYTES_LIMIT))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0, ssl=server_context(certificates)) as server:
        port = server.sockets[0].getsockname()[1]
        context = ssl.create_default_context(cadata=certificates.authority)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=HOST)
        said = bytes(range(256)) * (REPORT_BYTES_LIMIT // 256)
        writer.write(said)
        assert await reader.readexactly(len(said)) == said
        writer.close()
    assert buffers == [BUFFER_BYTES]


def test_what_is_free_between_what_is_in_use_is_given_back() -> None:
    """In a process of its own, for others leave holes of theirs. Blocks of 4 KiB are under the size that has a mapping of its own."""
    script = (
        "from finetune_operator.jobserver.connections import give_memory_back\n"
        "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "blocks = [bytearray(4096) for _ in range(20_000)]\n"
        "kept = blocks[::20]\n"
        "del blocks\n"
        "before = rss()\n"
        "give_memory_back()\n"
        "print(before - rss())\n"
    )
    given = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(given.stdout) > 40_000_000
