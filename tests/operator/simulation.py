"""A cluster small enough to be reasoned about: an API server in memory, kubelets, agents that obey orders, and one operator process.

Nothing moves by itself: a test decides who acts next, so every order of events can be played. The operator is the real ``Reconciler`` with
its real cache and reports; its watches show it the API server's events only when they are told to.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from finetune_api.contract import SHAPE_ANNOTATION, ExitCode
from finetune_api.job import parse_job
from finetune_api.protocol import (
    Action,
    AgentState,
    Checkpoint,
    Doing,
    Exit,
    Heartbeat,
    Order,
    Phase,
    Progress,
    Report,
    Resumed,
    ResumeSource,
    Saves,
    Stalled,
)
from finetune_api.status import ConditionType
from finetune_operator.cache import Cache, JobKey
from finetune_operator.jobserver.reports import Reports
from finetune_operator.kube.api import JOBS, PODS
from finetune_operator.kube_object import KubeObject
from finetune_operator.observability.history import History
from finetune_operator.observability.metrics import Metrics
from finetune_operator.plan.observation import instant, timestamp
from finetune_operator.plan.orders import orders_for
from finetune_operator.reconcile import Reconciler
from tests.operator import kstatus
from tests.operator.documents import NOON, job_body, settings
from tests.operator.fake_api import FakeKubeApi

KEY = JobKey(("team-a", "sentiment"))


@dataclass
class SimulatedAgent:
    """What finetune_agent does, without processes: starts a generation at most once, and obeys no lower one."""

    uid: str
    address: str
    instance: int = 1
    started: int = 0
    obeyed: int = 0
    state: AgentState = AgentState.IDLE
    exits: list[Exit] = field(default_factory=list)
    finished: bool = False
    leaving: bool = False
    cut: bool = False  # its node cannot be reached: it runs on, and nobody hears of it
    mute: bool = False  # it is cut off alone: its node is well, and its kubelet ends it when it is told to
    rank: int = 0
    checkpoint: Checkpoint | None = None
    saves_now: Saves | None = None
    resumed: Resumed | None = None
    stalled: Stalled | None = None

    def report(self) -> Report:
        running = self.state == AgentState.RUNNING
        return Report(
            pod_uid=self.uid,
            instance=f"{self.uid}-{self.instance}",
            agent_version="0",
            generation=self.started,
            state=self.state,
            address=self.address,
            port=29500 + self.instance,
            heartbeat=Heartbeat(Phase.TRAINING, self.started) if running else None,
            progress=Progress(step=self.started) if running and self.rank == 0 else None,
            checkpoint=self.checkpoint,
            saves=self.saves_now,
            resumed=self.resumed,
            exits=list(self.exits),
            leaving=self.leaving,
            stalled=self.stalled if running else None,
        )

    def obey(self, order: Order) -> bool:
        """Take an order, and tell whether a generation is started by it. After SIGTERM nothing starts."""
        if order.action == Action.FINISH:
            self.finished = True
            return False
        if order.generation < self.obeyed:
            return False
        self.obeyed = order.generation
        if order.action == Action.STOP and order.generation == self.started and self.state == AgentState.RUNNING:
            self.state, self.exits = AgentState.STOPPED, [Exit(self.started, self.rank, ExitCode.SAVED)]
        if order.generation > self.started and self.state == AgentState.RUNNING:
            self.state = AgentState.STOPPED
        if order.action == Action.RUN and order.generation > self.started and not self.leaving:
            self.started, self.rank, self.state, self.exits = order.generation, order.rank, AgentState.RUNNING, []
            self.saves_now = self.stalled = None
            self.resumed = Resumed(self.started - 1, ResumeSource.STORAGE) if self.rank == 0 else None
            return True
        return False

    def worker_ends(self, exit_code: int | None, signal: int | None = None, message: str = "") -> None:
        if self.state == AgentState.RUNNING:
            self.state = AgentState.FAILED
            self.exits = [Exit(self.started, self.rank, exit_code, signal, message)]

    def hangs(self, doing: Doing) -> None:
        """All its workers are silent for too long."""
        if self.state == AgentState.RUNNING:
            self.stalled = Stalled(self.rank, Phase.TRAINING, self.started, 61.0, doing)

    def saves(self) -> None:
        """The workers leave after a save that all ranks have agreed on, for one pod was asked to go."""
        if self.state == AgentState.RUNNING:
            self.state = AgentState.STOPPED if self.leaving else AgentState.FAILED
            self.exits = [Exit(self.started, self.rank, ExitCode.SAVED)]

    def begins_anew(self) -> None:
        """A new instance of the agent answers for what ran under the old one."""
        self.instance += 1
        if self.state == AgentState.RUNNING:
            self.state = AgentState.FAILED
            self.exits = [Exit(self.started, -1, None, None, "the agent process ended while this generation ran")]


class Cluster:
    """The whole of it, with one job."""

    def __init__(self, spec: str = "", nodes: int = 2) -> None:
        self.api = FakeKubeApi()
        self.now = NOON
        self.skew = self.skewed = timedelta()
        self.api.clock = lambda: self.now
        self.agents: dict[str, SimulatedAgent] = {}
        self.next_is_mute = False  # the next pod that starts
        self.told: defaultdict[int, set[tuple[int, str, int, str, int]]] = defaultdict(set)
        self.started: defaultdict[int, list[str]] = defaultdict(list)
        self.shapes: dict[int, str] = {}  # of a pod that was told to run a generation
        self.api.store(JOBS, job_body(spec, nodes=nodes), "ADDED")
        self.changed: list[JobKey] = []
        self.restart_operator()

    # The operator.

    def restart_operator(self, changes: str = "") -> None:
        """A new process takes stock: it knows what the API server knows and has heard nobody. Its settings may be others."""
        self.api.crash_after = self.api.fail_next = None
        self.api.events.clear()
        self.cache = Cache()
        self.reports, self.metrics = Reports(self.clock), Metrics()
        self.cache.begin_sweep()
        for body in self.api.bodies(JOBS):
            self.cache.observe_job(copy.deepcopy(body))
        for body in self.api.bodies(PODS):
            self.cache.observe_pod(copy.deepcopy(body))
        self.cache.end_sweep()
        self.reconciler = Reconciler(
            api=self.api,
            cache=self.cache,
            reports=self.reports,
            settings=settings(changes),
            ca_certificates="CA",
            on_status=self.changed.append,
            history=History(self.metrics),
            clock=self.clock,
        )

    def clock(self) -> datetime:
        """What the operator's clock shows, which may be off."""
        return self.now + self.skew

    def set_clock(self, skew: timedelta) -> None:
        """The operator's clock jumps, and is off by so much from then on."""
        self.skewed += abs(skew - self.skew)
        self.skew = skew

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def watch(self, count: int = 10**6) -> int:
        """Show the operator so many of the oldest events that it has not seen yet."""
        shown = 0
        while self.api.events and shown < count:
            kind, body = self.api.events.popleft()
            observe = self.cache.observe_pod if body["kind"] == "Pod" else self.cache.observe_job
            observe(body, deleted=kind == "DELETED")
            shown += 1
        return shown

    async def reconcile(self) -> float | None:
        return await self.reconciler.reconcile(KEY)

    # Kubelets.

    def pods(self) -> list[KubeObject]:
        return self.api.bodies(PODS)

    def change_pod(self, uid: str, **status: Any) -> None:
        body = next(copy.deepcopy(pod) for pod in self.pods() if pod["metadata"]["uid"] == uid)
        body["spec"]["nodeName"] = f"node-of-{uid}"
        body["status"] |= status
        self.api.store(PODS, body)

    def start_pod(self, uid: str) -> None:
        """The kubelet starts a pod, and its agent is there."""
        address = f"10.0.{uid.removeprefix('uid-')}"
        mute, self.next_is_mute = self.next_is_mute, False
        self.agents[uid] = SimulatedAgent(uid=uid, address=address, cut=mute, mute=mute)
        running = {"startedAt": timestamp(self.now)}
        self.change_pod(
            uid,
            phase="Running",
            podIP=address,
            containerStatuses=[{"name": "trainer", "state": {"running": running}, "restartCount": 0}],
        )

    def remove_pod(self, uid: str) -> None:
        """A pod is gone for good."""
        self.agents.pop(uid, None)
        name = next(pod["metadata"]["name"] for pod in self.pods() if pod["metadata"]["uid"] == uid)
        self.api.remove(PODS, KEY[0], name)

    def finish_pod(self, uid: str) -> None:
        """The agent exits with 0, and the pod has succeeded."""
        self.agents.pop(uid, None)
        self.change_pod(
            uid, phase="Succeeded", containerStatuses=[{"name": "trainer", "state": {"terminated": {"exitCode": 0}}}]
        )

    def out_of_memory(self, uid: str) -> None:
        """The whole container is killed and started again."""
        self.agents[uid].begins_anew()
        state = {"running": {}}
        last = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
        self.change_pod(
            uid, containerStatuses=[{"name": "trainer", "state": state, "lastState": last, "restartCount": 1}]
        )

    def cut(self, uid: str) -> None:
        """The node of a pod is cut off, and the node lifecycle controller has said so."""
        self.agents[uid].cut, self.agents[uid].mute = True, False
        ready = {"type": "Ready", "status": "False"}
        self.change_pod(uid, conditions=[ready, {"type": "ContainersReady", "status": "True"}])

    def heal(self, uid: str) -> None:
        """The node is back."""
        self.agents[uid].cut = self.agents[uid].mute = False
        self.change_pod(uid, conditions=[])

    # Agents and the job server.

    def talk(self, uid: str) -> bool:
        """An agent reports and obeys the order that this operator process gives it; tell whether it had news."""
        agent = self.agents[uid]
        pod = self.cache.pod(uid)
        if pod is None or agent.cut:
            return False  # 404: not known (yet)
        news = self.reports.hear(agent.report())
        body = self.cache.job(KEY)
        order = orders_for(parse_job(body)).to(uid) if body else Order(Action.WAIT)
        if order.action == Action.RUN:
            self.told[order.generation].add((order.rank, uid, order.nodes, order.master_address, order.master_port))
            self.shapes[order.generation] = pod.shape
        if agent.obey(order):
            self.started[agent.started].append(uid)
        return news

    # Everybody at once.

    async def settle(self, rounds: int = 100) -> None:
        """Go on, without faults, until nothing changes any more."""
        for _ in range(rounds):
            before = (len(self.api.writes), repr(self.agents), self.job.get("status"))
            self.watch()
            self.kubelets()
            self.watch()
            news = [self.talk(uid) for uid in list(self.agents)]
            await self.reconcile()
            self.watch()
            if before == (len(self.api.writes), repr(self.agents), self.job.get("status")) and not any(news):
                return
        raise AssertionError(f"it does not settle: {self.job.get('status')}")

    def kubelets(self) -> None:
        """Start what is to be started, remove what is to be removed."""
        for pod in self.pods():
            uid, phase = pod["metadata"]["uid"], pod["status"].get("phase")
            if uid in self.agents and self.agents[uid].cut and not self.agents[uid].mute:
                continue
            if "deletionTimestamp" in pod["metadata"]:
                self.end_pod(uid)
            elif phase == "Pending":
                self.start_pod(uid)
            elif uid in self.agents and self.agents[uid].finished:
                self.finish_pod(uid)

    def end_pod(self, uid: str) -> None:
        """SIGTERM first: a whole gang saves, half a one has nothing to agree on. When the agent has told, the pod goes."""
        agent = self.agents.get(uid)
        if agent is None or agent.leaving:
            self.remove_pod(uid)
            return
        agent.leaving = True
        gang = [self.agents.get(member["uid"]) for member in (self.status.get("gang") or {}).get("members", [])]
        if agent in gang and all(
            one and one.state == AgentState.RUNNING and one.started == agent.started for one in gang
        ):
            for one in gang:
                one.saves()
        elif agent.state == AgentState.RUNNING:
            agent.state, agent.exits = AgentState.STOPPED, [Exit(agent.started, agent.rank, None, 15)]

    def train(self) -> None:
        """If a whole gang runs one generation, all its workers succeed."""
        members = (self.status.get("gang") or {}).get("members", [])
        agents = [self.agents.get(member["uid"]) for member in members]
        if members and all(
            agent and agent.state == AgentState.RUNNING and agent.started == self.generation for agent in agents
        ):
            for agent in agents:
                agent.state = AgentState.SUCCEEDED

    # What can be read.

    @property
    def job(self) -> KubeObject:
        """The job in the API server; an empty object when it is gone."""
        return self.api.objects.get((JOBS.plural, *KEY), {})

    @property
    def status(self) -> KubeObject:
        return self.job.get("status") or {}

    @property
    def generation(self) -> int:
        return (self.status.get("gang") or {}).get("generation", 0)

    @property
    def phase(self) -> str:
        return self.status.get("phase", "")

    def edit(self, **spec: Any) -> None:
        body = copy.deepcopy(self.job)
        body["spec"] |= spec
        body["metadata"]["generation"] += 1
        self.api.store(JOBS, body)

    def check(self) -> None:
        """What must be true at any time."""
        for generation, orders in self.told.items():
            committed = self.api.member_sets.get((self.job_uid, generation))
            assert committed is not None, f"told to run generation {generation} before its members were committed"
            members = {(member["rank"], member["uid"]) for member in committed}
            assert {(rank, uid) for rank, uid, *_ in orders} <= members
            assert len({(nodes, address, port) for *_, nodes, address, port in orders}) == 1, "one master for all"
            assert len({rank for rank, _ in members}) == len(members), "ranks are unique"
        members = {member["uid"] for member in (self.status.get("gang") or {}).get("members", ())}
        shapes = {
            pod["metadata"]["annotations"][SHAPE_ANNOTATION] for pod in self.pods() if pod["metadata"]["uid"] in members
        }
        assert len(shapes) <= 1, "the pods of a gang have one shape"
        for uids in self.started.values():
            assert len(uids) == len(set(uids)), "an agent starts a generation once"
        places = [
            (pod["metadata"]["labels"]["finetune.dev/rank"], pod["metadata"]["labels"]["finetune.dev/generation"])
            for pod in self.pods()
        ]
        assert len(places) == len(set(places)), "one pod for each place and generation"
        status = self.status
        if status:
            kstatus.check(self.job)
            kinds = [condition["type"] for condition in status["conditions"]]
            assert kinds == [kind.value for kind in ConditionType]
            assert all(condition["reason"] and condition["message"] for condition in status["conditions"])
            self._check_goodput(status)
            for entry in (status.get("restarts") or {}).get("byReason", ()):
                assert entry["used"] <= self.job["spec"].get("recovery", {}).get("maxRestarts", 8)

    def _check_goodput(self, status: KubeObject) -> None:
        """No second is counted twice, and none is made up but by a clock that jumps."""
        goodput = status.get("goodput")
        if goodput is not None:
            counted = goodput["productiveSeconds"] + sum(goodput["lostSeconds"].values())
            assert counted <= (self.now + self.skewed - instant(status["startTime"])).total_seconds() + 1.0
            assert 0 <= goodput["percent"] <= 100

    job_uid = job_body()["metadata"]["uid"]
