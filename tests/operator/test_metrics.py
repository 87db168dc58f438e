"""What Prometheus is told: its names and labels, frozen, and that the numbers say what happened."""

import logging
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from finetune_api.protocol import Saves
from finetune_operator.cache import Cache
from finetune_operator.jobserver.reports import Reports
from finetune_operator.kube.client import Answer
from finetune_operator.leader import Lease
from finetune_operator.observability.api_answers import ApiAnswers
from finetune_operator.observability.fleet import Fleet
from finetune_operator.observability.history import History
from finetune_operator.observability.metrics import Metrics
from finetune_operator.observability.vitals import Vitals
from finetune_operator.plan.observation import Plan
from tests.operator.documents import NOON, RECIPE, SCRIPT, job_body
from tests.operator.story import Story, idle_report
from tests.operator.test_plan_goodput import begins, reaches

PREFIX = "finetune_operator_"


class Counted(Story):
    """A story whose statuses are taken in as they are written."""

    def __init__(self, spec: str = "", *, base: str = RECIPE, nodes: int = 2) -> None:
        super().__init__(spec, base=base, nodes=nodes)
        self.metrics = Metrics()
        self.history = History(self.metrics)

    def go(self) -> Plan:
        before = self.job
        plan = super().go()
        self.history.take(before, self.job.status, self.now)
        return plan

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(PREFIX + name, labels)

    def recoveries(self) -> tuple[float | None, float | None]:
        return self.value("recovery_seconds_count"), self.value("recovery_seconds_sum")


def trains(base: str = RECIPE) -> Counted:
    story = Counted(base=base)
    story.go()
    story.pods_start()
    story.go()
    story.workers_train()
    story.go()
    return story


def ends(story: Story, signal: int = 11) -> None:
    for rank in (0, 1):
        story.worker_ends(rank, signal=signal)
    story.go()


def goes_on(story: Story, after: float) -> None:
    story.wait(after)
    story.workers_train()
    story.go()


# Restarts and recoveries


def test_a_restart_is_counted_once_by_its_reason_and_its_recovery_timed() -> None:
    story = trains()
    assert story.recoveries() == (0, 0)
    ends(story)
    story.go()
    assert story.phase == "Recovering"
    assert story.value("restarts_total", reason="WorkerKilled") == 1
    assert story.recoveries() == (0, 0), "it is not over"
    goes_on(story, after=2.5)
    assert (story.phase, story.recoveries()) == ("Running", (1, 2.5))
    story.wait(300)
    ends(story)
    goes_on(story, after=1)
    assert story.value("restarts_total", reason="WorkerKilled") == 2
    assert story.recoveries() == (2, 3.5)


def test_the_first_restart_for_a_reason_is_an_increase() -> None:
    """Of a series that appears with it, ``increase()`` would be 0."""
    told = generate_latest(Metrics().registry).decode()
    for reason in ("WorkerKilled", "NodeLost", "Hang", "NotStarted"):
        assert f'finetune_operator_restarts_total{{reason="{reason}"}} 0.0' in told


def test_a_start_is_no_recovery() -> None:
    assert trains().recoveries() == (0, 0)


def test_a_recovery_that_began_under_another_process_is_not_timed_and_the_next_is() -> None:
    story = trains()
    ends(story)
    story.history = History(story.metrics)
    goes_on(story, after=20)
    assert (story.phase, story.recoveries()) == ("Running", (0, 0))
    story.wait(300)
    ends(story)
    goes_on(story, after=4)
    assert story.recoveries() == (1, 4)


def test_a_recovery_that_is_broken_off_is_not_timed() -> None:
    story = trains()
    ends(story)
    story.edit(suspend=True)
    story.go()
    story.vanish_all()
    story.go()
    story.wait(3600)
    story.edit(suspend=False)
    story.go()
    story.pods_start()
    story.go()
    goes_on(story, after=1)
    assert story.phase == "Running"
    assert (story.value("recovery_seconds_sum") or 0) < 3600


def test_lost_time_grows_by_what_status_says_and_productive_time_that_is_taken_back_is_none() -> None:
    story = trains()
    story.wait(30)
    begins(story)
    reaches(story, 100, seconds=200, stall=2.5)
    ends(story)
    story.workers_train()
    story.wait(13)
    begins(story, step=90)
    lost = story.status["goodput"]["lostSeconds"]
    assert lost["recomputation"] > 0
    for kind, seconds in lost.items():
        assert story.value("lost_seconds_total", kind=kind) == pytest.approx(seconds)
    story.report(0, saves=Saves(total_stall_seconds=None))
    story.go()
    assert story.value("lost_seconds_total", kind="startup") == lost["startup"], "looking again adds nothing"


def test_the_log_says_what_ended_and_never_in_the_words_of_a_worker(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    story = trains()
    story.worker_ends(1, exit_code=65, message="cannot read s3://bucket?password=hunter2")
    story.go()
    assert [record.getMessage() for record in caplog.records] == [
        "team-a/sentiment: Pending, was new",
        "team-a/sentiment: Starting, was Pending",
        "team-a/sentiment: Running, was Starting",
        "team-a/sentiment: generation 1 ended: BadData",
        "team-a/sentiment: Failed, was Running",
    ]
    ended = caplog.records[-2]
    assert (ended.generation, ended.rank) == (1, 1)
    assert "hunter2" in str(story.status["attempts"]), "status, which is the tenant's, has the words"


# All jobs together


def job(status: Mapping[str, Any], base: str = RECIPE) -> dict[str, Any]:
    return job_body(base=base) | {"status": dict(status)}


def conditions(**values: str) -> list[dict[str, str]]:
    return [{"type": name, "status": value} for name, value in values.items()]


def at(minutes: int) -> str:
    return f"2026-01-01T12:{minutes:02d}:00Z"


JOBS = [
    job({}),
    job({"phase": "Pending", "conditions": conditions(Stalled="True", Ready="False")}),
    job({"phase": "Running", "gang": {"startTime": at(0)}, "checkpoint": {"commitTime": at(25)}}),
    job({"phase": "Running", "gang": {"startTime": at(20)}, "conditions": conditions(CheckpointsDelayed="True")}),
    job({"phase": "Running", "gang": {"startTime": at(1)}}, base=SCRIPT),
    job({"phase": "Recovering", "gang": {"startTime": at(1)}, "conditions": conditions(Stalled="Unknown")}),
    job({"phase": "Suspended", "goodput": {"productiveSeconds": 60.0, "lostSeconds": {"startup": 20.0}}}),
    job({"phase": "Running", "goodput": {"productiveSeconds": 30.0, "lostSeconds": {"checkpoint": 10.0}}}),
    job({"phase": "Failed", "conditions": conditions(Stalled="True"), "goodput": {"productiveSeconds": 999.0}}),
]


def fleet(jobs: list[dict[str, Any]], *, leads: bool = True) -> dict[str, float]:
    collector = Fleet(jobs=lambda: jobs, leads=lambda: leads, clock=lambda: NOON + timedelta(minutes=30))
    return {
        " ".join((sample.name.removeprefix(PREFIX), *sample.labels.values())): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


def test_jobs_are_summed_up() -> None:
    assert fleet(JOBS) == {
        "jobs Suspended": 1,
        "jobs Pending": 2,
        "jobs Starting": 0,
        "jobs Running": 4,
        "jobs Recovering": 1,
        "jobs Succeeded": 0,
        "jobs Failed": 1,
        "jobs_with_condition Stalled": 1,
        "jobs_with_condition CheckpointsDelayed": 1,
        "jobs_with_condition CheckpointFallback": 0,
        "jobs_with_condition Straggler": 0,
        "oldest_checkpoint_age_seconds": 600,
        "goodput_ratio": 0.75,
    }


def test_without_jobs_there_are_zeros_and_no_goodput() -> None:
    told = fleet([])
    assert "goodput_ratio" not in told
    assert set(told.values()) == {0}


def test_only_the_leader_counts_jobs() -> None:
    assert fleet(JOBS, leads=False) == {}


def test_the_number_of_series_does_not_grow_with_the_jobs() -> None:
    assert fleet(JOBS).keys() == fleet(JOBS * 50).keys()


# The process


def test_agents_count_while_they_are_heard() -> None:
    now = [NOON]
    reports, metrics = Reports(lambda: now[0]), Metrics()
    lease, queue = Lease(), ["a job", "another"]
    Vitals(
        cache=Cache(),
        queue=queue,
        reports=reports,
        lease=lease,
        metrics=metrics,
        silent_seconds=30,
        clock=lambda: now[0],
    )

    def value(name: str) -> float | None:
        return metrics.registry.get_sample_value(PREFIX + name)

    reports.hear(idle_report("pod-1", 0))
    now[0] += timedelta(seconds=20)
    reports.hear(idle_report("pod-2", 1))
    assert value("agents_connected") == 2
    now[0] += timedelta(seconds=20)
    assert value("agents_connected") == 1
    assert (value("queue_depth"), value("leader"), value("watch_lag_seconds")) == (2, 0, 0)
    lease.prolong(lease.clock() + 60)
    assert value("leader") == 1


# The API server's answers


def test_answers_are_counted_as_rbac_names_them_and_failures_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("finetune_operator.observability.api_answers.time.monotonic", lambda: now[0])
    registry = CollectorRegistry()
    answers = ApiAnswers(registry)
    assert answers.seconds_since_failure() > 1e9, "none yet"
    for status in (200, 409, 429, 503, 0):
        answers.record(Answer("patch", "finetunejobs/status", status, 0.02))
        if status < 500 and status:
            assert answers.seconds_since_failure() > 1e9, "an answer that refuses is one"
    now[0] += 7
    assert answers.seconds_since_failure() == 7
    for code in ("200", "409", "429", "503", "none"):
        labels = {"verb": "patch", "resource": "finetunejobs/status", "code": code}
        assert registry.get_sample_value("finetune_operator_api_requests_total", labels) == 1
