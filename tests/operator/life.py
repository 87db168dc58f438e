"""One job's life on a real API server, from its creation to its clean-up, with a pod lost on the way.

The operator is a real process, agents talk to its job server as real ones do, and a watch that the operator does not know of sees every version
of the job and of its pods. What must hold at any time is checked with each of them; what is found wrong is kept for ``check``.
"""

import asyncio
import itertools
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from finetune_api.contract import GENERATION_LABEL, RANK_LABEL
from finetune_api.protocol import AgentState, Heartbeat, Order, Phase, Progress, Report
from finetune_operator.jobserver.tls import make_certificates
from finetune_operator.kube.api import JOBS, PODS, SECRETS
from finetune_operator.settings import Settings
from tests.operator.agents import JobServerAccess
from tests.operator.api_proxy import ApiProxy
from tests.operator.documents import SETTINGS, job_body
from tests.operator.kubelets import Kubelets, running
from tests.operator.operator_process import OperatorProcess, free_port
from tests.operator.real_api import OPERATOR, Client, Json, RealApi
from tests.operator.simulation import SimulatedAgent

NAME, NODES = "sentiment", 2
OPERATOR_POD = "operator-0"
LEASE = {"leaseSeconds": 15, "renewSeconds": 12, "retrySeconds": 0.5}
STEPS_PER_SECOND = 4
PATIENCE_SECONDS = 200.0
_numbers = itertools.count(1)

OUTCOME = {
    "phase": "Succeeded",
    "generation": 2,
    "true": ["Complete", "Ready"],
    "attempts": [(1, "PodDeleted")],
    "restarts": 1,
    "pods": ["rank 0 of 1", "rank 1 of 1", "rank 1 of 2"],
}
"""What is to be seen when all is over, whatever went wrong with operator and API server meanwhile."""


class Trainee(SimulatedAgent):
    """An agent whose workers make steps, and whose starts are noted."""

    on_start: Callable[["Trainee"], None]
    started_at = 0.0

    def obey(self, order: Order) -> bool:
        is_start = super().obey(order)
        if is_start:
            self.started_at = time.monotonic()
            self.on_start(self)
        return is_start

    @property
    def steps(self) -> int:
        return int((time.monotonic() - self.started_at) * STEPS_PER_SECOND)

    def report(self) -> Report:
        report = super().report()
        if report.heartbeat is None:
            return report
        progress = Progress(self.steps) if self.rank == 0 else None
        return replace(report, heartbeat=Heartbeat(Phase.TRAINING, self.steps), progress=progress)


class Life:
    """A job, its pods and agents, and the operator behind its proxy."""

    def __init__(self, client: Client, proxy: ApiProxy, operator: OperatorProcess, namespace: str) -> None:
        self.client, self.proxy, self.operator, self.namespace = client, proxy, operator, namespace
        self.versions: list[Json] = []  # of the job
        self.pods: dict[str, Json] = {}
        self.kubelets: Kubelets
        self.watching: asyncio.Task[None]
        self._places: dict[str, str] = {}  # of all pods that there ever were, by uid
        self._rank_maps: defaultdict[int, set[tuple[Any, ...]]] = defaultdict(set)
        self._starts: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)
        self._wrong: list[str] = []

    async def play(self) -> None:
        """Live, from the job's creation on."""
        await self.train()
        await self.lose(rank=1)
        await self.until("the gang trains again", lambda: self.trains(after=1))
        await self.succeed()

    async def train(self) -> None:
        body = job_body("{podTTLSecondsAfterFinished: 1}", nodes=NODES)
        body["metadata"] = {"name": NAME, "namespace": self.namespace}
        await self.client.post(JOBS.path(self.namespace), body)
        await self.until("the gang trains", lambda: self.trains(after=0))

    async def lose(self, *, rank: int) -> None:
        """A pod and its agent are gone at once, as when its node is removed."""
        member = next(member for member in self.gang["members"] if member["rank"] == rank)
        await self.client.delete(PODS.path(self.namespace, member["pod"]), grace_seconds=0)

    async def succeed(self) -> None:
        for member in self.gang["members"]:
            agent = self.kubelets.agents[member["uid"]]
            agent.mind.state = AgentState.SUCCEEDED
            agent.tell()
        await self.until("the job is complete", lambda: "Complete" in self.conditions)
        await self.until("its pods are gone", lambda: not self.pods)

    async def until(self, what: str, holds: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> None:
        until = time.monotonic() + seconds
        while not holds():
            assert not self.watching.done(), self.watching
            assert time.monotonic() < until, f"not in time: {what}; {self.status}\n{self.operator.log[-5000:]}"
            await asyncio.sleep(0.02)

    # What can be read.

    @property
    def status(self) -> Json:
        return self.versions[-1].get("status", {}) if self.versions else {}

    @property
    def gang(self) -> Json:
        gang: Json = self.status.get("gang", {})
        return gang

    @property
    def conditions(self) -> list[str]:
        return sorted(one["type"] for one in self.status.get("conditions", ()) if one["status"] == "True")

    @property
    def step(self) -> int:
        """How far training is, as status has it."""
        step: int = self.status.get("progress", {}).get("step", 0)
        return step

    @property
    def newest_step(self) -> int:
        """How far training is."""
        return self._mind_of(self.gang["members"][0]).steps

    def trains(self, *, after: int) -> bool:
        """Tell whether a generation after that runs on all its members, and status says so."""
        there = [member for member in self.gang.get("members", ()) if member["uid"] in self.kubelets.agents]
        minds = [self._mind_of(member) for member in there]
        generation = self.gang.get("generation", 0)
        run = [mind for mind in minds if (mind.started, mind.state) == (generation, AgentState.RUNNING)]
        return generation > after and len(run) == NODES and self.status["phase"] == "Running"

    @property
    def outcome(self) -> Json:
        attempts = [(one["generation"], one["reason"]) for one in self.status.get("attempts", ())]
        return {
            "phase": self.status.get("phase"),
            "generation": self.gang.get("generation"),
            "true": self.conditions,
            "attempts": attempts,
            "restarts": self.status.get("restarts", {}).get("total"),
            "pods": sorted(self._places.values()),
        }

    def check(self) -> None:
        """Nothing was wrong at any time, and the end is as it should be."""
        assert self._wrong == []
        assert self.outcome == OUTCOME, self.operator.log[-5000:]
        for generation, starts in self._starts.items():
            ((members, *_),) = self._rank_maps[generation]
            assert sorted(starts) == list(members), f"who started generation {generation}, and who should have"

    def _mind_of(self, member: Json) -> Trainee:
        mind = self.kubelets.agents[member["uid"]].mind
        assert isinstance(mind, Trainee)
        return mind

    # What is seen.

    def note_start(self, mind: Trainee) -> None:
        self._starts[mind.started].append((mind.rank, mind.uid))
        running = [agent.mind.started for agent in self.kubelets.agents.values()]
        complete = {generation for generation in running if running.count(generation) == NODES}
        self._require(len(complete) <= 1, f"generations {complete} are alive at one time")

    def note_pod(self, kind: str, body: Json) -> None:
        metadata = body["metadata"]
        labels, uid = metadata["labels"], metadata["uid"]
        self._places[uid] = f"rank {labels[RANK_LABEL]} of {labels[GENERATION_LABEL]}"
        self.pods[uid] = body
        if kind == "DELETED":
            del self.pods[uid]
        there = [
            pod["metadata"]["labels"][RANK_LABEL]
            for pod in self.pods.values()
            if "deletionTimestamp" not in pod["metadata"]
        ]
        self._require(len(there) == len(set(there)), f"two pods of one rank: {there}")

    async def watch(self) -> None:
        """Take in every version of the job."""
        path = JOBS.path(self.namespace)
        since = (await self.client.get(path))["metadata"]["resourceVersion"]
        async for event in self.client.watch(path, since):
            self._note_version(event["object"])

    def _note_version(self, body: Json) -> None:
        before = self.gang.get("generation", 0)
        self.versions.append(body)
        generation, members = self.gang.get("generation", 0), self.gang.get("members")
        self._require(generation >= before, f"generation {generation} after {before}")
        if members:
            ranks = tuple((member["rank"], member["uid"]) for member in members)
            self._rank_maps[generation].add((ranks, self.gang["masterAddress"], self.gang["masterPort"]))
        self._require(len(self._rank_maps[generation]) <= 1, f"two rank maps of generation {generation}")
        told = [(one["generation"], one["reason"]) for one in self.status.get("attempts", ())]
        self._require(len(told) == len(set(told)), f"an attempt is told twice: {told}")

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            self._wrong.append(what)


class OwnKubelets(Kubelets):
    """Those of one namespace alone."""

    namespace: str

    def _see(self, kind: str, body: Json) -> None:
        if body["metadata"]["namespace"] == self.namespace:
            super()._see(kind, body)


@asynccontextmanager
async def a_life(api: RealApi, folder: Path, changes: Mapping[str, Any] | None = None) -> AsyncIterator[Life]:
    """Have everything ready for a job: proxy, operator, kubelets, watch. Several lives may be had on one API server at a time."""
    namespace, port = f"life-{next(_numbers)}", free_port()
    home = f"{namespace}-home"
    own = {
        "namespace": home,
        "watchNamespaces": [namespace],
        "jobServerPort": port,
        "healthPort": free_port(),
        "metricsPort": free_port(),
    }
    document = yaml.safe_load(SETTINGS) | own | {"leaderElection": LEASE} | dict(changes or {})
    async with api.client() as client, ApiProxy(api.url, api.context) as proxy:
        await client.make_namespace(namespace)
        await client.make_namespace(home)
        uid, access = await _make_home(client, Settings.model_validate(document))
        kubeconfig = api.kubeconfig(OPERATOR, proxy.url).rename(folder / "own-kubeconfig")
        operator = OperatorProcess(folder, OPERATOR_POD, uid=uid, kubeconfig=kubeconfig, settings=document)
        life = Life(client, proxy, operator, namespace)

        def mind(pod_uid: str, address: str) -> Trainee:
            trainee = Trainee(pod_uid, address)
            trainee.on_start = life.note_start
            return trainee

        life.kubelets = kubelets = OwnKubelets(client, access, mind=mind, on_pod=life.note_pod)
        kubelets.namespace = namespace
        async with running(kubelets):
            life.watching = asyncio.create_task(life.watch())
            tasks = [life.watching, asyncio.create_task(operator.keep_running())]
            try:
                yield life
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


async def _make_home(client: Client, own: Settings) -> tuple[str, JobServerAccess]:
    """Make the operator's pod, and the certificates that agents are to trust; return the pod's uid and how agents come in."""
    pod = {"metadata": {"name": OPERATOR_POD}, "spec": {"containers": [{"name": "operator", "image": "operator"}]}}
    made = await client.post(PODS.path(own.namespace), pod)
    certificates = make_certificates(own.job_server_host, datetime.now(UTC))
    secret = certificates.as_secret(own.namespace, f"{own.service}-job-server")
    await client.post(SECRETS.path(own.namespace), secret)
    context = ssl.create_default_context(cadata=certificates.authority)
    return made["metadata"]["uid"], JobServerAccess(lambda: own.job_server_port, own.job_server_host, context)
