"""Many jobs, or large ones, on a real API server: the operator as a process, and a kubelet and an agent for each pod.

What the agents' workers do is said here (``fail``, ``succeed``); they train otherwise, and make no progress that status would show. What becomes
of jobs and pods is known from watches of our own, with the time at which they showed it.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from finetune_api.contract import JOB_LABEL
from finetune_api.protocol import AgentState, Heartbeat, Phase, Report
from finetune_operator.jobserver.tls import make_certificates
from finetune_operator.kube.api import JOBS, PODS, SECRETS
from tests.operator.agents import JobServerAccess
from tests.operator.documents import SETTINGS, settings
from tests.operator.kubelets import Kubelets, running
from tests.operator.operator_process import OperatorProcess, free_port
from tests.operator.real_api import Client, Json, RealApi, Refused
from tests.operator.simulation import SimulatedAgent

OPERATOR_POD = "operator-0"
RETRY_SECONDS = 0.2
SEEN_SECONDS = 0.05


class Trainee(SimulatedAgent):
    """An agent whose workers make steps, of which only the heartbeat tells; the last one stays, as a real agent has it."""

    def report(self) -> Report:
        report = super().report()
        if self.state not in (AgentState.RUNNING, AgentState.SUCCEEDED):
            return report
        return replace(report, heartbeat=Heartbeat(Phase.TRAINING, int(time.monotonic() * 10)), progress=None)


class Operator(OperatorProcess):
    """The operator's process, which can be looked at."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid


@dataclass
class Job:
    """What has been seen of one job."""

    nodes: int
    created_at: float = field(default_factory=time.monotonic)
    pods: set[str] = field(default_factory=set)  # all that there ever were
    placed_at: float | None = None  # when the last of its first pods was there
    body: Json = field(default_factory=dict)

    @property
    def status(self) -> Json:
        status: Json = self.body.get("status") or {}
        return status

    @property
    def gang(self) -> Json:
        gang: Json = self.status.get("gang") or {}
        return gang

    @property
    def generation(self) -> int:
        generation: int = self.gang.get("generation", 0)
        return generation


class Fleet:
    """All jobs of a namespace."""

    def __init__(self, client: Client, access: JobServerAccess, operator: Operator, namespace: str) -> None:
        self.client, self.operator, self.namespace = client, operator, namespace
        self.jobs: dict[str, Job] = {}
        self.kubelets = Kubelets(client, access, mind=Trainee, on_pod=self._see_pod)

    async def create(self, body: Json) -> None:
        """Create a job; its time begins before the request is sent."""
        metadata = {name: value for name, value in body["metadata"].items() if name in ("name", "labels")}
        self.jobs[metadata["name"]] = Job(body["spec"]["workers"]["nodes"])
        await self.client.post(JOBS.path(self.namespace), body | {"metadata": metadata})

    async def until(self, what: str, holds: Callable[[], Any], seconds: float = 120.0) -> float:
        """Wait until something holds, and return when that was seen."""
        until = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < until, f"not in time: {what}\n{self.operator.log[-5000:]}"
            await asyncio.sleep(SEEN_SECONDS)
        return time.monotonic()

    def train(self, names: Iterable[str]) -> bool:
        """Tell whether these jobs train: their newest generation on all their ranks, and status says so."""
        return all(self._trains(self.jobs[name]) for name in names)

    def fail(self, names: Iterable[str]) -> None:
        """The worker of the last rank of each of these jobs ends with an error."""
        for name in names:
            agent = self.kubelets.agents[self.jobs[name].gang["members"][-1]["uid"]]
            agent.mind.worker_ends(1, message="RuntimeError: as it was asked to")
            agent.tell()

    def succeed(self) -> None:
        """All workers of all jobs are done."""
        for agent in self.kubelets.agents.values():
            agent.mind.state = AgentState.SUCCEEDED
            agent.tell()

    def has_heard_all(self, since: float) -> bool:
        """Tell whether every agent has been answered since."""
        return all(agent.answered_at > since for agent in self.kubelets.agents.values())

    async def watch(self) -> None:
        """Follow the jobs, until cancelled."""
        path = JOBS.path(self.namespace)
        while True:
            with suppress(aiohttp.ClientError, Refused):
                listed = await self.client.get(path)
                for body in listed["items"]:
                    self._see_job(body)
                async for event in self.client.watch(path, listed["metadata"]["resourceVersion"]):
                    self._see_job(event["object"])
            await asyncio.sleep(RETRY_SECONDS)

    def _trains(self, job: Job) -> bool:
        agents = [self.kubelets.agents.get(member["uid"]) for member in job.gang.get("members", ())]
        return job.status.get("phase") == "Running" and all(
            agent is not None and (agent.mind.started, agent.mind.state) == (job.generation, AgentState.RUNNING)
            for agent in agents
        )

    def _see_job(self, body: Json) -> None:
        job = self.jobs.get(body.get("metadata", {}).get("name", ""))
        if job is not None:
            job.body = body

    def _see_pod(self, kind: str, body: Json) -> None:
        metadata = body["metadata"]
        job = self.jobs.get(metadata["labels"][JOB_LABEL])
        if job is None or kind != "ADDED":
            return
        job.pods.add(metadata["uid"])
        if job.placed_at is None and len(job.pods) == job.nodes:
            job.placed_at = time.monotonic()


@asynccontextmanager
async def a_fleet(
    api: RealApi, client: Client, folder: Path, namespace: str, changes: Mapping[str, Any] | None = None
) -> AsyncIterator[Fleet]:
    """Have the operator stand by, with kubelets, for jobs in a namespace that is made."""
    own = settings()
    pod = {"metadata": {"name": OPERATOR_POD}, "spec": {"containers": [{"name": "operator", "image": "operator"}]}}
    made = await client.post(PODS.path(own.namespace), pod)
    certificates = make_certificates(own.job_server_host, datetime.now(UTC))
    await client.post(SECRETS.path(own.namespace), certificates.as_secret(own.namespace, f"{own.service}-job-server"))
    await client.make_namespace(namespace)
    port = free_port()
    document = (
        yaml.safe_load(SETTINGS)
        | {"jobServerPort": port, "healthPort": free_port(), "metricsPort": free_port()}
        | dict(changes or {})
    )
    operator = Operator(
        folder, OPERATOR_POD, uid=made["metadata"]["uid"], kubeconfig=api.kubeconfig(), settings=document
    )
    context = ssl.create_default_context(cadata=certificates.authority)
    fleet = Fleet(client, JobServerAccess(lambda: port, own.job_server_host, context), operator, namespace)
    async with running(fleet.kubelets):
        tasks = [asyncio.create_task(fleet.watch()), asyncio.create_task(operator.keep_running())]
        try:
            await fleet.until("the operator leads", lambda: "leading: serving agents" in operator.log)
            yield fleet
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
