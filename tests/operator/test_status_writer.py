"""Status is written when something differs; progress alone not too often."""

from datetime import timedelta

import pytest

from finetune_api.job import FineTuneJob, parse_job
from finetune_api.protocol import ResumeSource
from finetune_api.status import Attempt, Condition, Gang, JobPhase, JobProgress, JobResumed, JobSaves, JobStatus, Member
from finetune_operator.kube.api import JOBS
from finetune_operator.kube.errors import Conflict, NotFound, TooMany
from finetune_operator.status_writer import StatusWriter
from tests.operator.documents import NOON, job_body
from tests.operator.fake_api import FakeKubeApi


class Scene:
    def __init__(self, jobs: int = 1) -> None:
        self.api = FakeKubeApi()
        self.writer = StatusWriter(self.api, progress_seconds=10)
        self.now = NOON
        for number in range(jobs):
            known = {"observedGeneration": 1, "conditions": [], "attempts": []}
            self.api.store(JOBS, job_body(name=f"job-{number}", uid=f"uid-{number}") | {"status": known})

    def job(self, number: int = 0) -> FineTuneJob:
        return parse_job(self.api.objects["finetunejobs", "team-a", f"job-{number}"])

    async def write(self, number: int = 0, **changes) -> float | None:
        job = self.job(number)
        status = (job.status or JobStatus()).model_copy(update=changes)
        return await self.writer.write(job, status, self.now, on_written=lambda body: None)

    async def progress(self, step: int, number: int = 0) -> float | None:
        return await self.write(number, progress=JobProgress(step=step, update_time="2026-01-01T12:00:00Z"))

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @property
    def writes(self) -> int:
        return len(self.api.writes)


async def test_nothing_is_written_when_nothing_differs() -> None:
    scene = Scene()
    await scene.write(observed_generation=2)
    assert await scene.write(observed_generation=2) is None
    assert scene.writes == 1


async def test_progress_alone_waits_for_its_time_and_says_how_long() -> None:
    scene = Scene()
    assert await scene.progress(1) is None
    scene.wait(3)
    assert await scene.progress(2) == pytest.approx(7)
    assert scene.writes == 1
    scene.wait(7)
    assert await scene.progress(3) is None
    assert (scene.writes, scene.job().status.progress.step) == (2, 3)


async def test_what_is_more_than_progress_is_written_at_once_and_takes_progress_along() -> None:
    scene = Scene()
    await scene.progress(1)
    scene.wait(1)
    progress = JobProgress(step=2, update_time="2026-01-01T12:00:00Z")
    assert await scene.write(observed_generation=2, progress=progress) is None
    assert scene.job().status.progress.step == 2
    scene.wait(9)
    assert await scene.progress(3) == pytest.approx(1), "that write counts too"


SAVING = JobSaves(saving_step=2, saving_since="2026-01-01T12:00:00Z")
RESUMED = JobResumed(generation=2, step=1, source=ResumeSource.STORAGE)
ENDED = Attempt(generation=1, end_time="2026-01-01T12:00:00Z", reason="WorkerKilled", last_step=3)
CAN_WAIT = {
    "how saving goes": {"saves": SAVING},
    "where a generation started, with what was lost": {
        "resumed": RESUMED,
        "attempts": [ENDED.model_copy(update={"lost_steps": 2})],
    },
    "all of it and progress": {
        "saves": SAVING,
        "resumed": RESUMED,
        "progress": JobProgress(step=2, update_time="2026-01-01T12:00:01Z"),
    },
}


@pytest.mark.parametrize("changes", CAN_WAIT.values(), ids=[f"{name} waits" for name in CAN_WAIT])
async def test_what_is_told_at_every_save_waits_for_its_time_as_progress_does(changes: dict) -> None:
    scene = Scene()
    await scene.write(observed_generation=2, attempts=[ENDED])
    scene.wait(4)
    assert await scene.write(**changes) == pytest.approx(6)
    assert scene.writes == 1
    scene.wait(1)
    await scene.write(observed_generation=3, **changes)
    assert scene.writes == 2, "and goes along with what is written at once"
    assert scene.job().status.observed_generation == 3
    assert all(getattr(scene.job().status, name) == value for name, value in changes.items())


def starting(reason: str, message: str = "", *, holds: str = "True", kind: str = "Reconciling") -> dict:
    conditions = [Condition(type=kind, status=holds, reason=reason, message=message, last_transition_time="")]
    return {"conditions": conditions, "gang": Gang(generation=1, nodes=2)}


GOES_ON = {
    "the next reason of a start": starting("ContainerCreating"),
    "other ranks that are waited for": starting("Creating", "rank 1 of 2: the pod is being created"),
    "how many have started": starting("Starting") | {"gang": Gang(generation=1, nodes=2, ready=1)},
}
IS_NEWS = {
    "what a start cannot go on with": starting("Unschedulable"),
    "a condition that holds no more": starting("Creating", holds="False"),
    "a condition that was not there": starting("Creating", kind="Stalled"),
    "a phase": starting("Starting") | {"phase": JobPhase.RUNNING},
    "members": {"gang": Gang(generation=1, nodes=2, members=[Member(rank=0, pod="p", uid="u")])},
    "a generation": {"gang": Gang(generation=2, nodes=2)},
}


@pytest.mark.parametrize("changes", GOES_ON.values(), ids=[f"{name} waits" for name in GOES_ON])
async def test_how_far_a_start_is_waits_for_its_time_as_progress_does(changes: dict) -> None:
    scene = Scene()
    await scene.write(**starting("Creating"))
    scene.wait(4)
    assert await scene.write(**changes) == pytest.approx(6)
    assert scene.writes == 1
    scene.wait(6)
    assert await scene.write(**changes) is None
    assert scene.writes == 2


@pytest.mark.parametrize("changes", IS_NEWS.values(), ids=[f"{name} is told at once" for name in IS_NEWS])
async def test_what_changes_a_start_does_not_wait(changes: dict) -> None:
    scene = Scene()
    await scene.write(**starting("Creating"))
    assert await scene.write(**changes) is None
    assert scene.writes == 2


async def test_an_attempt_beside_a_new_generation_is_written_at_once() -> None:
    scene = Scene()
    await scene.progress(1)
    assert await scene.write(attempts=[ENDED], gang=Gang(generation=2, nodes=2)) is None
    assert scene.writes == 2


async def test_progress_of_all_jobs_together_keeps_to_20_writes_a_second() -> None:
    scene = Scene(jobs=100)
    per_second = []
    for _ in range(10):
        before = scene.writes
        for _ in range(5):
            for number in range(100):
                if scene.job(number).status.progress is None:
                    await scene.progress(1, number)
            scene.wait(0.2)
        per_second.append(scene.writes - before)
    assert max(per_second) <= 21
    assert scene.writes == 100, "and all have their turn"


async def test_jobs_that_must_wait_for_others_are_given_turns_and_not_asked_to_come_all_at_once() -> None:
    scene = Scene(jobs=100)
    waits = [await scene.progress(1, number) or 0.0 for number in range(100)]
    assert scene.writes == 1
    assert max(waits) == pytest.approx(99 / 20)
    assert len(set(waits)) == 100
    for number in sorted(range(100), key=waits.__getitem__)[1:]:
        scene.now = NOON + timedelta(seconds=waits[number])
        assert await scene.progress(2, number) is None, "its turn is its turn"
    assert scene.writes == 100


async def test_a_write_against_an_old_version_is_a_conflict() -> None:
    scene = Scene()
    job = scene.job()
    await scene.write(observed_generation=2)
    with pytest.raises(Conflict):
        await scene.writer.write(job, JobStatus(observed_generation=3), scene.now, on_written=lambda body: None)


async def test_a_job_that_is_gone_is_told_as_such() -> None:
    scene = Scene()
    job = scene.job()
    scene.api.remove(JOBS, "team-a", "job-0")
    with pytest.raises(NotFound):
        await scene.writer.write(job, JobStatus(observed_generation=3), scene.now, on_written=lambda body: None)


async def test_the_answer_is_handed_on_and_what_is_forgotten_starts_afresh() -> None:
    scene = Scene()
    taken: list = []
    await scene.writer.write(scene.job(), JobStatus(observed_generation=2), scene.now, on_written=taken.append)
    assert taken[0]["status"] == {"observedGeneration": 2, "conditions": [], "attempts": []}
    scene.writer.forget("uid-0")
    assert await scene.progress(1) is None


async def test_while_the_api_server_wants_us_to_wait_nothing_is_sent_and_then_what_is_true_then() -> None:
    scene = Scene(jobs=2)

    async def limited(*_: object, **__: object) -> None:
        raise TooMany("not now", status=429, retry_after=5.0)

    scene.api.patch_status, served = limited, scene.api.patch_status
    with pytest.raises(TooMany):
        await scene.progress(1)
    scene.api.patch_status = served
    scene.wait(2)
    for number in (0, 1):
        with pytest.raises(TooMany) as held:
            await scene.write(number, observed_generation=2)
        assert held.value.retry_after == 3
    scene.wait(3)
    assert await scene.progress(2) is None, "it has not used up its turn"
    assert (scene.writes, scene.job().status.progress.step) == (1, 2)


class GoneMeanwhile(FakeKubeApi):
    """A job is deleted while its status is on its way to an API server that wants us to wait."""

    writer: StatusWriter

    async def patch_status(self, *args: object, **more: object) -> dict[str, object]:
        self.writer.forget("uid-0")
        raise TooMany("slow down", status=429, retry_after=1.0)


async def test_a_job_that_is_forgotten_while_its_status_is_on_its_way_is_no_bug() -> None:
    scene = Scene()
    api = GoneMeanwhile()
    api.writer = scene.writer = StatusWriter(api, progress_seconds=10)
    with pytest.raises(TooMany):
        await scene.progress(1)
