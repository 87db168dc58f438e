"""Every command that the documentation shows runs, in its order, on the job that it shows."""

import json
import re
import shlex
from pathlib import Path

import pytest

from finetune_cli.__main__ import run
from tests.cli.tampering import Copy
from tests.storage.seaweedfs import S3Server
from tests.trainer.launch import Case

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints-command-line.md").read_text()
COMMANDS = [line.removeprefix("$ ") for line in PAGE.splitlines() if line.startswith("$ finetune ")]
PREFIX = "s3://checkpoints/team-a/sentiment-0b2a1f6e"


def documented_fields(title: str) -> set[str]:
    """The names at the beginning of the table's rows under a heading."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name.removesuffix("[]") for row in rows for name in re.findall(r"`([a-zA-Z]+(?:\[\])?)`", row)}


@pytest.fixture
def documented_job(server: S3Server, jobs: dict[str, Case], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Copy:
    """The job under the prefix of the page, with its export plan, and a user's environment."""
    server.create_bucket("checkpoints")
    for name, value in {**server.environment, "AWS_ENDPOINT_URL": server.endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    client, source = server.client(), "full-bf16-zero-2/"
    for entry in client.list_objects_v2(Bucket="jobs", Prefix=source)["Contents"]:
        body = client.get_object(Bucket="jobs", Key=entry["Key"])["Body"].read()
        client.put_object(
            Bucket="checkpoints", Key=f"team-a/sentiment-0b2a1f6e/{entry['Key'].removeprefix(source)}", Body=body
        )
    return Copy(server, "full-bf16-zero-2")


def test_the_commands_run_and_their_documents_have_the_fields_that_are_told(
    documented_job: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    titles = {
        "ls": "What is there",
        "verify": "Is it whole?",
        "export": "Make a model of it",
        "prune": "Remove what is old",
    }
    assert len(COMMANDS) == 11
    for line in COMMANDS:
        _, *arguments = shlex.split(line)
        assert any(argument.startswith(PREFIX) for argument in arguments), line
        assert run(arguments) == 0, (line, capsys.readouterr().err)
        output = capsys.readouterr().out
        if "json" in arguments:
            assert set(json.loads(output)) == documented_fields(titles[arguments[1]]), line
