"""What scripts rely on: commands, options, exit codes, one line per error; and what a laptop need not have."""

import pytest
from typer.main import get_command

from finetune_cli.__main__ import app
from finetune_cli.checkpoints import commands
from finetune_cli.errors import EXIT_CODES
from tests.cli.command import finetune, finetune_alone
from tests.storage.seaweedfs import S3Server
from tests.trainer.launch import Case

COMMON = ["--endpoint", "--output -o"]
SURFACE = {
    "ls": ["PREFIX", *COMMON],
    "verify": ["PREFIX[@STEP]", "--all", *COMMON],
    "export": ["PREFIX[@STEP]", "FOLDER", "--model", "--max-file-size", *COMMON],
    "prune": ["PREFIX", "--keep", "--keep-best", "--dry-run", "--yes -y", *COMMON],
}
JOB = "s3://jobs/full-bf16-zero-2"

HEAVY = ("torch", "transformers", "deepspeed", "peft", "datasets", "kubernetes", "kopf", "finetune_operator")
NAMES_WHAT_IS_HEAVY = f"""
import sys
from finetune_cli.__main__ import run
code = run(sys.argv[1:])
print(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr, end="")
sys.exit(code)
"""


def test_commands_and_options_are_these():
    groups = get_command(app).commands
    assert list(groups) == ["checkpoints"]
    found = {
        name: [
            parameter.metavar if parameter.param_type_name == "argument" else " ".join(parameter.opts)
            for parameter in command.params
        ]
        for name, command in groups["checkpoints"].commands.items()
    }
    assert found == SURFACE


@pytest.mark.parametrize("name", SURFACE)
def test_help_tells_the_exit_codes(name: str, server: S3Server):
    ran = finetune_alone(server, name, "--help")
    assert ran.code == 0
    assert EXIT_CODES in " ".join(ran.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [("ls", JOB), ("verify", JOB), ("prune", JOB, "--keep", "3", "--yes"), ("export", JOB, "{new}")],
    ids=lambda arguments: arguments[0],
)
def test_runs_without_torch_and_without_the_operator(arguments, server: S3Server, jobs: dict[str, Case], tmp_path):
    ran = finetune_alone(
        server, *(argument.format(new=tmp_path / "new") for argument in arguments), program=NAMES_WHAT_IS_HEAVY
    )
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout


# id: (arguments, the whole error)
MISUSED = {
    "no prefix": (("ls",), "Missing argument 'PREFIX'."),
    "no URI": (("ls", "jobs/a"), "'jobs/a' is not a job's prefix: write s3://bucket/path, or s3://bucket/path@step"),
    "no bucket": (
        ("ls", "s3:///a"),
        "'s3:///a' is not a job's prefix: write s3://bucket/path, or s3://bucket/path@step",
    ),
    "a step where all are meant": (
        ("ls", f"{JOB}@8"),
        "this command is about all checkpoints of a job: leave out @8",
    ),
    "a step and all": (("verify", "--all", f"{JOB}@8"), "--all and @8 contradict one another: leave one of them out"),
    "keep none": (("prune", JOB, "--keep", "0"), None),
    "keep what": (("prune", JOB), "Missing option '--keep'."),
    "an unknown form": (("ls", JOB, "-o", "yaml"), None),
    "an unknown option": (("ls", JOB, "--wide"), "No such option: --wide"),
    "a bucket that is not there": (("ls", "s3://no-bucket/a"), None),
}


@pytest.mark.parametrize(("arguments", "message"), MISUSED.values(), ids=MISUSED.keys())
def test_misuse_is_one_line_and_exit_code_2(arguments, message, server: S3Server, jobs: dict[str, Case]):
    ran = finetune(server, *arguments)
    assert (ran.code, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert ran.stderr.startswith("error: ")
    assert message is None or ran.stderr == f"error: {message}\n"


# id: (what is wrong with the environment, what the message says)
CANNOT_TELL = {
    "wrong credentials": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "refused access to"),
    "nobody listens": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "did not answer for"),
    "an endpoint that is none": ({"AWS_ENDPOINT_URL": "localhost"}, "is not a URL"),
}


@pytest.mark.parametrize(("environment", "message"), CANNOT_TELL.values(), ids=CANNOT_TELL.keys())
@pytest.mark.parametrize("name", ["ls", "verify"])
def test_a_store_that_does_not_say_is_neither_whole_nor_broken(
    name: str, environment, message: str, server: S3Server, jobs: dict[str, Case], monkeypatch
):
    monkeypatch.setattr(commands, "RETRY_SECONDS", 0.0)
    ran = finetune(server, name, JOB, **environment)
    assert (ran.code, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert message in ran.stderr
