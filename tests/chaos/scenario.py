"""What a seed means: which jobs, what befalls whom and when. A value; the same for the same seed on every machine.

Times are earliest times: a fault of the whole cluster waits until another of its kind is over (see ``faults.World``), and one that has nobody
to befall (a pod that is being replaced just then) befalls nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random

WINDOW_SECONDS = 14.0
CUT_SECONDS = (
    45.0  # the control plane calls a node not ready after 20 s, and an agent is missed after 15 s more at most
)
NODES = 2


class Kind(StrEnum):
    """What may happen. The value says whom it befalls."""

    WORKER_KILLED = "a worker of the job is killed"
    AGENT_KILLED = "an agent of the job is killed"
    CONTAINER_KILLED = "a container of the job is killed"
    POD_DELETED = "a pod of the job is deleted"
    POD_FORCED_AWAY = "a pod of the job is deleted by force"
    OPERATOR_KILLED = "the leader is killed"
    OPERATOR_CUT = "the leader is cut off from the API server"
    OPERATOR_DEAF = "no agent reaches the operator"
    APISERVER_AWAY = "the API server is away"
    KUBELET_AWAY = "a kubelet is away"
    NODE_CUT_BRIEFLY = "a node is cut off for a moment"
    NODE_CUT = "a node is cut off"
    STORE_AWAY = "no pod reaches the store"
    STORE_FROZEN = "the store answers nobody"
    NETWORK_SLOW = "a node's network is slow"


OF_A_JOB = (
    Kind.WORKER_KILLED,
    Kind.AGENT_KILLED,
    Kind.CONTAINER_KILLED,
    Kind.POD_DELETED,
    Kind.POD_FORCED_AWAY,
)
OF_THE_CLUSTER = tuple(kind for kind in Kind if kind not in (*OF_A_JOB, Kind.NODE_CUT))
"""What must restart nothing."""

SECONDS = {
    Kind.OPERATOR_CUT: (16.0, 24.0),  # longer than the lease
    Kind.OPERATOR_DEAF: (3.0, 25.0),
    Kind.APISERVER_AWAY: (1.0, 9.0),
    Kind.KUBELET_AWAY: (1.0, 12.0),
    Kind.NODE_CUT_BRIEFLY: (1.0, 8.0),
    Kind.NODE_CUT: (CUT_SECONDS, CUT_SECONDS + 10.0),
    Kind.STORE_AWAY: (2.0, 12.0),
    Kind.STORE_FROZEN: (2.0, 12.0),
    Kind.NETWORK_SLOW: (5.0, 15.0),
}


@dataclass(frozen=True, slots=True)
class ChaosJob:
    """A job of a scenario. A recipe has the real trainer; any other job a light one that needs no torch."""

    name: str
    nodes: int
    processes: int = 1
    spares: int = 0
    recipe: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """``at`` seconds after all jobs train. ``place`` chooses a member of ``job``, or a node, modulo their number."""

    at: float
    kind: Kind
    job: str = ""
    place: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        whom = f" ({self.job}, {self.place})" if self.job else ""
        length = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.at:.1f} s: {self.kind}{whom}{length}"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One seed."""

    seed: int
    jobs: Sequence[ChaosJob]
    faults: Sequence[Fault]

    @property
    def is_exclusive(self) -> bool:
        """Whether it may restart jobs of other seeds that run beside it."""
        return any(fault.kind == Kind.NODE_CUT for fault in self.faults)

    @property
    def replay(self) -> str:
        return f"python -m tests.chaos --seed {self.seed}"

    def __str__(self) -> str:
        return f"seed {self.seed}: {len(self.jobs)} jobs; " + "; ".join(map(str, self.faults))


def scenario(seed: int) -> Scenario:
    """Every seed has light jobs and faults of jobs and of the cluster; one in sixteen cuts a node off for good, one in sixteen has a recipe."""
    random = Random(seed)
    jobs = [
        ChaosJob(
            name=f"seed{seed}-{letter}",
            nodes=random.choice((1, 1, 2, 2, 2, 3)),
            processes=random.choice((1, 1, 1, 2)),
            spares=random.choice((0, 0, 0, 0, 1)),
        )
        for letter in "abc"[: random.choice((2, 2, 2, 3))]
    ]
    if seed % 16 == 8:
        jobs.append(ChaosJob(name=f"seed{seed}-r", nodes=2, recipe=True))
    return Scenario(seed, tuple(jobs), tuple(sorted(_faults(random, seed, jobs), key=lambda fault: fault.at)))


def _faults(random: Random, seed: int, jobs: Sequence[ChaosJob]) -> list[Fault]:
    touched = random.sample(jobs, random.randint(1, len(jobs)))  # the others must notice nothing
    kinds = [random.choice(OF_A_JOB) for _ in range(random.randint(1, 3))]
    kinds += [random.choice(OF_THE_CLUSTER) for _ in range(random.randint(0, 2))]
    if seed % 16 == 0:
        kinds.append(Kind.NODE_CUT)
    return [
        Fault(
            at=random.uniform(0.0, WINDOW_SECONDS),
            kind=kind,
            job=random.choice(touched).name if kind in OF_A_JOB else "",
            place=random.randrange(6),
            seconds=random.uniform(*SECONDS.get(kind, (0.0, 0.0))),
        )
        for kind in kinds
    ]
