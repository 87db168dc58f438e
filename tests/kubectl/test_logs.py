"""Which lines are shown, under which rank, and in which order; of pods that restart, are not there yet, or are gone."""

from __future__ import annotations

import pytest

from finetune_cli.jobs import reading
from finetune_client.logs import Pod, chosen, parse_line
from tests.kubectl.command import finetune
from tests.kubectl.jobs import RUNNING, SUCCEEDED, UID, a_job, gang, job_body
from tests.kubectl.stand_in import Answer, StandIn, document, listing, refusal

JOB = "/apis/finetune.dev/v1alpha1/namespaces/team-a/finetunejobs/sentiment"
PODS = "/api/v1/namespaces/team-a/pods"
AGENT = "finetune-agent: generation"
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
        log("11:05:00.1Z [rank 0] one", f"11:25:00.123456789Z {AGENT} 2 is Running", "11:26:00Z [rank 0] two", "11:46:00Z [rank 0] three"),
    )  # fmt: skip
    stand_in.on(
        f"{PODS}/b/log",
        log(f"11:00:01Z {AGENT} 1 is Running", "13:05:00.2+02:00 [rank 1] one", f"11:24:59Z {AGENT} 2 is Running", "11:24:59.5Z [rank 1]  two", f"11:45:00.5Z {AGENT} 3 is Running"),
    )  # fmt: skip
    return stand_in


def test_all_ranks_in_the_order_of_their_times(job: StandIn):
    ran = finetune(job.kubeconfig, "logs", "sentiment")
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == [
        f"[node 1] {AGENT} 1 is Running",
        "[rank 0] one",
        "[rank 1] one",
        f"[node 1] {AGENT} 2 is Running",
        "[rank 1]  two",
        f"[node 0] {AGENT} 2 is Running",
        "[rank 0] two",
        f"[node 1] {AGENT} 3 is Running",
        "[rank 0] three",
    ]
    assert job.asked[1] == (PODS, {"limit": "500", "labelSelector": f"finetune.dev/job-uid={UID}"})
    assert job.asked[2] == (f"{PODS}/a/log", {"container": "trainer", "timestamps": "true"})


def test_one_rank_without_a_mark(job: StandIn):
    assert finetune(job.kubeconfig, "logs", "sentiment", "--rank", "1").stdout == "one\n two\n"


def test_one_attempt_and_why_it_ended(job: StandIn):
    ran = finetune(job.kubeconfig, "logs", "sentiment", "--attempt", "2", "--rank", "1")
    assert ran.stdout == " two\n"
    assert ran.stderr.startswith("attempt 2 ended: WorkerFailed: rank 0 ended with exit code 1")


def test_an_attempt_of_which_nothing_is_left(job: StandIn):
    ran = finetune(job.kubeconfig, "logs", "sentiment", "--attempt", "9")
    assert (ran.code, ran.stdout) == (0, "")
    assert ran.stderr == "nothing of it is left in the pods that are there\n"


def test_the_newest_lines_of_each_pod_that_are_wanted(job: StandIn):
    ran = finetune(job.kubeconfig, "logs", "sentiment", "--tail", "1")
    assert ran.stdout.splitlines() == [f"[node 1] {AGENT} 3 is Running", "[rank 0] three"]
    assert finetune(job.kubeconfig, "logs", "sentiment", "--tail", "1", "--rank", "1").stdout == " two\n"


def test_what_a_container_said_before_it_was_started_again_comes_first(job: StandIn):
    job.on(PODS, listing(pod("a", 0, restarts=1)))
    job.on(f"{PODS}/a/log?previous", log("11:01:00Z [rank 0] before"))
    assert finetune(job.kubeconfig, "logs", "sentiment", "--rank", "0").stdout.splitlines()[:2] == ["before", "one"]


def test_what_it_said_before_that_may_be_gone(job: StandIn):
    job.on(PODS, listing(pod("a", 0, restarts=1)))
    job.on(f"{PODS}/a/log?previous", refusal(400, 'previous terminated container "trainer" in pod "a" not found'))
    ran = finetune(job.kubeconfig, "logs", "sentiment", "--rank", "0")
    assert (ran.code, ran.stdout.splitlines()[:1]) == (0, ["one"])


def test_a_pod_whose_container_has_not_started_is_told_and_the_others_are_read(job: StandIn):
    job.on(f"{PODS}/a/log", refusal(400, 'container "trainer" in pod "a" is waiting to start: PodInitializing'))
    ran = finetune(job.kubeconfig, "logs", "sentiment")
    assert ran.code == 0
    assert [line for line in ran.stdout.splitlines() if "rank" in line] == ["[rank 1] one", "[rank 1]  two"]
    assert ran.stderr == 'pod a has no log: container "trainer" in pod "a" is waiting to start: PodInitializing\n'


def test_a_job_without_pods_says_where_to_look(job: StandIn):
    job.on(PODS, listing())
    ran = finetune(job.kubeconfig, "logs", "sentiment")
    assert (ran.code, ran.stdout) == (2, "")
    assert "logs go with them; status tells how its attempts ended" in ran.stderr


# id: the log of a pod that cannot be read whole
UNREADABLE = {
    "it breaks off": Answer(200, ["2026-01-01T11:00:00Z [rank 1] half\n"], breaks=True),
    "its node is lost": refusal(500, "Get https://node2:10250/containerLogs: no route to host"),
}


@pytest.mark.parametrize("answer", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_log_that_cannot_be_read_whole_is_an_error_and_hides_no_other(answer: Answer, job: StandIn):
    job.on(f"{PODS}/b/log", answer)
    ran = finetune(job.kubeconfig, "logs", "sentiment")
    assert ran.code == 2
    assert [line for line in ran.stdout.splitlines() if "rank 0" in line] == [
        "[rank 0] one",
        "[rank 0] two",
        "[rank 0] three",
    ]
    assert ran.stderr.startswith("error: not all could be read: pod b: the API server")


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


def generations(*texts: str, attempt: int) -> list[str]:
    lines = [parse_line(f"2026-01-01T11:00:00Z {text}", POD) for text in texts]
    return [line.text for line in chosen(lines, rank=None, attempt=attempt)]


# id: (the log of a pod, by attempt what of it belongs there)
ATTEMPTS = {
    "what comes before the first belongs to it": (
        ["hello", f"{AGENT} 2 is Running", "[rank 0] a", f"{AGENT} 2 is Failed", "[rank 0] z", f"{AGENT} 3 is Running", "[rank 0] b"],
        {1: [], 2: ["hello", f"{AGENT} 2 is Running", "a", f"{AGENT} 2 is Failed", "z"], 3: [f"{AGENT} 3 is Running", "b"]},
    ),
    "a worker that speaks like an agent is none": (
        [f"{AGENT} 1 is Running", "[rank 0] generation 7 is Running", "[rank 0] a"],
        {1: [f"{AGENT} 1 is Running", "generation 7 is Running", "a"], 7: []},
    ),
    "a pod that never began has none": (["hello", "waiting"], {1: []}),
}  # fmt: skip


@pytest.mark.parametrize(("texts", "by_attempt"), ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_an_attempt_is_what_follows_the_agents_word_that_it_begins(texts: list[str], by_attempt: dict[int, list[str]]):
    assert {attempt: generations(*texts, attempt=attempt) for attempt in by_attempt} == by_attempt


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


def test_followed_what_breaks_off_when_the_job_has_ended_is_taken_up_once_more(job: StandIn):
    job.on(JOB, document(job_body(SUCCEEDED)))
    job.on(PODS, listing(pod("a", 0), pod("b", 1)))
    job.on(f"{PODS}/a/log", Answer(200, ["2026-01-01T11:00:01Z [rank 0] one\n"], breaks=True), log("11:00:01Z [rank 0] one", "11:00:02Z [rank 0] two"))  # fmt: skip
    job.on(f"{PODS}/b/log", refusal(400, "is waiting to start"))
    assert follow(job) == ["[rank 0] one", "[rank 0] two"]


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


@pytest.mark.parametrize("of", [("--rank", "0"), ("--attempt", "1")], ids=["a rank", "an attempt"])
def test_followed_the_newest_lines_are_those_of_all(job: StandIn, of: tuple[str, str]):
    """The API server counts them, before one can tell whose they are."""
    ran = finetune(job.kubeconfig, "logs", "sentiment", "--follow", "--tail", "5", *of)
    assert ran.code == 2
    assert "--tail counts the lines of all ranks" in ran.stderr
