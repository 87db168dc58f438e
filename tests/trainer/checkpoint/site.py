"""Where gangs train in the breakage tests: a store behind a proxy, pods, and the numbers that every run must have.

Every number that any rank has at any step is compared, as a hash of its master weights, moments and scalars, with what an
undisturbed run had there; losses as ``repr`` gives them. So whatever was resumed from wherever, a run that was
disturbed cannot be told from one that was not.
"""

import itertools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tests.storage.faulty_proxy import Fault, Proxy, faulty_proxy
from tests.storage.seaweedfs import S3Server
from tests.trainer.checkpoint.gangs import Gang, Nursery, Prefix, written_more_than_once

BUCKET = "breakage"
STEPS = 12
"""Of the undisturbed run, and so the most that any other may train."""
COMMIT = "PUT /HEAD"


@dataclass
class Site:
    """One server and one nursery for many prefixes."""

    nursery: Nursery
    server: S3Server
    folder: Path
    undisturbed: dict[int, dict[int, tuple[list[str], str]]] = field(default_factory=dict)
    """By rank and step: losses and state."""
    numbers: itertools.count = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.client = self.server.client()
        self.server.create_bucket(BUCKET)

    def new_prefix(self, like: "Remains | None" = None) -> Prefix:
        """Return a prefix that nobody used, with the objects that an earlier generation of another job left."""
        prefix = Prefix(self.server, BUCKET, f"job-{next(self.numbers)}", self.client)
        if like is not None:
            for key in like.prefix.objects():
                source = {"Bucket": BUCKET, "Key": f"{like.prefix.path}/{key}"}
                self.client.copy_object(Bucket=BUCKET, Key=f"{prefix.path}/{key}", CopySource=source)
        return prefix

    def new_pod(self, like: "Remains | None" = None, prefix: Prefix | None = None) -> Path:
        """Return a staging folder; with what workers of another job left in theirs, as if it had been this one."""
        pod = self.folder / f"pod-{next(self.numbers)}"
        if like is None:
            pod.mkdir()
            return pod
        shutil.copytree(like.pod, pod)
        for seal in pod.glob("*.seal"):
            seal.write_text(json.dumps({**json.loads(seal.read_text()), "prefix": prefix.uri}))
        return pod

    def start(self, proxy: Proxy, prefix: Prefix, generation: int, pod: Path, **drill: object) -> Gang:
        """Start a generation."""
        return self.nursery.start(
            endpoint=proxy.endpoint,
            prefix=prefix.uri,
            generation=generation,
            folder=str(self.folder),
            pod=str(pod),
            environment=self.server.environment,
            **drill,
        )

    def check(self, gang: Gang) -> None:
        """Assert that each number that the gang told is that of the undisturbed run."""
        for rank in range(gang.drill.ranks):
            for said in gang.told("trained", rank):
                assert (said["losses"], said["state"]) == self.undisturbed[rank][said["step"]], gang.story()
            for said in gang.told("resumed", rank):
                assert said["step"] == 0 or said["state"] == self.undisturbed[rank][said["step"]][1], gang.story()

    def go_on(self, left: "Remains", *, generation: int, committed: int) -> None:
        """Start the next generation: it takes up the newest state, trains as if nothing had happened, and leaves nothing of the past."""
        in_memory = left.newest_in_memory()
        with faulty_proxy(self.server.endpoint) as proxy:
            gang = self.start(proxy, left.prefix, generation, left.pod, saves=[1], until=2)
            assert gang.wait() == [0, 0], gang.story()
            assert written_more_than_once(proxy) == {}
        self.check(gang)
        resumed = gang.told("resumed")[0]
        expected = (committed, "Storage") if in_memory is None else (in_memory, "Memory")
        assert (resumed["step"], resumed["source"]) == expected, gang.story()
        assert left.prefix.head()["generation"] == generation
        assert left.prefix.check() == [resumed["step"] + 1]
        assert left.prefix.folders() == left.prefix.listed_folders()
        assert left.prefix.uploads() == []

    def train_undisturbed(self) -> None:
        """Find out which numbers there are when nothing is saved, resumed or broken."""
        with faulty_proxy(self.server.endpoint) as proxy:
            gang = self.start(proxy, self.new_prefix(), 1, self.new_pod(), until=STEPS)
            assert gang.wait() == [0, 0], gang.story()
        for rank in range(2):
            self.undisturbed[rank] = {
                said["step"]: (said["losses"], said["state"]) for said in gang.told("trained", rank)
            }


@dataclass(frozen=True)
class Remains:
    """What a generation left: its prefix in the store and the memory of its pod."""

    prefix: Prefix
    pod: Path

    def sealed_by_both(self) -> set[tuple[int, ...]]:
        """Lineage, step and generation of the saves that lie whole in the memory of two ranks."""
        seals = [json.loads(path.read_text()) for path in self.pod.glob("*.seal")]
        held = [{tuple(seal["save"]) for seal in seals if seal["rank"] == rank} for rank in range(2)]
        return held[0] & held[1]

    def newest_in_memory(self) -> int | None:
        """The step that a generation in the same pod must take up from there; None where it cannot."""
        head = self.prefix.head()
        newest = head["kept"][0]["step"] if head["kept"] else 0
        usable = [step for lineage, step, _ in self.sealed_by_both() if lineage == head["lineage"] and step >= newest]
        return max(usable, default=None)


def leave_a_commit_and_a_save_under_way(site: Site) -> Remains:
    """Generation 1 commits step 2 and is killed when all of step 3 is uploaded and only ``HEAD`` is missing."""
    prefix, pod = site.new_prefix(), site.new_pod()
    swaps = itertools.count(1)
    with faulty_proxy(site.server.endpoint) as proxy:

        def die(request):
            if (
                not request.matches(COMMIT) or next(swaps) < 3
            ):  # the first is the fence, the second the commit of step 2
                return None
            gang.kill_all()
            return Fault.REQUEST_LOST

        proxy.before = die
        gang = site.start(proxy, prefix, 1, pod, saves=[2, 3], until=3)
        assert 0 not in gang.wait(), gang.story()
    return Remains(prefix, pod)
