"""Whatever becomes of a request is one line that says what to do, and an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_client.connection import path
from tests.kubectl.command import finetune
from tests.kubectl.jobs import RUNNING, SUCCEEDED, job_body
from tests.kubectl.stand_in import Answer, StandIn, document, listing, refusal, write_kubeconfig

JOBS = "/apis/finetune.dev/v1alpha1/namespaces/team-a/finetunejobs"
NO_PAGE = Answer(404, ["404 page not found\n"])

# id: (the answer for the job, the exit code, what is said)
ANSWERS = {
    "the cluster knows no FineTuneJobs": (NO_PAGE, 2, "the cluster has no FineTuneJobs"),
    "not logged in": (refusal(401, "Unauthorized"), 2, "log in again (401)"),
    "no right": (refusal(403, 'User "eve" cannot get resource "finetunejobs"'), 2, 'User "eve" cannot get resource'),
    "too many requests": (refusal(429, "slow down"), 2, "cannot answer now: 429 slow down"),
    "a page of a proxy": (Answer(502, ["<html>\nbad gateway</html>"]), 2, "cannot answer now: 502 <html> bad gateway</html>"),
    "a conflict that a proxy tells": (Answer(409, ["<html>\nconflict</html>"]), 1, "<html> conflict</html>"),
    "a page of a proxy that thinks all is well": (Answer(200, ["<html>log in</html>"]), 2, "is no API server: <html>log in</html>"),
    "it breaks off": (Answer(200, ['{"meta'], breaks=True), 2, "does not answer: "),
    "a status of another version": (document(job_body({"phase": "Dreaming"})), 2, "cannot be read by this version"),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "code", "said"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_that_is_none(answer: Answer, code: int, said: str, stand_in: StandIn):
    stand_in.on(f"{JOBS}/sentiment", answer)
    ran = finetune(stand_in.kubeconfig, "status", "sentiment")
    assert (ran.code, ran.stdout, ran.stderr.count("\n")) == (code, "", 1)
    assert ran.stderr.startswith("error: ")
    assert said in ran.stderr


# id: (what the kubeconfig is, more arguments, what is said)
KUBECONFIGS = {
    "nobody listens": ("http://127.0.0.1:9", (), "the API server at http://127.0.0.1:9 does not answer"),
    "no such host": ("http://nowhere.invalid", (), "does not answer"),
    "no such context": ("http://127.0.0.1:9", ("--context", "there"), "there"),
    "an empty file": ("", (), "no cluster to talk to"),
    "no file": (None, (), "no cluster to talk to"),
}


@pytest.mark.parametrize(("server", "arguments", "said"), KUBECONFIGS.values(), ids=KUBECONFIGS.keys())
def test_a_cluster_that_is_not_there(server: str | None, arguments: tuple[str, ...], said: str, tmp_path: Path):
    file = tmp_path / "kubeconfig"
    if server:
        write_kubeconfig(file, server)
    elif server is not None:
        file.write_text("")
    ran = finetune(file, "get", *arguments)
    assert (ran.code, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert said in ran.stderr


# id: (the jobs there are, what is said)
NEAR = {
    "one that is like it": (["sentimental", "other"], "; did you mean sentimental?\n"),
    "none that is like it": (["other"], "there is no job 'sentiment' in namespace 'team-a'\n"),
    "none at all": ([], ", and no other one either\n"),
}


@pytest.mark.parametrize(("names", "said"), NEAR.values(), ids=NEAR.keys())
def test_a_job_that_is_not_there(names: list[str], said: str, stand_in: StandIn):
    stand_in.on(f"{JOBS}/sentiment", refusal(404, "not found", name="sentiment"))
    stand_in.on(JOBS, listing(*(job_body(name=name) for name in names)))
    ran = finetune(stand_in.kubeconfig, "status", "sentiment")
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr.endswith(said)


def test_who_may_not_list_is_told_of_no_names(stand_in: StandIn):
    stand_in.on(f"{JOBS}/sentiment", refusal(404, "not found", name="sentiment"))
    stand_in.on(JOBS, refusal(403, "no"))
    ran = finetune(stand_in.kubeconfig, "status", "sentiment")
    assert (ran.code, ran.stderr) == (2, "error: there is no job 'sentiment' in namespace 'team-a'\n")


def test_a_long_list_is_read_page_by_page(stand_in: StandIn):
    first = {"metadata": {"continue": "more"}, "items": [job_body(RUNNING, name="b")]}
    stand_in.on(JOBS, document(first), listing(job_body(SUCCEEDED, name="a")))
    ran = finetune(stand_in.kubeconfig, "get", "-o", "json")
    assert [job["name"] for job in ran.json["jobs"]] == ["a", "b"]
    assert stand_in.asked[1][1]["continue"] == "more"


def test_the_namespace_is_the_options_else_the_contexts(stand_in: StandIn):
    stand_in.on(JOBS, listing())
    stand_in.on(JOBS.replace("team-a", "team-b"), listing(job_body(namespace="team-b")))
    assert finetune(stand_in.kubeconfig, "get").stderr == "there are no jobs in namespace team-a\n"
    assert "sentiment" in finetune(stand_in.kubeconfig, "get", "-n", "team-b").stdout


def test_a_name_cannot_lead_elsewhere():
    assert (
        path("/api/v1", "team-a", "pods", "../secrets/keys?x#")
        == "/api/v1/namespaces/team-a/pods/..%2Fsecrets%2Fkeys%3Fx%23"
    )
    assert path("/api/v1", "a/../b", "pods") == "/api/v1/namespaces/a%2F..%2Fb/pods"


def test_nothing_of_a_job_that_has_ended_is_changed(stand_in: StandIn):
    stand_in.on(f"{JOBS}/sentiment", document(job_body(SUCCEEDED)))
    ran = finetune(stand_in.kubeconfig, "suspend", "sentiment")
    assert (ran.code, ran.stdout) == (1, "")
    assert "team-a/sentiment has ended: Succeeded" in ran.stderr


def test_what_is_suspended_already_is_not_written_again(stand_in: StandIn):
    stand_in.on(f"{JOBS}/sentiment", document(job_body(RUNNING, suspend=True)))
    assert finetune(stand_in.kubeconfig, "suspend", "sentiment").code == 0
    assert len(stand_in.asked) == 1
