"""What agents say: what is news, what is not, and what a hostile pod may say without harm."""

import re
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import Phase as Phase_
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.protocol import (
    AgentState,
    Checkpoint,
    Evaluation,
    Exit,
    Heartbeat,
    Memory,
    Metric,
    Model,
    Pace,
    Phase,
    Progress,
    Report,
    Resumed,
    ResumeSource,
    Saves,
    Stalled,
    from_wire,
    to_wire,
)
from finetune_api.status import JobStatus
from finetune_operator.jobserver.plausible import check_plausible
from finetune_operator.jobserver.reports import Reports
from tests.operator.documents import NOON
from tests.operator.story import Story, idle_report

FIRST = idle_report("pod-1", 0)


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self):
        return self.now


NEWS = {
    "the same again is no news": ({}, False),
    "a step of a heartbeat is no news": ({"heartbeat": Heartbeat(Phase.TRAINING, 8)}, False),
    "a phase is": ({"heartbeat": Heartbeat(Phase.EVALUATING, 7)}, True),
    "progress is": ({"progress": Progress(step=8)}, True),
    "an evaluation is": ({"evaluation": Evaluation(step=8)}, True),
    "a checkpoint is": ({"checkpoint": Checkpoint(8, "s3://x", 1, "2026-01-01T12:00:00Z")}, True),
    "how saving goes is": ({"saves": Saves(saving_step=8)}, True),
    "where a generation started is": ({"resumed": Resumed(8, ResumeSource.STORAGE)}, True),
    "a model is": ({"model": Model("s3://x")}, True),
    "another state is": ({"state": AgentState.RUNNING}, True),
    "another generation is": ({"generation": 2}, True),
    "that all workers are silent is": ({"stalled": Stalled(0, Phase.TRAINING, 7, 60.0)}, True),
    "how fast a rank is is no news": ({"paces": [Pace(0, 1.0, 0.5)]}, False),
    "an exit is": ({"exits": [Exit(1, 0, 1)]}, True),
    "another instance of the agent is": ({"instance": "second"}, True),
}


@pytest.mark.parametrize(("change", "is_news"), NEWS.values(), ids=NEWS.keys())
def test_what_is_news(change: dict, is_news: bool) -> None:
    reports = Reports(Clock())
    first = replace(FIRST, heartbeat=Heartbeat(Phase.TRAINING, 7))
    assert reports.hear(first)
    assert reports.hear(replace(first, **change)) == is_news
    assert reports.heard["pod-1"].report == replace(first, **change), "the newest is kept, news or not"


def test_since_when_an_agent_says_the_same_counts_from_its_last_change_of_state() -> None:
    clock = Clock()
    reports = Reports(clock)
    reports.hear(FIRST)
    clock.now += timedelta(seconds=5)
    reports.hear(replace(FIRST, progress=Progress(step=1)))
    assert (reports.heard["pod-1"].since, reports.heard["pod-1"].at) == (NOON, clock.now)
    reports.hear(replace(FIRST, state=AgentState.FAILED))
    assert reports.heard["pod-1"].since == clock.now


def test_pods_that_are_gone_are_forgotten() -> None:
    reports = Reports(Clock())
    reports.hear(FIRST)
    reports.hear(replace(FIRST, pod_uid="pod-2"))
    reports.keep_only({"pod-2", "pod-3"})
    assert reports.heard.keys() == {"pod-2"}


# Who is heard, and since when anybody is.


def test_questions_count_as_hearing_an_agent_and_are_no_news() -> None:
    clock = Clock()
    reports = Reports(clock)
    reports.hear(FIRST)
    clock.now += timedelta(seconds=12)
    assert not reports.hear_question("pod-1")
    assert (reports.heard["pod-1"].at, reports.heard["pod-1"].since) == (clock.now, NOON)
    assert reports.hearing.at == clock.now


def test_a_question_of_an_agent_that_never_reported_only_shows_that_somebody_is_there() -> None:
    clock = Clock()
    reports = Reports(clock)
    clock.now += timedelta(seconds=5)
    assert not reports.hear_question("pod-1")
    assert (dict(reports.heard), reports.hearing.at) == ({}, clock.now)


def test_an_agent_that_is_back_is_news_though_it_says_the_same() -> None:
    clock = Clock()
    reports = Reports(clock)
    reports.hear(FIRST)
    for say, late in ((lambda: reports.hear(FIRST), 15.1), (lambda: reports.hear_question("pod-1"), 15.1)):
        clock.now += timedelta(seconds=15)
        assert not say()
        clock.now += timedelta(seconds=late)
        assert say()


def test_since_when_an_agent_is_heard_without_a_gap_counts_from_when_it_was_back() -> None:
    clock = Clock()
    reports = Reports(clock)
    reports.hear(FIRST)
    for back in (lambda: reports.hear(FIRST), lambda: reports.hear_question("pod-1")):
        clock.now += timedelta(seconds=60)
        back()
        returned = clock.now
        clock.now += timedelta(seconds=10)
        reports.hear(replace(FIRST, generation=1))
        assert reports.heard["pod-1"].steady_since == returned


def test_what_was_heard_before_the_clock_was_set_back_was_heard_no_later_than_now() -> None:
    clock = Clock()
    reports = Reports(clock)
    reports.hear(FIRST)
    reports.hear(replace(FIRST, pod_uid="pod-2"))
    clock.now -= timedelta(hours=1)
    reports.hear_question("pod-1")
    clock.now += timedelta(seconds=40)
    reports.hear_question("pod-1")
    assert (clock.now - reports.heard["pod-2"].at).total_seconds() == 40, "it is silent, and that is seen"
    assert reports.hearing.since <= clock.now


def test_an_operator_that_heard_nobody_for_a_while_begins_to_hear_anew() -> None:
    clock = Clock()
    reports = Reports(clock)
    for gap in (10, 15, 14):
        clock.now += timedelta(seconds=gap)
        reports.hear(FIRST)
    assert (reports.hearing.since, reports.hearing.at) == (NOON, clock.now)
    clock.now += timedelta(seconds=16)
    reports.hear_question("pod-2")
    assert reports.hearing.since == clock.now
    clock.now += timedelta(seconds=1)
    reports.start_listening()
    assert reports.hearing.since == clock.now


def test_when_a_step_was_done_and_how_long_it_took_is_remembered() -> None:
    clock = Clock()
    reports = Reports(clock)
    seen = []
    for wait, step in ((0, 1), (2, 1), (3, 2), (2, 2), (4, 9), (2, 9)):
        clock.now += timedelta(seconds=wait)
        reports.hear(replace(FIRST, generation=1, heartbeat=Heartbeat(Phase.TRAINING, step)))
        heard = reports.heard["pod-1"]
        seen.append(((heard.step_at - NOON).total_seconds() if heard.step_at else None, heard.step_seconds))
    assert seen == [(None, 0), (None, 0), (5, 0), (5, 0), (11, 6), (11, 6)]
    reports.hear(replace(FIRST, generation=2, heartbeat=Heartbeat(Phase.TRAINING, 9)))
    assert reports.heard["pod-1"].step_at is None, "another generation"


# Whatever a pod says, its job goes on.

integers = st.integers(0, 2**31 - 1) | st.integers(-(2**70), 2**70)
floats = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([1.7976931348623157e308, 5e-324, -1e300])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.just("x" * 2000)
times = texts | st.sampled_from(
    [
        "2026-01-01T00:00:00Z",
        "2026-01-01T00:00:00.123456789+23:59",
        "1970-01-01T00:00:00+14:00",
        "9998-12-31T23:59:59-23:59",
        "9999-12-31T23:59:59-23:59",
        "0001-01-01T00:00:00+23:59",
        "2026-02-30T00:00:00Z",
        "2026-01-01T00:00:00",
        "2026-01-01",
        "now",
    ]
)
hostile = st.builds(
    Report,
    pod_uid=st.just("pod-1"),
    instance=texts,
    agent_version=texts,
    generation=st.just(1) | integers,
    state=st.sampled_from(AgentState),
    address=texts,
    port=st.integers(1, 65535) | integers,
    heartbeat=st.none() | st.builds(Heartbeat, st.sampled_from(Phase), integers),
    progress=st.none() | st.builds(Progress, integers, st.none() | integers, *[st.none() | floats] * 6),
    evaluation=st.none() | st.builds(Evaluation, integers, st.lists(st.builds(Metric, texts, floats), max_size=40)),
    checkpoint=st.none() | st.builds(Checkpoint, integers, texts, integers, times),
    saves=st.none()
    | st.builds(
        Saves,
        st.none() | integers,
        st.none() | times,
        integers,
        st.none() | times,
        texts,
        texts,
        *[st.none() | floats] * 3,
    ),
    resumed=st.none() | st.builds(Resumed, integers, st.sampled_from(ResumeSource), texts, integers, integers),
    model=st.none() | st.builds(Model, texts),
    exits=st.lists(
        st.builds(Exit, st.just(1) | integers, integers, st.none() | integers, st.none() | integers, texts, texts),
        max_size=4,
    ),
)


@settings(max_examples=100, deadline=None, phases=[Phase_.explicit, Phase_.reuse, Phase_.generate])
@given(hostile, st.booleans())
def test_no_report_of_a_pod_can_keep_its_job_from_being_planned_or_its_status_from_being_stored(
    report: Report, in_time: bool
) -> None:
    assert from_wire(Report, to_wire(report)) == report, "it passes the border"
    try:
        check_plausible(report)
    except ValueError:
        return  # 400
    story = Story()
    story.go()
    story.pods_start()
    if not in_time:
        story.go()
    reports = Reports(lambda: NOON)
    reports.hear(report)
    story.heard["pod-1"] = reports.heard["pod-1"]
    for _ in range(3):
        story.wait(2)
        story.go()
        status = story.job.status.to_wire()
        JobStatus.model_validate(status)
        check_stored(status)


def check_stored(status: dict) -> None:
    """What the schema of the CRD says beyond pydantic's types: int64, keys of lists, formats."""

    def numbers(value):
        if isinstance(value, dict):
            for inner in value.values():
                yield from numbers(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from numbers(inner)
        elif isinstance(value, int):
            yield value

    assert all(-(2**63) <= number < 2**63 for number in numbers(status))
    for name, value in texts_of(status):
        if name.endswith(("Time", "Since", "Start")):
            assert re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", value), (name, value)
    metrics = [metric["name"] for metric in (status.get("evaluation") or {}).get("metrics", ())]
    assert len(metrics) == len(set(metrics))


def texts_of(value, name=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from texts_of(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner, name)
    elif isinstance(value, str):
        yield name, value


IMPLAUSIBLE = {
    "a time that is none": ({"saves": Saves(saving_since="now")}, "$.saves.saving_since: must be a time"),
    "a time without a zone": (
        {"saves": Saves(failing_since="2026-01-01T00:00:00")},
        "$.saves.failing_since: must be a time",
    ),
    "a commit on a day that is none": (
        {"checkpoint": Checkpoint(8, "s3://x", 1, "2026-02-30T12:00:00Z")},
        "$.checkpoint.commit_time: must be a time",
    ),
    "a silence without an end": (
        {"stalled": Stalled(0, Phase.TRAINING, 1, 1e300)},
        "$.stalled.silent_seconds: out of range",
    ),
    "a rank that takes less than nothing": ({"paces": [Pace(0, 1.0, -1.0)]}, "$.paces[0].busy_seconds: out of range"),
    "more memory than there is": (
        {"exits": [Exit(1, 0, None, 9, memory=Memory(10**400))]},
        "$.exits[0].memory.limit_bytes: out of range",
    ),
    "a stall of less than nothing": ({"saves": Saves(stall_seconds=-0.1)}, "$.saves.stall_seconds: out of range"),
    "a commit that took for ever": ({"saves": Saves(commit_seconds=1e300)}, "$.saves.commit_seconds: out of range"),
    "an interval that no integer holds": (
        {"saves": Saves(recommended_interval_seconds=1e18)},
        "$.saves.recommended_interval_seconds: out of range",
    ),
    "fewer saves put off than none": ({"saves": Saves(put_off=-1)}, "$.saves.put_off: out of range"),
    "a start before the first step": ({"resumed": Resumed(-1, ResumeSource.START)}, "$.resumed.step: out of range"),
    "more samples skipped than there are": (
        {"resumed": Resumed(1, ResumeSource.START, skipped_samples=2**60)},
        "$.resumed.skipped_samples: out of range",
    ),
    "a message without end": ({"saves": Saves(message="x" * 2049)}, "$.saves.message: longer than"),
}


@pytest.mark.parametrize(("change", "why"), IMPLAUSIBLE.values(), ids=IMPLAUSIBLE.keys())
def test_what_status_cannot_hold_is_refused_by_its_path(change: dict, why: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  the message is looked at
        check_plausible(replace(FIRST, **change))
    assert why in str(refusal.value)


def test_what_a_trainer_says_is_plausible() -> None:
    check_plausible(
        replace(
            FIRST,
            saves=Saves(
                50, "2026-01-01T12:00:00Z", 1, "2026-01-01T11:59:59.5+00:00", "NoPermission", "403", 0.1, 7.0, 42.0
            ),
            resumed=Resumed(0, ResumeSource.START),
            checkpoint=Checkpoint(8, "s3://x", 1, "2026-01-01T12:00:00Z"),
        )
    )


COMMITTED = [Checkpoint(step, "s3://x", 1, "2026-01-01T12:00:00Z") for step in (5, 8)]
HELD_BACK = {
    "of the same instance": replace(FIRST, number=1, checkpoint=COMMITTED[0]),
    "of the instance before": replace(FIRST, instance="first", number=9, checkpoint=COMMITTED[0]),
}


@pytest.mark.parametrize("late", HELD_BACK.values(), ids=HELD_BACK.keys())
def test_a_report_that_arrives_after_a_newer_one_says_nothing(late: Report) -> None:
    clock = Clock()
    reports = Reports(clock)
    newest = replace(FIRST, number=2, checkpoint=COMMITTED[1])
    reports.hear(replace(FIRST, instance="first", number=8))
    reports.hear(newest)
    clock.now += timedelta(seconds=9)
    assert not reports.hear(late)
    assert reports.heard["pod-1"].report == newest
    assert reports.heard["pod-1"].at == NOON, "what was on its way is no sign of life"


def test_an_agent_whose_predecessors_last_words_come_after_its_own_is_heard_again() -> None:
    reports = Reports(Clock())
    reports.hear(replace(FIRST, number=1))
    for number in (7, 8):
        reports.hear(replace(FIRST, instance="first", number=number))
    for number in (2, 3, 4):
        reports.hear(replace(FIRST, number=number))
    assert reports.heard["pod-1"].report == replace(FIRST, number=4)
    assert not reports.hear(replace(FIRST, instance="first", number=9))
    assert reports.heard["pod-1"].report == replace(FIRST, number=4)


def test_an_agent_that_does_not_count_its_reports_is_heard() -> None:
    reports = Reports(Clock())
    reports.hear(FIRST)
    assert reports.hear(replace(FIRST, checkpoint=COMMITTED[0]))


def test_a_pod_that_is_gone_leaves_nothing_behind() -> None:
    reports = Reports(Clock())
    reports.hear(FIRST)
    reports.hear(replace(FIRST, instance="second"))
    reports.keep_only(set())
    assert (dict(reports.heard), reports._former) == ({}, {})
