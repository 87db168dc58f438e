"""A job's life told step by step, with nothing but values: what is known is set by hand, and ``plan_job`` says what follows.

A story stands for one operator process with a perfect view. ``go()`` plans, takes the planned status as written and the planned pods as
created, and returns the plan. Time moves only when told.
"""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import yaml

from finetune_api.contract import ExitCode
from finetune_api.job import FineTuneJob
from finetune_api.protocol import AgentState, Exit, Heartbeat, Order, Phase, Report
from finetune_api.status import JobStatus
from finetune_operator.plan.lifecycle import plan_job
from finetune_operator.plan.observation import Heard, Hearing, Observation, Plan, Problem, timestamp
from finetune_operator.plan.orders import orders_for
from finetune_operator.plan.shape import shape_of
from finetune_operator.render.names import pod_name
from finetune_operator.views import ContainerView, PodView
from tests.operator.documents import NOON, RECIPE, a_job

RUNNING = ContainerView(name="trainer", is_init=False, running=True)


class Story:
    """One job, its pods and what their agents have said."""

    def __init__(self, spec: str = "", *, base: str = RECIPE, nodes: int = 2) -> None:
        self.job: FineTuneJob = a_job(spec, base=base, nodes=nodes)
        self.pods: dict[str, PodView] = {}
        self.heard: dict[str, Heard] = {}
        self.problem: Problem | None = None
        self.obstacle: Problem | None = None
        self.hearing: Hearing | None = None
        self.flags: dict[str, bool] = {}  # what is known of other jobs and of nodes
        self.now = NOON
        self._pods_made = 0

    # What the operator does.

    def look(self) -> Plan:
        """Return the plan without carrying it out."""
        observed = Observation(
            job=self.job,
            pods=tuple(self.pods.values()),
            heard={uid: heard for uid, heard in self.heard.items() if uid in {*self.pods, *self._members()}},
            problem=self.problem,
            obstacle=self.obstacle,
            now=self.now,
            hearing=self.hearing,
            **self.flags,
        )
        return plan_job(observed)

    def go(self) -> Plan:
        """Plan; write the status, create and delete pods."""
        plan = self.look()
        self.job = self.job.model_copy(update={"status": JobStatus.model_validate(plan.status.to_wire())})
        for place in plan.create:
            self._pods_made += 1
            name = pod_name(self.job, place.rank, place.generation)
            uid = f"pod-{self._pods_made}"
            self.pods[uid] = PodView(
                namespace=self.job.metadata.namespace,
                name=name,
                uid=uid,
                job=self.job.metadata.name,
                job_uid=self.job.metadata.uid,
                rank=place.rank,
                generation=place.generation,
                created=timestamp(self.now),
                shape=shape_of(self.job),
            )
        for pod in plan.delete:
            self.change(pod.uid, deleting=True)
        return plan

    def _members(self) -> set[str]:
        gang = self.job.status.gang if self.job.status else None
        return {member.uid for member in gang.members} if gang else set()

    # What happens in the cluster.

    def pod(self, rank: int) -> PodView:
        """Return the newest pod of a rank."""
        return [pod for pod in self.pods.values() if pod.rank == rank][-1]

    def change(self, rank_or_uid: int | str, **fields: Any) -> None:
        """Change the newest pod of a rank."""
        uid = self.pod(rank_or_uid).uid if isinstance(rank_or_uid, int) else rank_or_uid
        self.pods[uid] = replace(self.pods[uid], **fields)

    def must_go(self, rank: int, disruption: str = "EvictionByEvictionAPI", grace_seconds: float = 60) -> None:
        """The newest pod of a rank is deleted, and has its grace period to save."""
        ends = timestamp(self.now + timedelta(seconds=grace_seconds))
        self.change(rank, deleting=True, grace_ends=ends, disruption=disruption)

    def vanish(self, rank: int) -> None:
        """The newest pod of a rank is gone from the API server."""
        del self.pods[self.pod(rank).uid]

    def vanish_all(self) -> None:
        """All pods are gone."""
        self.pods.clear()

    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += timedelta(seconds=seconds)

    def listens(self) -> "Story":
        """From now on silence means something: this process hears agents, of this job or others."""
        self.hearing = Hearing(since=self.now, at=self.now)
        return self

    def passes(self, seconds: int, *ranks: int, others: bool = True, step: int | None = None) -> Plan:
        """So many seconds, one at a time: the agents of these ranks talk, ``others`` are heard, the operator acts when it said it would."""
        plan = self.go()
        look_at = self.now + timedelta(seconds=plan.look_again_seconds or 10**6)
        for _ in range(seconds):
            self.wait(1)
            for rank in ranks:
                known = self.heard[self.pod(rank).uid].report.heartbeat
                beat = {"heartbeat": Heartbeat(Phase.TRAINING, known.step + step)} if known and step else {}
                self.report(rank, **beat)
            if self.hearing and (others or ranks):
                self.hearing = replace(self.hearing, at=self.now)
            if self.now >= look_at:
                plan = self.go()
                look_at = self.now + timedelta(seconds=plan.look_again_seconds or 10**6)
        return plan

    # What agents say.

    def report(self, rank: int, **fields: Any) -> None:
        """The agent of a rank's newest pod reports."""
        self._say(self.pod(rank).uid, **fields)

    def _say(self, uid: str, **fields: Any) -> None:
        known = self.heard.get(uid)
        base = known.report if known else idle_report(uid, self.pods[uid].rank)
        if fields.get("generation", base.generation) != base.generation:  # what an agent forgets when another starts
            base = replace(base, heartbeat=None, progress=None, saves=None, resumed=None, exits=[])
        report = replace(base, **fields)
        same = known is not None and (known.report.state, known.report.generation) == (report.state, report.generation)
        since = known.since if same and known else self.now
        heard = Heard(report=report, since=since, at=self.now, steady_since=known.steady_since if known else self.now)
        if known and report.heartbeat and known.report.heartbeat:
            advances = report.heartbeat.step > known.report.heartbeat.step
            took = (self.now - known.step_at).total_seconds() if known.step_at else 0.0
            heard = replace(
                heard,
                step_at=self.now if advances else known.step_at,
                step_seconds=took if advances else known.step_seconds,
            )
        self.heard[uid] = heard

    def pods_start(self, *ranks: int) -> None:
        """The kubelets have started these pods (all by default), and their agents report."""
        for rank in ranks or range(self.job.spec.workers.nodes):
            self.change(
                rank,
                phase="Running",
                node=f"node-{rank}",
                address=f"10.0.0.{rank}",
                scheduled=True,
                containers=(RUNNING,),
            )
            self.report(rank)

    def workers_train(self, *ranks: int) -> None:
        """The workers of the committed generation train."""
        for rank in ranks or range(len(self.job.status.gang.members)):
            heartbeat = Heartbeat(Phase.TRAINING, 1)
            self.report(rank, generation=self.generation, state=AgentState.RUNNING, heartbeat=heartbeat, exits=[])

    def workers_train_all(self) -> None:
        """The workers of all members train, whatever places their pods have."""
        for member in self.job.status.gang.members:
            self._say(member.uid, generation=self.generation, state=AgentState.RUNNING, exits=[])
        self.go()

    def fails(self, pod_name: str) -> None:
        """The worker in this member's pod fails."""
        member = next(member for member in self.job.status.gang.members if member.pod == pod_name)
        self._say(member.uid, state=AgentState.FAILED, exits=[Exit(self.generation, member.rank, 1)])

    def worker_ends(
        self,
        rank: int,
        exit_code: int | None = None,
        *,
        signal: int | None = None,
        message: str = "",
        who: int | None = None,
    ) -> None:
        """The worker of a node fails, and its agent says so."""
        end = Exit(self.generation, rank if who is None else who, exit_code, signal, message)
        self.report(rank, generation=self.generation, state=AgentState.FAILED, exits=[end])

    def worker_saves(self, rank: int, *, asked: bool = False) -> None:
        """The worker of a node leaves after a save: its own agent asked it to, or another's."""
        end = Exit(self.generation, rank, ExitCode.SAVED)
        state = AgentState.STOPPED if asked else AgentState.FAILED
        self.report(rank, generation=self.generation, state=state, exits=[end])

    def workers_succeed(self, *ranks: int) -> None:
        """Workers end with 0."""
        for rank in ranks or range(len(self.job.status.gang.members)):
            self.report(rank, generation=self.generation, state=AgentState.SUCCEEDED)

    # Chapters.

    def trains(self) -> "Story":
        """Go on until every member trains."""
        self.go()
        self.pods_start()
        self.go()
        self.workers_train()
        self.go()
        assert self.phase == "Running", self.say()
        return self

    def recovers(self) -> "Story":
        """Go on from a minted generation until every member trains again."""
        self.go()
        self.pods_start()
        self.go()
        self.workers_train()
        self.go()
        assert self.phase == "Running", self.say()
        return self

    # What can be read.

    @property
    def generation(self) -> int:
        """The committed generation."""
        return self.job.status.gang.generation

    @property
    def phase(self) -> str:
        """The phase in status."""
        return self.job.status.phase.value

    @property
    def status(self) -> dict[str, Any]:
        """Status as users read it, without its conditions."""
        return {name: value for name, value in self.job.status.to_wire().items() if name != "conditions"}

    @property
    def attempts(self) -> list[str]:
        """The reasons of all ended incarnations."""
        return [attempt.reason for attempt in self.job.status.attempts]

    @property
    def restarts(self) -> int:
        """How many restarts were counted."""
        return self.job.status.restarts.total if self.job.status.restarts else 0

    def condition(self, kind: str) -> Any:
        """Return one condition."""
        return next(condition for condition in self.job.status.conditions if condition.type == kind)

    @property
    def holds(self) -> set[str]:
        """The conditions that are True."""
        return {condition.type for condition in self.job.status.conditions if condition.status == "True"}

    def say(self) -> str:
        """Return reason and message, which all conditions share."""
        return f"{self.job.status.conditions[0].reason}: {self.job.status.conditions[0].message}"

    def order(self, rank: int) -> Order:
        """Return what the agent of a rank's newest pod is told."""
        return orders_for(self.job).to(self.pod(rank).uid)

    def edit(self, **spec: Any) -> None:
        """A user edits spec (python names)."""
        metadata = self.job.metadata.model_copy(update={"generation": self.job.metadata.generation + 1})
        new = self.job.spec.model_copy(update=spec)
        self.job = self.job.model_copy(update={"spec": new, "metadata": metadata})


def idle_report(uid: str, rank: int) -> Report:
    """Return the first report of an agent."""
    return Report(
        pod_uid=uid,
        instance=f"{uid}-1",
        agent_version="0.1.0",
        generation=0,
        state=AgentState.IDLE,
        address=f"10.0.0.{rank}",
        port=29500 + rank,
    )


def document(text: str) -> Any:
    """Return a YAML document as values."""
    return yaml.safe_load(text)
