"""What a decision is made from, and what it looks like."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from finetune_api.job import FineTuneJob
from finetune_api.protocol import Report
from finetune_api.status import Gang, JobStatus, Member
from finetune_operator.views import PodView


@dataclass(frozen=True, slots=True)
class Heard:
    """The newest report of one agent, since when it has said the same of the same generation, and when it was heard last.

    ``steady_since`` is since when it is heard without a gap, ``step_at`` when its step advanced last, and ``step_seconds`` how long after
    the advance before.
    """

    report: Report
    since: datetime
    at: datetime
    steady_since: datetime
    step_at: datetime | None = None
    step_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Hearing:
    """Since when this operator process hears agents without a gap, and when it heard any of them last."""

    since: datetime
    at: datetime


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, in a word and in a sentence."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything that is known of one job at one instant.

    ``heard`` is by pod uid, and holds only what this operator process has heard itself, also of members whose pods are gone. ``problem`` is what is wrong with the spec,
    ``obstacle`` what the API server said when a pod could not be created. Without ``hearing`` nobody is taken for silent.
    ``senior_waits`` and ``junior_waits`` tell of other jobs that cannot be placed (see ``giving_way``).
    """

    job: FineTuneJob
    pods: tuple[PodView, ...]
    heard: Mapping[str, Heard]
    problem: Problem | None
    now: datetime
    obstacle: Problem | None = None
    hearing: Hearing | None = None
    silent_seconds: float = 30.0
    most_nodes_lost: bool = False
    senior_waits: bool = False
    junior_waits: bool = False
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
    """A pod to create: its place, the generation that it is created for (both are part of its name), and the nodes to avoid.

    Places from the gang's size on are those of spares. A place is a name: which rank a pod has is said by the gang's members.
    """

    rank: int
    generation: int
    avoid: tuple[str, ...] = ()


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


def unset_gang(observed: Observation, generation: int) -> Gang:
    """Return a gang that is minted now in the size that spec asks for, and whose members are not chosen yet."""
    workers = observed.job.spec.workers
    return Gang(
        generation=generation,
        nodes=workers.nodes,
        processes_per_node=workers.local_processes,
        mint_time=timestamp(observed.now),
    )


def timestamp(at: datetime) -> str:
    """Return an instant as Kubernetes writes it: RFC 3339, UTC, whole seconds."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def instant(text: str) -> datetime:
    """Return the instant that a timestamp of Kubernetes names."""
    return datetime.fromisoformat(text)


def soonest(*seconds: float | None) -> float | None:
    """Return the least of the times, or None when there is none."""
    return min((s for s in seconds if s is not None), default=None)
