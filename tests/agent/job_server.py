"""A job server that speaks the real protocol over real TLS and does what a test tells it."""

import asyncio
import contextlib
import datetime as dt
import ipaddress
import json
import ssl
from collections.abc import Callable
from pathlib import Path

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from finetune_api.contract import ORDER_PATH, REPORT_BYTES_LIMIT, REPORT_PATH
from finetune_api.protocol import Action, Order, Report, from_wire, to_wire

DEADLINE_SECONDS = (
    300.0  # torchrun and its workers import torch one after the other, on a machine that may have other work
)
POLL_SECONDS = 1.5


class JobServer:
    """``reports`` is all that arrived, by pod; ``orders`` what pods should be doing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None
        self._app: web.Application | None = None
        self.port = 0
        self.tokens = {"first-token"}
        self.refusals: list[int] = []  # HTTP statuses of what was refused
        self.refuse_with = 0
        self.reports: dict[str, list[Report]] = {}
        self.orders: dict[str, Order] = {}
        self.polls = 0

    @property
    def ca_file(self) -> Path:
        return self._folder / "ca.crt"

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    async def start(self) -> None:
        app = self._app = web.Application(client_max_size=REPORT_BYTES_LIMIT)
        app.router.add_post(REPORT_PATH, self._report)
        app.router.add_get(ORDER_PATH, self._order)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._folder / "server.crt", self._folder / "server.key")
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=context, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None

    def latest(self, pod: str) -> Report | None:
        return self.reports[pod][-1] if self.reports.get(pod) else None

    async def order(self, pod: str, order: Order) -> None:
        async with self._changed:
            self.orders[pod] = order
            self._changed.notify_all()

    async def until(self, condition: Callable[[], object], seconds: float = DEADLINE_SECONDS) -> None:
        """Wait for a condition on what was reported."""
        async with self._changed:
            try:
                async with asyncio.timeout(seconds):
                    await self._changed.wait_for(lambda: bool(condition()))
            except TimeoutError:
                raise AssertionError(
                    f"not in {seconds} s; latest: " + repr({p: r[-1] for p, r in self.reports.items()})
                ) from None

    async def _report(self, request: web.Request) -> web.Response:
        if refusal := self._refusal(request):
            return refusal
        report = from_wire(Report, await request.json())
        async with self._changed:
            self.reports.setdefault(report.pod_uid, []).append(report)
            self._changed.notify_all()
        return web.json_response(to_wire(self._current(report.pod_uid)))

    async def _order(self, request: web.Request) -> web.Response:
        if refusal := self._refusal(request):
            return refusal
        self.polls += 1
        pod = request.query["pod_uid"]
        known = (int(request.query["known_generation"]), request.query["known_action"])

        def is_news() -> bool:
            order = self._current(pod)
            return (order.generation, order.action.value) != known

        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(is_news), POLL_SECONDS)
        return web.json_response(to_wire(self._current(pod)))

    def _current(self, pod: str) -> Order:
        return self.orders.get(pod, Order(Action.WAIT))

    def _refusal(self, request: web.Request) -> web.Response | None:
        if request.app is not self._app:  # a poll that ended just as the server was stopped keeps its connection
            response = web.Response(status=503)
            response.force_close()
            return response
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        status = self.refuse_with or (0 if token in self.tokens else 401)
        if not status:
            return None
        self.refusals.append(status)
        return web.Response(status=status, text=json.dumps({"message": "refused"}))


def make_certificates(folder: Path, host: str = "localhost") -> None:
    """Write ca.crt, and server.crt and server.key for ``host``, signed by it."""
    ca_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = certificate("test CA", ca_key, "test CA", ca_key, [x509.BasicConstraints(ca=True, path_length=0)])
    names = x509.SubjectAlternativeName([x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.99"))])
    server = certificate(host, server_key, "test CA", ca_key, [names])
    (folder / "ca.crt").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server.crt").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").write_bytes(server_key.private_bytes(*plain))


def certificate(subject, key, issuer, issuer_key, extensions):
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=1))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
    return builder.sign(issuer_key, hashes.SHA256())
