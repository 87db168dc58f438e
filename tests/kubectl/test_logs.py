"""Which lines are shown, under which rank, and in which order; of pods that restart, are not there yet, or are gone."""

from __future__ import annotations

from datetime import datetime

import pytest

from finetune_cli.jobs import reading
from finetune_client import ClientError
from finetune_client.logs import EVER, NEVER, Pod, Span, parse_line, span_of
from tests.kubectl.command import finetune
from tests.kubectl.jobs import RUNNING, SUCCEEDED, UID, a_job, gang, job_body
from tests.kubectl.stand_in import Answer, StandIn, document, listing, refusal

JOB = "/apis/finetune.dev/v1alpha1/namespaces/team-a/finetunejobs/sentiment"
PODS = "/api/v1/namespaces/team-a/pods"
POD = Pod("a", "uid-a", 0, "", restarted=False)


def pod(name: str, rank: int, *, restarts: int = 0) -> dict:
    return {
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "creationTimestamp": "2026-01-01T11:00:00Z",
            "labels": {"finetune.dev/rank": str(rank)},
        },
        "status": {"containerStatuses": [{"name": "trainer", "restartCount": restarts}]},
    }


def log(*lines: str) -> Answer:
    """Return a pod's log; each line begins with a time of the day."""
    return Answer(200, [f"2026-01-01T{line}\n" for line in lines])


@pytest.fixture
def job(stand_in: StandIn) -> StandIn:
    """Two pods, one rank each; the gang is in its third attempt."""
    stand_in.on(JOB, document(job_body(RUNNING)))
    stand_in.on(PODS, listing(pod("b", 1), pod("a", 0)))
    stand_in.on(
        f"{PODS}/a/log",
        log("11:05:00.1Z [rank 0] one", "11:25:00.123456789Z the agent says", "11:45:00Z [rank 0] three", "11:46:00Z [rank 0] four"),
    )  # fmt: skip
    stand_in.on(
        f"{PODS}/b/log", log("13:05:00.2+02:00 [rank 1] one", "11:24:59Z [rank 1] two", "11:45:00.5Z [rank 1]  three")
    )
    return stand_in


def test_all_ranks_in_the_order_of_their_times(job: StandIn):
    ran = finetune(job.kubeconfig, "logs", "sentiment")
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == [
        "[rank 0] one",
        "[rank 1] one",
        "[rank 1] two",
        "[node 0] the agent says",
        "[rank 0] three",
        "[rank 1]  three",
        "[rank 0] four",
    ]
    assert job.asked[1] == (PODS, {"limit": "500", "labelSelector": f"finetune.dev/job-uid={UID}"})
    assert job.asked[2] == (f"{PODS}/a/log", {"container": "trainer", "timestamps": "true"})


def test_one_rank_without_a_mark(job: StandIn):
    assert finetune(job.kubeconfig, "logs", "sentiment", "--rank", "1").stdout == "one\ntwo\n three\n"


def test_one_attempt_and_why_it_ended(job: StandIn):
    ran = finetune(job.kubeconfig, "logs", "sentiment", "--attempt", "2")
    assert ran.stdout.splitlines() == ["[rank 1] two", "[node 0] the agent says"]
    assert ran.stderr.startswith("attempt 2 ended: WorkerFailed: rank 0 ended with exit code 1")


def test_the_newest_lines_of_each_pod_that_are_wanted(job: StandIn):
    assert finetune(job.kubeconfig, "logs", "sentiment", "--tail", "1").stdout == "[rank 1]  three\n[rank 0] four\n"
    assert finetune(job.kubeconfig, "logs", "sentiment", "--tail", "1", "--rank", "0").stdout == "four\n"


def test_an_attempt_that_is_not_known(job: StandIn):
    ran = finetune(job.kubeconfig, "logs", "sentiment", "--attempt", "9")
    assert (ran.code, ran.stderr) == (
        2,
        "error: sentiment: attempt 9 is not among those that status tells of: 1, 2, 3\n",
    )


def test_what_a_container_said_before_it_was_started_again_comes_first(job: StandIn):
    job.on(PODS, listing(pod("a", 0, restarts=1)))
    job.on(f"{PODS}/a/log?previous", log("11:01:00Z [rank 0] before"))
    assert finetune(job.kubeconfig, "logs", "sentiment", "--rank", "0").stdout.splitlines()[:2] == ["before", "one"]


def test_a_pod_whose_container_has_not_started_is_told_and_the_others_are_read(job: StandIn):
    job.on(f"{PODS}/a/log", refusal(400, 'container "trainer" in pod "a" is waiting to start: PodInitializing'))
    ran = finetune(job.kubeconfig, "logs", "sentiment")
    assert ran.code == 0
    assert ran.stdout.splitlines() == ["[rank 1] one", "[rank 1] two", "[rank 1]  three"]
    assert ran.stderr == 'pod a has no log: container "trainer" in pod "a" is waiting to start: PodInitializing\n'


def test_a_job_without_pods_says_where_to_look(job: StandIn):
    job.on(PODS, listing())
    ran = finetune(job.kubeconfig, "logs", "sentiment")
    assert (ran.code, ran.stdout) == (2, "")
    assert "logs go with them; status tells how its attempts ended" in ran.stderr


def test_a_log_that_breaks_off_is_an_error(job: StandIn):
    job.on(f"{PODS}/b/log", Answer(200, ["2026-01-01T11:00:00Z [rank 1] half\n"], breaks=True))
    ran = finetune(job.kubeconfig, "logs", "sentiment")
    assert (ran.code, ran.stdout.splitlines()[0]) == (2, "[rank 1] half")
    assert "does not answer" in ran.stderr


def test_a_spare_has_the_rank_that_it_has_taken():
    members = [{"rank": 1, "pod": "s", "uid": "uid-s"}]
    assert Pod.read(pod("s", 2), a_job(RUNNING | {"gang": gang(standIns=members)})).node_rank == 1
    assert Pod.read(pod("s", 2), a_job(RUNNING)).node_rank == 2


@pytest.mark.parametrize(
    ("line", "rank", "text"),
    [
        ("2026-01-01T11:00:00Z [rank 12] loss 0.5", 12, "loss 0.5"),
        ("2026-01-01T11:00:00Z [rank 12]loss", None, "[rank 12]loss"),
        ("2026-01-01T11:00:00Z ", None, ""),
        ("failed to try resolving symlinks", None, "failed to try resolving symlinks"),
    ],
)
def test_lines_as_they_come(line: str, rank: int | None, text: str):
    parsed = parse_line(line, POD)
    assert (parsed.rank, parsed.text) == (rank, text)


def at(time: str) -> datetime:
    return datetime.fromisoformat(f"2026-01-01T{time}Z")


def test_an_attempt_lasts_from_its_start_until_the_next_ones():
    job = a_job(RUNNING)
    assert span_of(job, 1) == Span(at("11:01:00"), at("11:21:00"))
    assert span_of(job, 2) == Span(at("11:21:00"), at("11:40:00"))
    assert span_of(job, 3) == Span(at("11:40:00"), NEVER)


def test_an_attempt_that_never_was_complete_lasts_from_the_end_of_the_one_before():
    attempts = [
        {"generation": 4, "endTime": "2026-01-01T11:10:00Z", "reason": "GaveWay"},
        {"generation": 5, "endTime": "2026-01-01T11:30:00Z", "reason": "GaveWay"},
    ]
    job = a_job(RUNNING | {"attempts": attempts, "gang": gang(6)})
    assert span_of(job, 4) == Span(EVER, at("11:40:00"))
    assert span_of(job, 5) == Span(at("11:10:00"), at("11:40:00"))
    with pytest.raises(ClientError, match="attempt 1 is not among"):
        span_of(job, 1)


@pytest.fixture
def followed(job: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The same job, which has ended when it is looked at the third time."""
    monkeypatch.setattr(reading, "LOOK_AGAIN_SECONDS", 0.05)
    running, ended = document(job_body(RUNNING)), document(job_body(SUCCEEDED))
    job.on(JOB, running, running, running, ended)
    return job


def follow(stand_in: StandIn, *arguments: str) -> list[str]:
    ran = finetune(stand_in.kubeconfig, "logs", "sentiment", "--follow", *arguments)
    assert (ran.code, ran.stderr) == (0, "")
    return ran.stdout.splitlines()


def test_followed_a_log_that_breaks_off_is_taken_up_behind_its_last_line(followed: StandIn):
    first = ["2026-01-01T11:00:01Z [rank 0] one\n", "2026-01-01T11:00:02Z [rank 0] two\n"]
    followed.on(PODS, listing(pod("a", 0)))
    followed.on(f"{PODS}/a/log", Answer(200, first, breaks=True), log("11:00:01Z [rank 0] one", "11:00:02Z [rank 0] two", "11:00:03Z [rank 0] three"))  # fmt: skip
    assert follow(followed, "--rank", "0") == ["one", "two", "three"]


def test_followed_a_pod_that_comes_later_or_starts_later_is_read_too(followed: StandIn):
    followed.on(PODS, listing(pod("a", 0)), listing(pod("a", 0), pod("c", 1)))
    followed.on(f"{PODS}/a/log", refusal(400, "is waiting to start"), log("11:00:01Z [rank 0] late"))
    followed.on(f"{PODS}/c/log", log("11:00:02Z [rank 1] new"))
    assert sorted(follow(followed)) == ["[rank 0] late", "[rank 1] new"]


def test_followed_a_job_that_is_deleted_is_told(followed: StandIn):
    followed.on(JOB, document(job_body(RUNNING)), document(job_body(RUNNING)), refusal(404, "gone", name="sentiment"))
    followed.on(PODS, listing())
    followed.on(JOB.removesuffix("/sentiment"), listing())
    ran = finetune(followed.kubeconfig, "logs", "sentiment", "--follow")
    assert ran.code == 2
    assert "there is no job 'sentiment'" in ran.stderr


def test_followed_who_may_not_read_is_told_at_once(followed: StandIn):
    followed.on(PODS, listing(pod("a", 0)))
    followed.on(f"{PODS}/a/log", refusal(403, "cannot get resource pods/log"))
    ran = finetune(followed.kubeconfig, "logs", "sentiment", "--follow")
    assert (ran.code, ran.stderr) == (2, "error: cannot get resource pods/log\n")
