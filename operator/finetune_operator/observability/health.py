"""``/healthz`` and ``/readyz``, plain HTTP. Each answers with what is wrong, or with ``ok``.

They are served by the event loop that does all the work: one that hangs gives no answer, which is answer enough.
"""

from collections.abc import Callable

from aiohttp import web


class Health:
    """What the probes are told: ``trouble`` and ``unready`` return what is wrong, in a sentence, or nothing."""

    def __init__(self) -> None:
        self.trouble: Callable[[], str] = lambda: ""
        self.unready: Callable[[], str] = lambda: "starting"

    def app(self) -> web.Application:
        """Return the web application."""
        app = web.Application()
        app.add_routes([web.get("/healthz", self._healthz), web.get("/readyz", self._readyz)])
        return app

    async def _healthz(self, _: web.Request) -> web.Response:
        return _answer(self.trouble())

    async def _readyz(self, _: web.Request) -> web.Response:
        return _answer(self.unready())


def _answer(wrong: str) -> web.Response:
    return web.Response(status=503, text=f"{wrong}\n") if wrong else web.Response(text="ok\n")
