"""``checkpoints`` finds out where a job writes, and leaves the rest to ``finetune checkpoints``."""

from __future__ import annotations

import pytest

from finetune_cli.checkpoints import commands
from tests.kubectl.command import finetune
from tests.kubectl.jobs import RUNNING, job_body
from tests.kubectl.stand_in import StandIn, document

JOB = "/apis/finetune.dev/v1alpha1/namespaces/team-a/finetunejobs/sentiment"
PREFIX = "s3://checkpoints/team-a/team-a/sentiment-0b2a1f6e"
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


@pytest.fixture
def called(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, str]]:
    """What the commands ask which store for; there is none."""
    asked: list[tuple[str | None, str]] = []

    def read_head(store: str | None, prefix: str) -> None:
        asked.append((store, prefix))
        raise commands.Damaged("no store here")

    monkeypatch.setattr(commands, "_store", lambda endpoint: endpoint)
    monkeypatch.setattr(commands, "read_head", read_head)
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    stand_in.on(JOB, document(job_body(RUNNING)))
    return asked


# id: (arguments, environment, the endpoint that is asked)
CALLS = {
    "the job's endpoint": (("verify", "sentiment"), {}, "http://store:8333"),
    "an endpoint of one's own": (("verify", "sentiment", "--endpoint", "http://here:1"), {}, "http://here:1"),
    "an endpoint in the environment": (("verify", "sentiment"), {"AWS_ENDPOINT_URL": "http://here:2"}, "http://here:2"),
    "options behind the job": (("verify", "sentiment", "--all", "-o", "json"), {}, "http://store:8333"),
    "a step": (("export", "sentiment@100", "folder"), {}, "http://store:8333"),
}


@pytest.mark.parametrize(("arguments", "environment", "endpoint"), CALLS.values(), ids=CALLS.keys())
def test_the_jobs_prefix_at_its_endpoint(
    arguments, environment, endpoint, called, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ran = finetune(stand_in.kubeconfig, "checkpoints", *arguments)
    assert (ran.code, ran.stderr) == (1, "error: no store here\n")
    assert called == [(endpoint, PREFIX)]


# id: (arguments, the whole error)
MISUSED = {
    "an option that there is not": (("verify", "sentiment", "--fast"), "No such option: --fast"),
    "a command that there is not": (("list", "sentiment"), "No such command 'list'. Did you mean 'ls'?"),
    "a step that is none": (("verify", "sentiment@new"), "'new' is no step: write sentiment, or sentiment@100"),
    "no job": (("verify",), "Missing argument 'JOB[@STEP]'."),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISUSED.values(), ids=MISUSED.keys())
def test_misuse_is_one_line(arguments, message, called, stand_in: StandIn):
    ran = finetune(stand_in.kubeconfig, "checkpoints", *arguments)
    assert (ran.code, ran.stdout, ran.stderr) == (2, "", f"error: {message}\n")
    assert called == []


def test_a_job_without_storage_has_none(called, stand_in: StandIn):
    body = job_body(RUNNING)
    del body["spec"]["storage"]
    stand_in.on(JOB, document(body))
    ran = finetune(stand_in.kubeconfig, "checkpoints", "ls", "sentiment")
    assert (ran.code, ran.stderr) == (
        2,
        "error: sentiment has no spec.storage: the checkpoints of a script are its own\n",
    )
