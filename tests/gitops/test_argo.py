"""Argo CD shows of a job what kstatus makes of it, and its actions change nothing but ``spec.suspend``."""

import copy
from collections.abc import Callable
from typing import Any

import lupa.lua51
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gitops import argo
from tests.operator import kstatus
from tests.operator.documents import job_body
from tests.operator.story import Story
from tests.operator.test_kstatus import LIVES

SAME = {"Current": {"Healthy", "Suspended"}, "InProgress": {"Progressing"}, "Failed": {"Degraded"}}


def as_stored(story: Story) -> dict[str, Any]:
    """Return the job as the API server would hold it."""
    body = job_body(generation=story.job.metadata.generation)
    return body | {"status": story.job.status.to_wire()}


@pytest.mark.parametrize(("story", "status"), LIVES.values(), ids=LIVES.keys())
def test_what_argo_shows_of(story: Callable[[], Story], status: str) -> None:
    told = story()
    told.go()
    job = as_stored(told)
    ready = next(condition for condition in job["status"]["conditions"] if condition["type"] == "Ready")
    shown, message = argo.health(job)
    assert shown in SAME[status]
    assert message == ready["message"]
    assert (shown == "Suspended") == (job["status"]["phase"] == "Suspended" and status == "Current")


CONDITIONS = st.lists(
    st.builds(
        lambda kind, status: {"type": kind, "status": status, "reason": "Any", "message": "any"},
        st.sampled_from(["Ready", "Reconciling", "Stalled", "Suspended", "Straggler"]),
        st.sampled_from(["True", "False", "Unknown"]),
    ),
    unique_by=lambda condition: condition["type"],
).filter(lambda conditions: any(condition["type"] == "Ready" for condition in conditions))


@given(CONDITIONS, st.integers(1, 3))
def test_argo_and_kstatus_agree_whatever_the_conditions(conditions: list[dict[str, str]], observed: int) -> None:
    job = job_body(generation=2) | {"status": {"observedGeneration": observed, "conditions": conditions}}
    shown, _ = argo.health(job)
    assert shown in SAME[kstatus.compute(job)]


@pytest.mark.parametrize("status", [{}, {"status": {}}, {"status": {"observedGeneration": 1}}], ids=str)
def test_a_job_that_nobody_has_looked_at_is_in_progress(status: dict[str, Any]) -> None:
    assert argo.health(job_body() | status)[0] == "Progressing"


OFFERED = {
    "a job that trains": ({}, {"suspend"}),
    "a job that says that it is not suspended": ({"spec": {"suspend": False}}, {"suspend"}),
    "a suspended job": ({"spec": {"suspend": True}}, {"resume"}),
    "a job without status": ({"status": None}, {"suspend"}),
    "a finished job": ({"status": {"completionTime": "2026-01-01T12:00:00Z"}}, set()),
    "a suspended job that has finished": (
        {"spec": {"suspend": True}, "status": {"completionTime": "2026-01-01T12:00:00Z"}},
        set(),
    ),
}


@pytest.mark.parametrize(("changes", "offered"), OFFERED.values(), ids=OFFERED.keys())
def test_the_actions_that_are_offered_for(changes: dict[str, Any], offered: set[str]) -> None:
    job = job_body() | {"status": {"phase": "Running"}}
    job["spec"] |= changes.get("spec", {})
    job["status"] = changes.get("status", job["status"])
    assert argo.actions(job) == offered


@pytest.mark.parametrize("program", ["return ('a'):upper()", "return string.len('a')", "return os.time()"])
def test_a_library_that_argo_does_not_give_is_missed(program: str) -> None:
    with pytest.raises(lupa.lua51.LuaError, match="attempt to index"):
        argo._run(program, {})


@pytest.mark.parametrize(("action", "suspend"), [("suspend", True), ("resume", False)])
def test_an_action_changes_suspend_and_nothing_else(action: str, suspend: bool) -> None:
    job = job_body()
    wanted = copy.deepcopy(job)
    wanted["spec"]["suspend"] = suspend
    assert argo.act(action, job) == wanted
