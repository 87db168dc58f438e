"""What scripts and shells rely on: commands, options, exit codes, programs, completions; and what a terminal gets that a pipe does not."""

from __future__ import annotations

import importlib
import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from finetune_api.reasons import REASONS
from finetune_cli.jobs.commands import EXIT_CODES, app
from finetune_cli.kubectl import complete, run
from tests.kubectl.command import ROOT, environment, finetune_alone
from tests.kubectl.jobs import PROGRESS, RUNNING, SUCCEEDED, job_body
from tests.kubectl.stand_in import Answer, StandIn, document, listing, watched

JOBS = "/apis/finetune.dev/v1alpha1/namespaces/team-a/finetunejobs"
CLUSTER = ["--namespace -n", "--context", "--kubeconfig"]
FORM = "--output -o"
SURFACE = {
    "submit": ["FILE", "--dry-run", "--wait", "--timeout", FORM, *CLUSTER],
    "get": ["[JOB]", "--all-namespaces -A", FORM, *CLUSTER],
    "status": ["JOB", "--watch -w", FORM, *CLUSTER],
    "logs": ["JOB", "--rank -r", "--attempt", "--follow -f", "--tail", *CLUSTER],
    "events": ["JOB", FORM, *CLUSTER],
    "suspend": ["JOB", *CLUSTER],
    "resume": ["JOB", *CLUSTER],
    "wait": ["JOB", "--for", "--timeout", FORM, *CLUSTER],
    "explain": ["[REASON]", FORM],
    "checkpoints": ["COMMAND", "JOB[@STEP]", *CLUSTER],
}


def test_commands_and_options_are_these():
    found = {
        name: [
            parameter.metavar if parameter.param_type_name == "argument" else " ".join(parameter.opts)
            for parameter in command.params
        ]
        for name, command in get_command(app).commands.items()
    }
    assert found == SURFACE


def test_programs_are_installed_under_the_names_that_kubectl_looks_for():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {"kubectl-finetune", "kubectl_complete-finetune"} < set(scripts)
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", SURFACE)
def test_help_tells_the_exit_codes(name: str, capsys: pytest.CaptureFixture[str]):
    assert get_command(app)([name, "--help"], standalone_mode=False) == 0
    assert EXIT_CODES in " ".join(capsys.readouterr().out.split())


HEAVY = ("torch", "transformers", "deepspeed", "numpy", "boto3", "kopf", "aiohttp", "finetune_operator")
NAMES_WHAT_IS_HEAVY = f"""
import sys
from finetune_cli.kubectl import run
code = run(sys.argv[1:])
print(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr, end="")
sys.exit(code)
"""


def test_it_starts_without_what_only_trainer_operator_and_store_need(stand_in: StandIn):
    stand_in.on(f"{JOBS}/sentiment", document(job_body(RUNNING)))
    command = [sys.executable, "-c", NAMES_WHAT_IS_HEAVY, "status", "sentiment"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment(stand_in.kubeconfig), check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout


# id: (arguments, the whole error)
MISUSED = {
    "no job": (("status",), "Missing argument 'JOB'."),
    "an unknown option": (("status", "a", "--wide"), "No such option: --wide"),
    "an unknown reason": (
        ("explain", "hangs"),
        "hangs is no reason that a job's status gives; did you mean Hang, Reshaping?",
    ),
    "no such file": (("submit", "/nowhere/job.yaml"), "/nowhere/job.yaml: No such file or directory"),
}


@pytest.mark.parametrize(("arguments", "message"), MISUSED.values(), ids=MISUSED.keys())
def test_misuse_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str):
    ran = finetune_alone(None, *arguments)
    assert (ran.code, ran.stdout, ran.stderr) == (2, "", f"error: {message}\n")


def test_a_manifest_is_checked_without_a_cluster_and_its_faults_are_lines_that_editors_know(tmp_path: Path):
    file = tmp_path / "job.yaml"
    file.write_text((ROOT / "examples/sentiment/job.yaml").read_text())
    ran = finetune_alone(None, "submit", str(file), "--dry-run", "client")
    assert (ran.code, ran.stdout, ran.stderr) == (0, "sentiment is valid\n", "")
    file.write_text(file.read_text().replace("epochs:", "epoch:"))
    ran = finetune_alone(None, "submit", str(file), "--dry-run", "client")
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "epoch:" in text)
    assert (ran.code, ran.stdout) == (1, "")
    expected = f"error: {file}:{line}: spec.recipe.training.epoch: is no field; did you mean epochs?\n"
    assert expected in ran.stderr


def test_a_file_that_is_no_text_is_an_error_in_a_line(tmp_path: Path):
    file = tmp_path / "job.yaml"
    file.write_text("kind: FineTuneJob", encoding="utf-16")
    ran = finetune_alone(None, "submit", str(file), "--dry-run", "client")
    assert (ran.code, ran.stderr) == (1, f"error: {file} is not UTF-8 text\n")


def test_stdin_is_a_file_too():
    ran = finetune_alone(None, "submit", "-", "--dry-run=client", stdin="kind: Pod\n")
    assert ran.code == 1
    assert ran.stderr.startswith("error: stdin:1: kind: must be apiVersion: finetune.dev/v1alpha1")


@pytest.mark.parametrize("name", REASONS)
def test_every_reason_is_explained_in_any_case(name: str, capsys: pytest.CaptureFixture[str]):
    assert run(["explain", name.lower(), "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"reason", "meaning", "then", "toDo"}
    assert document["reason"] == name


def test_all_reasons_are_listed(capsys: pytest.CaptureFixture[str]):
    assert run(["explain"]) == 0
    shown = capsys.readouterr().out
    assert [name for name, reason in REASONS.items() if f"{name} " not in shown or reason.meaning not in shown] == []
    assert run(["explain", "-o", "json"]) == 0
    assert [reason["reason"] for reason in json.loads(capsys.readouterr().out)["reasons"]] == list(REASONS)


# id: (the words after `kubectl finetune`, what is offered, what kubectl's shells do beside)
COMPLETIONS = {
    "commands": (["s"], ["submit", "status", "suspend"], ":4"),
    "jobs": (["status", "sen"], ["sentiment"], ":4"),
    "jobs of the namespace that is named": (["logs", "-n", "team-b", ""], ["other"], ":4"),
    "values": (["wait", "--for", "co"], ["complete"], ":4"),
    "options": (["get", "--all"], ["--all-namespaces"], ":4"),
    "reasons": (["explain", "Node"], ["NodeLost"], ":4"),
    "files": (["submit", "job"], [], ":0"),
    "nothing, where the cluster says nothing": (["status", "--context", "there", "s"], [], ":0"),
}


@pytest.mark.parametrize(("words", "offered", "directive"), COMPLETIONS.values(), ids=COMPLETIONS.keys())
def test_completion_speaks_as_kubectl_wants_it(
    words, offered, directive, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stand_in.on(JOBS, listing(job_body(), job_body(name="pretrain")))
    stand_in.on(JOBS.replace("team-a", "team-b"), listing(job_body(name="other")))
    known = ["--kubeconfig", str(stand_in.kubeconfig)] if words[0] in ("status", "logs") else []
    monkeypatch.setattr(sys, "argv", ["kubectl_complete-finetune", *words[:-1], *known, words[-1]])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    complete()
    said = capsys.readouterr()
    assert (said.out.split(), said.err) == ([*offered, directive], "")


def on_terminal(kubeconfig: Path | None, *arguments: str, **more: str) -> tuple[int, str]:
    """Run the program on a terminal, of 120 columns if nothing else is said, and return its exit code and all that it has printed."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "finetune_cli.kubectl", *arguments]
    env = environment(kubeconfig, **{"TERM": "xterm-256color", "COLUMNS": "120", **more})
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    said = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # how Linux says that nobody holds the other end
            break
        if not read:
            break
        said += read
    os.close(ours)
    return process.wait(), said.decode()


def test_a_terminal_gets_colours_and_a_pipe_or_who_wants_none_does_not(stand_in: StandIn):
    stand_in.on(f"{JOBS}/sentiment", document(job_body(RUNNING)))
    code, shown = on_terminal(stand_in.kubeconfig, "status", "sentiment")
    assert (code, "\x1b[32mteam-a/sentiment: Running" in shown) == (0, True)
    assert "\\x1b[31mno" in shown  # what a program printed is shown, not obeyed
    assert "\x1b[31m" not in shown
    assert "\x1b[3" not in on_terminal(stand_in.kubeconfig, "status", "sentiment", NO_COLOR="1")[1]
    assert "\x1b" not in finetune_alone(stand_in.kubeconfig, "status", "sentiment").stdout


def test_a_narrow_terminal_gets_every_digit_and_every_name(stand_in: StandIn):
    name = "sentiment-of-forty-characters-2024-06-01"
    far = RUNNING | {"progress": PROGRESS | {"step": 123456, "totalSteps": 1200000}}
    stand_in.on(JOBS, listing(job_body(far, name=name)))
    piped = finetune_alone(stand_in.kubeconfig, "get").stdout
    code, shown = on_terminal(stand_in.kubeconfig, "get", COLUMNS="40")
    assert code == 0
    assert re.sub("\x1b\\[[0-9;]*m", "", shown).split() == piped.split()
    assert name in shown
    assert "123456" in shown


def test_a_narrow_terminal_gets_every_message(stand_in: StandIn):
    node = "ip-10-0-123-45.eu-central-1.compute.internal"
    message = "rank 0 ended with exit code 1: ValueError: there is something wrong with the data"
    attempt = {"generation": 1, "endTime": "2026-01-01T11:00:00Z", "reason": "WorkerFailed"}
    ended = RUNNING | {"attempts": [attempt | {"message": message, "node": node}]}
    stand_in.on(f"{JOBS}/sentiment", document(job_body(ended)))
    shown = on_terminal(stand_in.kubeconfig, "status", "sentiment", COLUMNS="80")[1]
    assert node in shown
    assert all(word in shown for word in message.split())


def test_who_waits_on_a_terminal_sees_a_bar_and_the_time_that_is_left(stand_in: StandIn):
    in_future = RUNNING | {"progress": PROGRESS | {"estimatedCompletionTime": "2999-01-01T00:00:00Z"}}
    stand_in.on(f"{JOBS}/sentiment", document(job_body(in_future)))
    stand_in.on(f"{JOBS}?watch", watched(("MODIFIED", job_body(in_future)), ("MODIFIED", job_body(SUCCEEDED))))
    code, shown = on_terminal(stand_in.kubeconfig, "wait", "sentiment")
    assert code == 0
    for words in ("━", "36%", "120 of 330 steps", "d left", "100%", "team-a/sentiment is complete"):
        assert words in shown


def test_who_reads_no_further_is_not_told_of_it(stand_in: StandIn):
    stand_in.on(f"{JOBS}/sentiment", document(job_body(RUNNING)))
    pod = {"name": "a", "uid": "u", "creationTimestamp": "2026-01-01T11:00:00Z", "labels": {}}
    stand_in.on("/api/v1/namespaces/team-a/pods", listing({"metadata": pod}))
    line = f"2026-01-01T11:00:00Z [rank 0] {'x' * 200}\n"
    stand_in.on("/api/v1/namespaces/team-a/pods/a/log", Answer(200, [line * 5000]))
    program = f"{sys.executable} -m finetune_cli.kubectl logs sentiment | head -1"
    ran = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, env=environment(stand_in.kubeconfig), check=True
    )
    assert (ran.stdout.count("\n"), ran.stderr) == (1, "")
