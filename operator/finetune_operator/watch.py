"""kopf hosts the watches and the life of the process, and nothing else of it is used.

Only ``on.event`` handlers: with any other kind kopf writes annotations and finalizers, one PATCH an object. They swallow exceptions, are
never retried, and kopf patches what they return into status: so they are two lines, which observe and return None. Peering is off
(``standalone``); all other rules are settings below, each with its reason.
"""

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any

import kopf

from finetune_api.contract import GROUP, PLURAL, VERSION
from finetune_operator.kube.errors import KubeError
from finetune_operator.runtime import POD_SELECTOR, Runtime
from finetune_operator.settings import Settings

logger = logging.getLogger(__name__)


async def run_operator(settings: Settings) -> None:
    """Run until a signal ends the process, or a part of it dies.

    Raises:
        KubeError: it cannot be started.
    """
    logging.getLogger("kopf.objects").setLevel(
        logging.WARNING
    )  # else each event is a line, for its handler has succeeded
    registry = kopf.OperatorRegistry()
    stop = asyncio.Event()
    host = _Host(settings, stop)
    kopf.on.login(registry=registry)(_login)
    kopf.on.startup(registry=registry, errors=kopf.ErrorsMode.PERMANENT)(host.start)  # not again after a minute
    kopf.on.cleanup(registry=registry)(host.stop)
    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(host.see_job)
    kopf.on.event("", "v1", "pods", registry=registry)(host.see_pod)
    try:
        await kopf.operator(
            registry=registry,
            settings=_kopf_settings(),
            standalone=True,
            clusterwide=not settings.watch_namespaces,
            namespaces=host.namespaces,
            stop_flag=stop,
        )
    except Exception:
        if host.error is not None:  # kopf wraps it in one of its own
            raise host.error from None
        raise
    if host.failed:
        raise SystemExit(1)


class _NoComparison(kopf.DiffBaseStorage):  # type: ignore[misc]  # kopf is not followed
    """Compares no versions of an object. kopf does so for handlers of changes, of which there are none, and copies each object twice for it."""

    def build(self, **_: Any) -> Any:
        """Return what kopf would compare."""
        return {}

    def fetch(self, **_: Any) -> None:
        """Return what it has kept of an object."""

    def store(self, **_: Any) -> None:
        """Keep nothing."""


class _Host:
    """The handlers. The runtime is closed over, because kopf copies its ``memo`` for each object."""

    def __init__(self, settings: Settings, stop: asyncio.Event) -> None:
        self._settings, self._stop = settings, stop
        self.namespaces = list(
            settings.watch_namespaces
        )  # kopf looks at it when ``start`` has found out which of them there are
        self._runtime: Runtime | None = None
        self.failed = False
        self.error: KubeError | None = None

    async def start(self, **_: Any) -> None:
        """Build the runtime, before the first event."""
        try:
            self._runtime = await Runtime.start(self._settings, on_fatal=self._fail, on_lost=_end_at_once)
        except KubeError as error:
            self.error = error
            raise
        self.namespaces[:] = self._runtime.namespaces

    async def stop(self, **_: Any) -> None:
        """Free the runtime."""
        if self._runtime is not None:
            await self._runtime.stop()

    async def see_job(self, event: Mapping[str, Any], **_: Any) -> None:
        """Observe, enqueue."""
        runtime = self._runtime_that_sees(event)
        runtime.observe_job(event["object"], deleted=event["type"] == "DELETED")

    async def see_pod(self, event: Mapping[str, Any], **_: Any) -> None:
        """Observe, enqueue."""
        runtime = self._runtime_that_sees(event)
        runtime.observe_pod(event["object"], deleted=event["type"] == "DELETED")

    def _runtime_that_sees(self, event: Mapping[str, Any]) -> Runtime:
        assert self._runtime is not None
        if event["type"] is None:  # in a list, with which kopf begins to watch, and begins anew after a 410
            self._runtime.watch_has_begun()
        return self._runtime

    def _fail(self) -> None:
        self.failed = True
        self._stop.set()


def _end_at_once() -> None:
    """End the process without any last words: somebody else may lead, and the kernel closes the connections of agents."""
    os._exit(1)


def _login(**kwargs: Any) -> Any:
    if os.path.exists("/var/run/secrets/kubernetes.io/serviceaccount/token"):  # noqa: PTH110  one name, no path to build
        return kopf.login_with_service_account(**kwargs)
    return kopf.login_with_kubeconfig(**kwargs)


def _kopf_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.persistence.finalizer = f"{GROUP}/unused"  # kopf strips a finalizer of this name when no handler needs it
    settings.persistence.diffbase_storage = _NoComparison()
    settings.watching.server_timeout = 600
    settings.watching.client_timeout = 660
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = 70  # bookmarks come every 60 s: a silent stream is a dead one
    settings.watching.chunk_size = 500
    settings.watching.label_selectors["pods"] = POD_SELECTOR
    settings.networking.request_timeout = 30
    settings.networking.enforce_retry_after = True
    settings.scanning.disabled = True  # no watch of CRDs and namespaces, and no right to one
    settings.posting.level = logging.WARNING
    settings.posting.loggers = False
    return settings
