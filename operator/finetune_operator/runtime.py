"""The whole state of an operator process: built in one place at start, freed in one place at the end."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any, Self

from aiohttp import web

from finetune_api.contract import MANAGED_BY_LABEL, MANAGER
from finetune_operator.access import check_access
from finetune_operator.cache import Cache, JobKey
from finetune_operator.health import Health
from finetune_operator.jobserver.app import JobServer
from finetune_operator.jobserver.auth import TokenVerifier
from finetune_operator.jobserver.certificate_store import load_certificates, server_context
from finetune_operator.jobserver.reports import Reports
from finetune_operator.kube.api import JOBS, PODS, Resource
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.errors import Conflict, KubeError
from finetune_operator.kube_object import KubeObject
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

POD_SELECTOR = f"{MANAGED_BY_LABEL}={MANAGER}"
RESYNC_SECONDS = 300.0
CONFLICT_SECONDS = 0.05


class Runtime:
    """One operator process. ``start`` it, feed it with what the watches see, ``stop`` it."""

    def __init__(self, settings: Settings, client: KubeClient, ca_certificates: str) -> None:
        self._settings, self._client = settings, client
        self.cache = Cache()
        self.queue: WorkQueue[JobKey] = WorkQueue()
        self._reports = Reports(_now)
        self._job_server = JobServer(
            cache=self.cache, reports=self._reports, verifier=TokenVerifier(client), on_news=self.queue.add
        )
        self._reconciler = Reconciler(
            api=client,
            cache=self.cache,
            reports=self._reports,
            settings=settings,
            ca_certificates=ca_certificates,
            on_status=self._job_server.job_changed,
            clock=_now,
        )
        self.health = Health()
        self._runners: list[web.AppRunner] = []
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, settings: Settings, on_fatal: Callable[[], None]) -> Self:
        """Connect, take stock, and serve. ``on_fatal`` is called when a part of the process has died."""
        client = await KubeClient.connect()
        await check_access(client, settings)
        certificates = await load_certificates(client, settings, _now())
        runtime = cls(settings, client, certificates.authority)
        await runtime._take_stock()
        await runtime._listen(runtime._job_server.app(), settings.job_server_port, server_context(certificates))
        await runtime._listen(runtime.health.app(), settings.health_port, None)
        for number in range(settings.workers):
            runtime._spawn(runtime._work(), f"worker-{number}", on_fatal)
        runtime._spawn(runtime._resync(), "resync", on_fatal)
        runtime.health.ready = True
        logger.info("serving agents on port %d", settings.job_server_port)
        return runtime

    async def stop(self) -> None:
        """End all tasks and close all connections."""
        self.health.ready = False
        self.queue.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for runner in self._runners:
            await runner.cleanup()
        await self._client.close()

    def observe_job(self, body: Mapping[str, Any], *, deleted: bool) -> None:
        """Take in what the watch of jobs has seen."""
        key = self.cache.observe_job(body, deleted=deleted)
        if deleted:
            self._reconciler.forget(body["metadata"]["uid"])
        self._job_server.job_changed(key)
        self.queue.add(key)

    def observe_pod(self, body: Mapping[str, Any], *, deleted: bool) -> None:
        """Take in what the watch of pods has seen."""
        key = self.cache.observe_pod(body, deleted=deleted)
        if key is not None:
            self.queue.add(key)

    async def _take_stock(self) -> None:
        """Replace what the cache knows by full lists, and look at every job."""
        self.cache.begin_sweep()
        for job in await self._list(JOBS, None):
            self.queue.add(self.cache.observe_job(job))
        for pod in await self._list(PODS, POD_SELECTOR):
            self.cache.observe_pod(pod)
        for key in self.cache.end_sweep():
            self.queue.add(key)
        self._reports.keep_only(self.cache.pod_uids())

    async def _list(self, resource: Resource, selector: str | None) -> list[KubeObject]:
        namespaces = self._settings.watch_namespaces or (None,)
        lists = [await self._client.list(resource, namespace, label_selector=selector) for namespace in namespaces]
        return [item for items in lists for item in items]

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(RESYNC_SECONDS)
            try:
                await self._take_stock()
            except KubeError as error:
                logger.warning("cannot list all jobs and pods now: %s", error)

    async def _work(self) -> None:
        while True:
            key = await self.queue.take()
            try:
                await self._reconcile(key)
            finally:
                self.queue.done(key)

    async def _reconcile(self, key: JobKey) -> None:
        try:
            look_again = await self._reconciler.reconcile(key)
        except Conflict as error:
            logger.debug("%s/%s changed meanwhile: %s", *key, error)
            await self._look_at(key)
        except KubeError as error:
            delay = self.queue.add_failed(key)
            logger.warning("%s/%s: %s; trying again in %.1f s", *key, error, delay)
        except Exception:
            # The one place where a bug ends up: it stops this job for a while and no other.
            delay = self.queue.add_failed(key)
            logger.exception("%s/%s: a bug in the operator; trying again in %.1f s", *key, delay)
        else:
            self.queue.succeeded(key)
            if look_again is not None:
                self.queue.add_after(key, look_again)

    async def _look_at(self, key: JobKey) -> None:
        """Read a job whose watch lags behind, rather than try again until it has caught up."""
        try:
            self.cache.observe_job(await self._client.get(JOBS, *key))
        except KubeError as error:
            logger.warning("%s/%s: %s", *key, error)
            self.queue.add_failed(key)
        else:
            self.queue.add_after(key, CONFLICT_SECONDS)

    async def _listen(self, app: web.Application, port: int, ssl_context: Any) -> None:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, "0.0.0.0", port, ssl_context=ssl_context).start()  # noqa: S104  a pod's own address

    def _spawn(self, work: Coroutine[Any, Any, None], name: str, on_fatal: Callable[[], None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                logger.critical("%s ended, which it never should", name, exc_info=task.exception())
                on_fatal()

        task.add_done_callback(ended)
        self._tasks.append(task)


def _now() -> datetime:
    return datetime.now(UTC)
