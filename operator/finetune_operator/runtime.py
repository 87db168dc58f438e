"""The whole state of an operator process: built in one place at start, freed in one place at the end.

Every replica watches, and is ready when it has seen all jobs and pods. Only the leader works, writes and talks to agents (see leader.py).
What takes over lists them once more, and has heard no agent yet.
"""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Self, TypeVar

from aiohttp import web

from finetune_api.contract import MANAGED_BY_LABEL, MANAGER
from finetune_operator.access import check_access
from finetune_operator.cache import Cache, JobKey
from finetune_operator.jobserver.app import JobServer
from finetune_operator.jobserver.auth import TokenVerifier
from finetune_operator.jobserver.certificate_store import load_certificates, server_context, show
from finetune_operator.jobserver.connections import cut_buffers, give_memory_back
from finetune_operator.jobserver.flood import STRANGER_SECONDS
from finetune_operator.jobserver.reports import Reports
from finetune_operator.jobserver.tls import Certificates
from finetune_operator.kube.api import JOBS, PODS
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.errors import Conflict, Forbidden, KubeError, TooMany, Unavailable
from finetune_operator.leader import Campaign, Lease, OwnPod, identity_of, own_pod
from finetune_operator.leader_label import show_leader
from finetune_operator.observability.event_loop import measure_lag
from finetune_operator.observability.health import Health
from finetune_operator.observability.history import History
from finetune_operator.observability.logs import about
from finetune_operator.observability.metrics import Metrics, Outcome
from finetune_operator.observability.vitals import Vitals
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

POD_SELECTOR = f"{MANAGED_BY_LABEL}={MANAGER}"
RESYNC_SECONDS = 300.0
RELIST_SECONDS = 1.0  # from when a watch has begun, for its own list
CONFLICT_SECONDS = 0.05
START_RETRY_SECONDS = 2.0
CERTIFICATE_SECONDS = 3600.0
LABEL_SECONDS = 30.0
MEMORY_SECONDS = 15.0  # takes 15 ms for 300 MiB
LABEL_RETRY_SECONDS = 1.0
GOODBYE_SECONDS = 1.0  # for requests that are being answered when the process stops

T = TypeVar("T")


class Runtime:
    """One operator process. ``start`` it, feed it with what the watches see, ``stop`` it."""

    def __init__(
        self, settings: Settings, client: KubeClient, lease: Lease, certificates: Certificates, metrics: Metrics
    ) -> None:
        self._settings, self._client, self._lease, self._metrics = settings, client, lease, metrics
        self.cache = Cache()
        self.queue: WorkQueue[JobKey] = WorkQueue(on_wait=metrics.queue_seconds.observe)
        self._leads = self._stopping = False
        self._certificates, self._tls = certificates, server_context(certificates)
        self._reports = Reports(_now)
        self._job_server = JobServer(
            cache=self.cache,
            reports=self._reports,
            verifier=TokenVerifier(client),
            leads=lease.has_time,
            on_news=self.queue.add,
        )
        self._reconciler = Reconciler(
            api=client,
            cache=self.cache,
            reports=self._reports,
            settings=settings,
            ca_certificates=certificates.authority,
            on_status=self._job_server.job_changed,
            history=History(metrics),
            clock=_now,
        )
        self.vitals = Vitals(
            cache=self.cache,
            queue=self.queue,
            reports=self._reports,
            lease=lease,
            metrics=metrics,
            silent_seconds=settings.silent_seconds,
            clock=_now,
        )
        self._campaign: Campaign | None = None
        self._pod = own_pod()
        self._relisted = asyncio.Event()
        self._stocktaking = asyncio.Lock()
        self._runners: list[web.AppRunner] = []
        self._agents_door: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, settings: Settings, *, on_fatal: Callable[[], None], on_lost: Callable[[], None]) -> Self:
        """Connect, take stock, and stand by to lead.

        ``on_fatal`` is called when a part of the process has died. ``on_lost`` is called, from any thread, when the process has led and
        does no more: it must end the process at once.
        """
        cut_buffers()
        health, metrics = Health(), Metrics()
        health_runner = await _listen(health.app(), settings.health_port, None)
        metrics_runner = await _listen(metrics.app(), settings.metrics_port, None)
        settings, certificates = await _patiently(lambda: _prepare(settings, metrics))
        lease = Lease()
        client = await KubeClient.connect(may_write=lease.has_time, on_answer=metrics.api.record)
        runtime = cls(settings, client, lease, certificates, metrics)
        health.trouble, health.unready = runtime.vitals.trouble, runtime._why_not_ready
        runtime._runners += [health_runner, metrics_runner]
        runtime._spawn(measure_lag(metrics.event_loop_lag.observe), "event loop lag", on_fatal)
        await _patiently(runtime._take_stock)
        app = runtime._job_server.app(metrics.counting_requests())
        runtime._agents_door = await _listen(app, settings.job_server_port, runtime._tls)
        runtime._runners.append(runtime._agents_door)
        runtime._spawn(runtime._resync(), "resync", on_fatal)
        runtime._spawn(runtime._keep_certificates(), "certificates", on_fatal)
        runtime._spawn(runtime._keep_small(), "memory", on_fatal)
        runtime._spawn(runtime._close_strangers(runtime._agents_door), "strangers", on_fatal)
        runtime._stand_for_election(on_fatal, on_lost)
        logger.info("standing by")
        return runtime

    def _stand_for_election(self, on_fatal: Callable[[], None], on_lost: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()

        def take_over() -> None:
            loop.call_soon_threadsafe(self._take_over, on_fatal, on_lost)

        self._campaign = Campaign(
            connect=lambda: KubeClient.connect(
                may_write=lambda: True,  # the lease's own writes are what decides
                on_answer=self._metrics.api.record,
            ),
            lease=self._lease,
            namespace=self._settings.namespace,
            name=self._settings.service,
            identity=identity_of(self._pod),
            times=self._settings.leader_election,
            on_leading=take_over,
            on_lost=on_lost,
        )
        self._campaign.start()

    def _take_over(self, on_fatal: Callable[[], None], on_lost: Callable[[], None]) -> None:
        """Lead from now on."""
        if self._stopping:
            return
        self._leads = True
        self._reports.start_listening()
        self._spawn(self._watch_lease(on_lost), "lease", on_fatal)
        if self._pod is not None:
            self._spawn(self._keep_label(self._pod), "label", on_fatal)
        self._spawn(self._lead(), "work", on_fatal)
        logger.info("leading: serving agents on port %d", self._settings.job_server_port)

    async def _lead(self) -> None:
        """Look at every job, and go on working.

        Lists first: a watch that hangs is noticed after a while, and a pod that the leader before made meanwhile would be taken for deleted.
        """
        await _patiently(self._take_stock)
        await asyncio.gather(*(self._work() for _ in range(self._settings.workers)))

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Which namespaces are served; none stands for all."""
        return self._settings.watch_namespaces

    async def stop(self) -> None:
        """End all tasks, give the lease back, and close all connections."""
        self._stopping = True
        self.queue.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._campaign is not None:
            await asyncio.to_thread(self._campaign.stop)
        self._job_server.dismiss_all()
        for runner in self._runners:
            await runner.cleanup()
        await self._client.close()

    def observe_job(self, body: Mapping[str, Any], *, deleted: bool) -> None:
        """Take in what the watch of jobs has seen."""
        key = self.cache.observe_job(body, deleted=deleted, by_watch=True)
        if deleted:
            self._reconciler.forget(body["metadata"]["uid"])
        self._job_server.job_changed(key)
        self._add(key)

    def observe_pod(self, body: Mapping[str, Any], *, deleted: bool) -> None:
        """Take in what the watch of pods has seen."""
        key = self.cache.observe_pod(body, deleted=deleted, by_watch=True)
        if key is not None:
            self._add(key)

    def watch_has_begun(self) -> None:
        """Take in that a watch begins, anew perhaps, with a list: what went before that is in no list, and no watch shows it."""
        self._relisted.set()

    def _add(self, key: JobKey) -> None:
        """Queue a job. Who stands by queues nothing: nobody would take it out, and taking over begins with every job."""
        if self._leads:
            self.queue.add(key)

    async def _take_stock(self) -> None:
        """Replace what the cache knows by full lists, and look at every job."""
        async with self._stocktaking:  # a sweep that another one begins in would forget what it has seen before that
            self.cache.begin_sweep()
            closed = [one for one in self.namespaces or (None,) if not await self._list(one)]
            for key in self.cache.end_sweep(spared=closed):
                self._add(key)
        self._reconciler.keep_only(self.cache.job_uids())
        # The last word of a member that is gone tells why, for as long as nobody has drawn the conclusion.
        self._reports.keep_only(self.cache.pod_uids() | self.cache.member_uids())

    async def _list(self, namespace: str | None) -> bool:
        """Take in all that is in a namespace, or in all; False if there is one to which the operator has no right any more."""
        try:
            jobs = await self._client.list(JOBS, namespace)
            pods = await self._client.list(PODS, namespace, label_selector=POD_SELECTOR)
        except Forbidden as error:
            if namespace is None:
                raise
            logger.error("what is in namespace %s is not known any more: %s", namespace, error)  # noqa: TRY400  no traceback needed
            return False
        for job in jobs:
            self._add(self.cache.observe_job(job))
        for pod in pods:
            self.cache.observe_pod(pod)
        return True

    async def _resync(self) -> None:
        """Take stock now and then, and soon after a watch has begun."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._relisted.wait(), RESYNC_SECONDS)
                await asyncio.sleep(RELIST_SECONDS)
            self._relisted.clear()
            try:
                await self._take_stock()
            except KubeError as error:
                self._relisted.set()
                logger.warning("cannot list all jobs and pods now: %s", error)

    async def _watch_lease(self, on_lost: Callable[[], None]) -> None:
        """The lease's own thread sees its end too, unless it hangs."""
        while (left := self._lease.seconds_left()) > 0:  # noqa: ASYNC110  time passing is no event
            await asyncio.sleep(left)
        logger.critical("the lease has no time left; this process ends")
        on_lost()

    async def _keep_label(self, pod: OwnPod) -> None:
        while True:
            try:
                await show_leader(self._client, self._settings.namespace, pod)
            except KubeError as error:
                logger.warning("agents may not find this leader: %s", error)
                await asyncio.sleep(LABEL_RETRY_SECONDS)
            else:
                await asyncio.sleep(LABEL_SECONDS)

    async def _keep_certificates(self) -> None:
        """Show what is in the Secret; the leader renews it in time."""
        while True:
            await asyncio.sleep(CERTIFICATE_SECONDS)
            try:
                self._certificates = await load_certificates(
                    self._client, self._settings, _now(), known=self._certificates, may_write=self._lease.has_time()
                )
            except KubeError as error:
                logger.warning("cannot read the job server's certificates now: %s", error)
            else:
                show(self._tls, self._certificates)

    async def _keep_small(self) -> None:
        while True:
            await asyncio.sleep(MEMORY_SECONDS)
            give_memory_back()

    async def _close_strangers(self, door: web.AppRunner) -> None:
        while door.server is not None:
            await asyncio.sleep(STRANGER_SECONDS / 4)
            self._job_server.strangers.close(door.server.connections)

    async def _work(self) -> None:
        while True:
            key = await self.queue.take()
            try:
                with about(**self._known_of(key)), self._metrics.reconcile_seconds.time():
                    outcome = await self._reconcile(key)
                self._metrics.reconciles.labels(outcome).inc()
            finally:
                self.queue.done(key)

    async def _reconcile(self, key: JobKey) -> Outcome:
        try:
            look_again = await self._reconciler.reconcile(key)
        except Conflict as error:
            logger.debug("%s/%s changed meanwhile: %s", *key, error)
            await self._look_at(key)
            return "conflict"
        except KubeError as error:
            delay = self._put_off(key, error)
            logger.warning("%s/%s: %s; trying again in %.1f s", *key, error, delay)
            return "error"
        except Exception:
            # The one place where a bug ends up: it stops this job for a while and no other.
            delay = self.queue.add_failed(key)
            logger.exception("%s/%s: a bug in the operator; trying again in %.1f s", *key, delay)
            return "bug"
        self.queue.succeeded(key)
        if look_again is not None:
            self.queue.add_after(key, look_again)
        return "done"

    def _put_off(self, key: JobKey, error: KubeError) -> float:
        """Hand a job out again when the API server says, or else later and later; return in how many seconds."""
        if not error.retry_after:
            return self.queue.add_failed(key)
        self.queue.add_after(key, error.retry_after)
        return error.retry_after

    async def _look_at(self, key: JobKey) -> None:
        """Read a job whose watch lags behind, rather than try again until it has caught up."""
        try:
            self.cache.observe_job(await self._client.get(JOBS, *key))
        except KubeError as error:
            logger.warning("%s/%s: %s", *key, error)
            self.queue.add_failed(key)
        else:
            self.queue.add_after(key, CONFLICT_SECONDS)

    def _known_of(self, key: JobKey) -> dict[str, Any]:
        """Return what log lines about a job carry."""
        namespace, name = key
        job = self.cache.job(key) or {}
        uid = job.get("metadata", {}).get("uid")
        generation = job.get("status", {}).get("gang", {}).get("generation")
        return {"namespace": namespace, "job": name, "uid": uid, "generation": generation}

    def _why_not_ready(self) -> str:
        if self._stopping:
            return "stopping"
        if not self.cache.is_synced:
            return "not all jobs and pods are listed yet"
        return "" if self._agents_door and self._agents_door.addresses else "the job server does not listen"

    def _spawn(self, work: Coroutine[Any, Any, None], name: str, on_fatal: Callable[[], None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                logger.critical("%s ended, which it never should", name, exc_info=task.exception())
                on_fatal()

        task.add_done_callback(ended)
        self._tasks.append(task)


async def _prepare(settings: Settings, metrics: Metrics) -> tuple[Settings, Certificates]:
    """Do what any replica may do: ask for its rights, and make the certificates if there are none (see load_certificates).

    The settings returned name the namespaces that are there to be served.
    """
    client = await KubeClient.connect(may_write=lambda: True, on_answer=metrics.api.record)
    try:
        served = settings.model_copy(update={"watch_namespaces": await check_access(client, settings)})
        return served, await load_certificates(client, served, _now())
    finally:
        await client.close()


async def _patiently(do: Callable[[], Awaitable[T]]) -> T:
    """Wait for an API server that is away: a process that ends instead is started again later and later."""
    while True:
        try:
            return await do()
        except (TooMany, Unavailable) as error:
            logger.warning("cannot start yet: %s", error)
            await asyncio.sleep(START_RETRY_SECONDS)


async def _listen(app: web.Application, port: int, ssl_context: ssl.SSLContext | None) -> web.AppRunner:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=GOODBYE_SECONDS)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", port, ssl_context=ssl_context).start()  # noqa: S104  a pod's own address
    return runner


def _now() -> datetime:
    return datetime.now(UTC)
