"""Waiting for a job: what ends it, and what it outlasts."""

from __future__ import annotations

import pytest

from finetune_client import EndedOtherwise, Goal, Jobs, NoCluster, NotFound, TimedOut
from finetune_client import jobs as jobs_module
from tests.kubectl.command import finetune
from tests.kubectl.jobs import FAILED, RUNNING, STALLED, SUCCEEDED, SUSPENDED, SUSPENDING, UNKNOWN, a_job, job_body
from tests.kubectl.stand_in import Answer, StandIn, document, refusal, watched

JOBS = "/apis/finetune.dev/v1alpha1/namespaces/team-a/finetunejobs"
JOB, WATCH = f"{JOBS}/sentiment", f"{JOBS}?watch"
MOMENTS = {
    "nothing": None,
    "stalled": STALLED,
    "running": RUNNING,
    "unknown": UNKNOWN,
    "suspending": SUSPENDING,
    "suspended": SUSPENDED,
    "succeeded": SUCCEEDED,
    "failed": FAILED,
}
REACHED = {
    Goal.COMPLETE: {"succeeded"},
    Goal.FAILED: {"failed"},
    Goal.ENDED: {"succeeded", "failed"},
    Goal.RUNNING: {"running"},
    Goal.SUSPENDED: {"suspended"},
}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs_module, "LOOK_AGAIN_SECONDS", 0.01)


def client(stand_in: StandIn) -> Jobs:
    return Jobs.connect(kubeconfig=str(stand_in.kubeconfig))


@pytest.mark.parametrize("goal", Goal)
def test_what_counts_as_reached(goal: Goal):
    assert {name for name, status in MOMENTS.items() if goal.reached(a_job(status))} == REACHED[goal]


@pytest.mark.parametrize("goal", [Goal.RUNNING, Goal.SUSPENDED])
def test_what_was_said_of_an_older_spec_does_not_count(goal: Goal):
    status = {Goal.RUNNING: RUNNING, Goal.SUSPENDED: SUSPENDED}[goal]
    assert not goal.reached(a_job(status | {"observedGeneration": 0}))


def test_it_sees_each_change_and_ends_with_the_one_that_is_waited_for(stand_in: StandIn):
    stand_in.on(JOB, document(job_body()))
    changes = [("MODIFIED", job_body(status)) for status in (STALLED, RUNNING, SUCCEEDED)]
    stand_in.on(WATCH, watched(*changes))
    phases = [job.status.phase for job in client(stand_in).progress("sentiment", Goal.COMPLETE)]
    assert phases == [None, "Pending", "Running", "Succeeded"]
    assert stand_in.asked[1][1]["resourceVersion"] == "7"


def test_a_job_that_ends_otherwise_is_not_waited_for(stand_in: StandIn):
    stand_in.on(JOB, document(job_body(FAILED)))
    with pytest.raises(EndedOtherwise, match="BadData: s3://datasets"):
        client(stand_in).wait("sentiment", Goal.COMPLETE)


def test_time_runs_out(stand_in: StandIn):
    stand_in.on(JOB, document(job_body(RUNNING)))
    stand_in.on(WATCH, Answer())
    with pytest.raises(TimedOut, match=r"is not complete after 0.9 s: Running: generation 3"):
        client(stand_in).wait("sentiment", Goal.COMPLETE, timeout_seconds=0.9)
    assert {query["timeoutSeconds"] for _, query in stand_in.asked if "watch" in query} == {"1"}


# id: how a watch may end without an answer; a look follows, and another watch
ENDS = {
    "it ends": Answer(),
    "it breaks off": Answer(200, ['{"type":'], breaks=True),
    "it ends in the middle of a line": Answer(200, ['{"type":']),
    "its version is too old": watched(("ERROR", {"code": 410})),
    "the server goes": refusal(503, "shutting down"),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_a_watch_that_ends_is_taken_up_again(end: Answer, stand_in: StandIn):
    stand_in.on(JOB, document(job_body(RUNNING)))
    stand_in.on(WATCH, end, end, watched(("MODIFIED", job_body(SUCCEEDED))))
    assert client(stand_in).wait("sentiment", Goal.COMPLETE).status.phase == "Succeeded"


def test_a_server_that_is_away_for_a_while_is_borne(stand_in: StandIn):
    away = refusal(503, "away")
    stand_in.on(JOB, document(job_body(RUNNING)), away, away, document(job_body(SUCCEEDED)))
    stand_in.on(WATCH, away)
    assert client(stand_in).wait("sentiment", Goal.COMPLETE).status.phase == "Succeeded"


def test_a_server_that_stays_away_is_not(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs_module, "PATIENCE_SECONDS", 0.1)
    stand_in.on(JOB, document(job_body(RUNNING)), refusal(503, "away"))
    stand_in.on(WATCH, refusal(503, "away"))
    with pytest.raises(NoCluster):
        client(stand_in).wait("sentiment", Goal.COMPLETE)


def test_a_server_that_is_away_at_once_is_not_waited_for(stand_in: StandIn):
    stand_in.on(JOB, refusal(503, "away"))
    with pytest.raises(NoCluster):
        client(stand_in).wait("sentiment", Goal.COMPLETE)


def test_a_job_that_is_deleted_is_not_waited_for(stand_in: StandIn):
    stand_in.on(JOB, document(job_body(RUNNING)))
    stand_in.on(WATCH, watched(("DELETED", job_body(RUNNING))))
    with pytest.raises(NotFound, match="team-a/sentiment was deleted"):
        client(stand_in).wait("sentiment", Goal.COMPLETE)


def test_another_job_of_the_same_name_is_not_the_one_that_was_waited_for(stand_in: StandIn):
    other = job_body(SUCCEEDED)
    other["metadata"]["uid"] = "another"
    stand_in.on(JOB, document(job_body(RUNNING)), document(other))
    stand_in.on(WATCH, Answer())
    with pytest.raises(NotFound, match="another one of that name"):
        client(stand_in).wait("sentiment", Goal.COMPLETE)


# id: (what becomes of the job, arguments, exit code, the end of stdout, the end of stderr)
COMMANDS = {
    "complete": (SUCCEEDED, (), 0, "team-a/sentiment is complete\n", "ends\n"),
    "failed, and waited for that": (FAILED, ("--for", "failed"), 0, "team-a/sentiment is failed\n", ""),
    "failed": (FAILED, (), 1, "", "one of negative, positive\n"),
    "not yet": (RUNNING, ("--timeout", "1s"), 3, "", "is not complete after 1 s: Running: generation 3 trains on 2 nodes\n"),
    "no time": (RUNNING, ("--timeout", "soon"), 2, "", "error: --timeout 'soon': write 30s, 10m or 2h30m\n"),
}  # fmt: skip


@pytest.mark.parametrize(("status", "arguments", "code", "stdout", "stderr"), COMMANDS.values(), ids=COMMANDS.keys())
def test_the_command_tells_by_its_exit_code(status, arguments, code, stdout, stderr, stand_in: StandIn):
    stand_in.on(JOB, document(job_body(status)))
    stand_in.on(WATCH, Answer())
    ran = finetune(stand_in.kubeconfig, "wait", "sentiment", *arguments)
    assert (ran.code, ran.stdout) == (code, stdout)
    assert ran.stderr.endswith(stderr if stderr != "ends\n" else "s3://checkpoints/model\n")


def test_off_a_terminal_there_is_a_line_only_when_something_turns(stand_in: StandIn):
    steps = [
        RUNNING | {"progress": RUNNING["progress"] | {"step": step, "percent": step // 10}}
        for step in (100, 110, 190, 200)
    ]
    stand_in.on(JOB, document(job_body(steps[0])))
    stand_in.on(WATCH, watched(*(("MODIFIED", job_body(status)) for status in [*steps, SUCCEEDED])))
    ran = finetune(stand_in.kubeconfig, "wait", "sentiment")
    lines = [line.split(", ")[:2] for line in ran.stderr.splitlines()]
    assert lines == [
        ["sentiment: Running", "100 of 330 steps"],
        ["sentiment: Running", "200 of 330 steps"],
        ["sentiment: Succeeded", "330 of 330 steps"],
    ]
