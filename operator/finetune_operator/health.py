"""``/healthz`` and ``/readyz``, plain HTTP: alive means that the event loop answers, ready that agents are served."""

from aiohttp import web


class Health:
    """What the probes are told."""

    def __init__(self) -> None:
        self.ready = False

    def app(self) -> web.Application:
        """Return the web application."""
        app = web.Application()
        app.add_routes([web.get("/healthz", self._healthz), web.get("/readyz", self._readyz)])
        return app

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n") if self.ready else web.Response(status=503, text="starting\n")
