"""What a decision is made from, and what it looks like."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from finetune_api.job import FineTuneJob
from finetune_api.protocol import Report
from finetune_api.status import Gang, JobStatus, Member
from finetune_operator.views import PodView

ALWAYS = datetime.min.replace(tzinfo=UTC)
HEARING_SECONDS = (
    20.0  # an agent may wait 10 s for an answer of the leader before this one, and 5 s until it tries again
)


@dataclass(frozen=True, slots=True)
class Heard:
    """The newest report of one agent, since when it has said the same of the same generation, and when it was heard last."""

    report: Report
    since: datetime
    at: datetime


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a job cannot be started as it is written: something that only the operator can see."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything that is known of one job at one instant.

    ``heard`` is by pod uid, and holds only what this operator process has heard itself, also of members whose pods are gone. ``problem`` is what is wrong with the spec,
    ``obstacle`` what the API server said when a pod could not be created. ``listening_since`` is when this process began to lead: before
    that, agents told another one, and nobody's silence counts.
    """

    job: FineTuneJob
    pods: tuple[PodView, ...]
    heard: Mapping[str, Heard]
    problem: Problem | None
    now: datetime
    obstacle: Problem | None = None
    listening_since: datetime = ALWAYS
    _pods: Mapping[str, PodView] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_pods", {pod.uid: pod for pod in self.pods})

    @property
    def status(self) -> JobStatus:
        """The status as it stands in the API server."""
        return self.job.status or JobStatus()

    def pod(self, uid: str) -> PodView | None:
        """Return the pod with this uid, if it exists."""
        return self._pods.get(uid)

    def seconds_to_hear_all(self, gang: Gang) -> float:
        """Return for how long this leader is too new to tell that a member it has not heard is silent; 0 when all were heard."""
        if all(member.uid in self.heard for member in gang.members):
            return 0.0
        return max(0.0, HEARING_SECONDS - (self.now - self.listening_since).total_seconds())

    def said(self, gang: Gang, member: Member) -> Report | None:
        """Return what the agent of a member says of this generation, if it has said anything."""
        heard = self.heard.get(member.uid)
        return heard.report if heard is not None and heard.report.generation == gang.generation else None

    def said_by_first(self, gang: Gang) -> Report | None:
        """Return what node 0 says of this generation: it speaks for the whole gang."""
        first = next((member for member in gang.members if member.rank == 0), None)
        return self.said(gang, first) if first is not None else None


@dataclass(frozen=True, slots=True)
class NewPod:
    """A pod to create: its place, and the generation that it is created for (which is part of its name)."""

    rank: int
    generation: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, in the order in which a crash between any two steps is harmless: status, then pods, then orders."""

    status: JobStatus
    create: tuple[NewPod, ...] = ()
    delete: tuple[PodView, ...] = ()
    delete_job: bool = False
    look_again_seconds: float | None = None


def is_final(status: JobStatus) -> bool:
    """Tell whether the job has ended, either way. It never comes back."""
    return any(c.type in ("Complete", "Failed") and c.status == "True" for c in status.conditions)


def unset_gang(nodes: int, processes_per_node: int, generation: int) -> Gang:
    """Return a gang that is minted, and whose members are not chosen yet."""
    return Gang(generation=generation, nodes=nodes, processes_per_node=processes_per_node)


def timestamp(at: datetime) -> str:
    """Return an instant as Kubernetes writes it: RFC 3339, UTC, whole seconds."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def instant(text: str) -> datetime:
    """Return the instant that a timestamp of Kubernetes names."""
    return datetime.fromisoformat(text)
