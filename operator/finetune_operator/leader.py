"""Which replica leads: the one that holds a Lease, and only while it knows that nobody else can hold it.

A candidate looks at the Lease object every ``retry_seconds``. It takes a lease that nobody holds, or one that has not changed for as long as
its holder said that it lasts. Clocks of two machines are never compared: "has not changed" is measured from when this process saw the
newest version, by its own clock, and the times in the object are for people. Whoever holds the lease writes it anew every
``retry_seconds``, and counts on it for ``renew_seconds`` from when it *asked* for the newest write that was acknowledged. ``renew_seconds`` is
less than ``lease_seconds``, and the others begin to count later than the holder, so no two processes count on the lease at one time as
long as no clock runs half as fast again as another. Every write of the object is conditional on the version that was seen, so one that
arrives late changes nothing.

``Lease.has_time`` is asked right before each write and each answer to an agent (kube/client.py, jobserver/app.py), and is a comparison
with the clock: it turns false by itself, whatever hangs. The lease is kept by a thread with a connection and an event loop of its own, so
that work in the main loop does not delay it. A process that has led and does no more ends with exit code 1 and starts anew.

A container that starts again in its pod is the same holder: what led there before is dead, so it need not be waited for.
"""

import asyncio
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from finetune_operator.kube.api import LEASES, KubeApi
from finetune_operator.kube.errors import KubeError, NotFound
from finetune_operator.kube_object import KubeObject
from finetune_operator.settings import LeaderElection

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0  # for giving the lease back

Clock = Callable[[], float]


def seconds_since_boot() -> float:
    """Return a clock that nobody sets, and that goes on while the machine is suspended, which Python's monotonic one does not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class OwnPod:
    """The pod that this process runs in."""

    name: str
    uid: str


def own_pod() -> OwnPod | None:
    """Return the pod that this process runs in, or None outside of a cluster."""
    name, uid = os.environ.get("POD_NAME"), os.environ.get("POD_UID")
    return OwnPod(name, uid) if name and uid else None


def identity_of(pod: OwnPod | None) -> str:
    """Return who a process in this pod is to other candidates."""
    return f"{pod.name}_{pod.uid}" if pod else f"{socket.gethostname()}_{uuid.uuid4()}"


class Lease:
    """For how long this process leads, as far as it knows. Written by one thread, read by all."""

    def __init__(self, clock: Clock = seconds_since_boot) -> None:
        self.clock = clock
        self._until = -math.inf
        self._closed = False

    def has_time(self) -> bool:
        """Tell whether what is done now is done by the leader."""
        return self.seconds_left() > 0

    def seconds_left(self) -> float:
        """Return for how long this process leads if nothing more is heard; not positive if it does not lead."""
        return -math.inf if self._closed else self._until - self.clock()

    def prolong(self, until: float) -> None:
        """Lead until then."""
        self._until = until

    def end(self) -> None:
        """Lead no more: another process holds the lease."""
        self._until = -math.inf

    def close(self) -> None:
        """Lead no more, whatever is heard from now on."""
        self._closed = True


class Candidate:
    """One process that would lead, and the Lease object that says whether it does."""

    def __init__(
        self,
        *,
        api: KubeApi,
        lease: Lease,
        namespace: str,
        name: str,
        identity: str,
        times: LeaderElection,
    ) -> None:
        self._api, self._lease, self._times, self._clock = api, lease, times, lease.clock
        self._namespace, self._name, self._identity = namespace, name, identity
        self._held: KubeObject | None = None  # as the API server acknowledged it
        self._seen_version = ""
        self._seen_at = -math.inf

    async def try_once(self) -> None:
        """Take the lease if it is free, renew it if it is ours.

        Raises:
            KubeError: it may have been done or not; the next call looks first.
        """
        asked_at = self._clock()
        found, self._held = self._held, None  # a write that is not acknowledged may have been done
        if found is None:
            found = await self._look()
        if not self._may_take(found):
            self._lease.end()
            return
        self._held = await self._write(found)
        self._lease.prolong(asked_at + self._times.renew_seconds)

    async def release(self) -> None:
        """Give the lease back, so that the next leader need not wait for its end. Nothing may be done as leader any more.

        Raises:
            KubeError: it was not given back; it ends by itself.
        """
        held, self._held = self._held, None
        if held is not None:
            spec = {name: value for name, value in held["spec"].items() if name != "holderIdentity"}
            await self._api.replace(LEASES, self._namespace, held | {"spec": spec})

    async def _look(self) -> KubeObject | None:
        try:
            found = await self._api.get(LEASES, self._namespace, self._name)
        except NotFound:
            return None
        version = found["metadata"]["resourceVersion"]
        if version != self._seen_version:
            # Not when it was asked for: it may be newer than that.
            self._seen_version, self._seen_at = version, self._clock()
        return found

    def _may_take(self, found: KubeObject | None) -> bool:
        if found is None:  # never made, or deleted under its holder, who will make it again
            return self._clock() - self._seen_at >= self._times.lease_seconds
        spec = found.get("spec") or {}
        if spec.get("holderIdentity") in (None, "", self._identity):
            return True
        # What the holder promised, not what we would: it may have other settings.
        lasts = spec.get("leaseDurationSeconds") or self._times.lease_seconds
        return self._clock() - self._seen_at >= lasts

    async def _write(self, found: KubeObject | None) -> KubeObject:
        old = (found or {}).get("spec") or {}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        is_new = old.get("holderIdentity") != self._identity
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._times.lease_seconds,
            "acquireTime": now if is_new else old.get("acquireTime", now),
            "renewTime": now,
            "leaseTransitions": old.get("leaseTransitions", 0) + is_new,
        }
        if found is not None:
            return await self._api.replace(LEASES, self._namespace, found | {"spec": spec})
        metadata = {"name": self._name, "namespace": self._namespace}
        body = {"apiVersion": LEASES.group_version, "kind": LEASES.kind, "metadata": metadata, "spec": spec}
        return await self._api.create(LEASES, self._namespace, body)


class ClosableApi(KubeApi, Protocol):
    """A connection to the API server that can be closed."""

    async def close(self) -> None:
        """Close it."""


class Campaign:
    """The thread that takes the lease and keeps it.

    ``on_leading`` is called once, ``on_lost`` at most once after that, both in the thread.
    """

    def __init__(
        self,
        *,
        connect: Callable[[], Awaitable[ClosableApi]],
        lease: Lease,
        namespace: str,
        name: str,
        identity: str,
        times: LeaderElection,
        on_leading: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._connect, self._lease, self._times = connect, lease, times
        self._namespace, self._name, self._identity = namespace, name, identity
        self._on_leading, self._on_lost = on_leading, on_lost
        self._leads = self._stopping = False
        self._told = ""
        self._stop = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._be_the_thread, name="lease", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Lead no more and give the lease back; blocks for a moment."""
        self._stopping = True
        self._lease.close()
        with suppress(RuntimeError):  # the thread has ended, and its loop with it
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_SECONDS)

    def _be_the_thread(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._run())
        except BaseException:
            logger.critical("the thread that keeps the lease has died; so does this process", exc_info=True)
            self._on_lost()

    async def _run(self) -> None:
        api = await self._connect()
        candidate = Candidate(
            api=api,
            lease=self._lease,
            namespace=self._namespace,
            name=self._name,
            identity=self._identity,
            times=self._times,
        )
        while not self._stop.is_set():
            await self._try(candidate)
            if self._leads and not self._lease.has_time() and not self._stopping:
                logger.critical("the lease is lost; this process ends")
                self._on_lost()
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), self._seconds_until_next_try())
        with suppress(KubeError, TimeoutError):
            async with asyncio.timeout(STOP_SECONDS / 2):
                await candidate.release()
        await api.close()

    async def _try(self, candidate: Candidate) -> None:
        """One try, which is given up in time for another before the lease has no time left."""
        left = self._lease.seconds_left()
        seconds = self._times.renew_seconds / 3
        try:
            async with asyncio.timeout(min(seconds, left) if left > 0 else seconds):
                await candidate.try_once()
        except (KubeError, TimeoutError) as error:
            self._tell(
                f"the lease cannot be {'renewed' if self._leads else 'looked at'}: {str(error) or 'no answer in time'}"
            )
            return
        self._told = ""
        if self._lease.has_time() and not self._leads:
            self._leads = True
            logger.info("leading, as %s", self._identity)
            self._on_leading()

    def _seconds_until_next_try(self) -> float:
        """Return how long to wait: no longer than the lease has time, so that its end is noticed when it comes."""
        left = self._lease.seconds_left()
        return min(self._times.retry_seconds, left) if left > 0 else self._times.retry_seconds

    def _tell(self, what: str) -> None:
        if what != self._told:
            logger.warning("%s", what)
            self._told = what
