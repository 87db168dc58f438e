"""A job's whole life on the real cluster, with nothing but ``kubectl finetune``, as its user has it: a program of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.cluster import Cluster
from tests.cluster.training_inputs import recipe_spec, script_spec
from tests.kubectl.command import Ran, environment

FAILS_ONCE = """
import os, sys, time
generation = int(os.environ["FINETUNE_GENERATION"])
print("attempt", generation, "of rank", os.environ["RANK"], flush=True)
time.sleep(3)
if generation == 1 and os.environ["RANK"] == "1":
    raise ValueError("rank 1 does not like it")
time.sleep(3)
"""


class User:
    """Somebody with a kubeconfig, the store's keys, and a folder."""

    def __init__(self, cluster: Cluster, namespace: str, folder: Path) -> None:
        self._environment = environment(cluster.kubeconfig, **cluster.s3.environment())
        self._namespace, self.folder = namespace, folder

    def run(self, *arguments: str) -> Ran:
        """Run a command to its end, whatever that is."""
        words = [sys.executable, "-m", "finetune_cli.kubectl", *arguments, "--namespace", self._namespace]
        ended = subprocess.run(
            words, capture_output=True, text=True, env=self._environment, cwd=self.folder, check=False
        )
        return Ran(ended.returncode, ended.stdout, ended.stderr)

    def do(self, *arguments: str) -> Ran:
        """Run a command that must succeed."""
        ran = self.run(*arguments)
        assert ran.code == 0, (arguments, ran)
        return ran

    def follow(self, name: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "finetune_cli.kubectl", "logs", name, "-f", "-n", self._namespace]
        return subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environment, cwd=self.folder
        )

    def submit(self, name: str, spec: dict) -> Ran:
        manifest = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name},
            "spec": spec,
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(manifest))
        return self.do("submit", f"{name}.yaml")


@pytest.mark.long
def test_a_recipe_from_its_submission_to_its_model(operator: Cluster, namespace: str, tmp_path: Path) -> None:
    user = User(operator, namespace, tmp_path)
    spec = recipe_spec(operator, steps=800)
    spec["checkpoint"]["interval"]["steps"] = 50
    assert user.submit("by-command", spec).stdout == f"{namespace}/by-command is submitted\n"
    user.do("wait", "by-command", "--for", "running", "--timeout", "3m")
    assert "by-command" in user.do("get").stdout
    assert user.do("status", "by-command").stdout.startswith(f"{namespace}/by-command: Running\n")

    user.do("suspend", "by-command")
    user.do("wait", "by-command", "--for", "suspended", "--timeout", "3m")
    assert user.run("logs", "by-command").code == 2, "no pod is kept"
    saved = user.do("status", "by-command", "-o", "json").json["checkpoint"]["step"]
    user.do("resume", "by-command")
    user.do("wait", "by-command", "--for", "running", "--timeout", "3m")
    following = user.follow("by-command")
    waited = user.do("wait", "by-command", "--timeout", "6m", "-o", "json")
    assert (waited.json["phase"], waited.json["progress"]["step"]) == ("Succeeded", 800)
    assert "Succeeded" in waited.stderr
    printed, said = following.communicate(timeout=60)
    assert (following.returncode, said) == (0, "")
    assert "[rank 0] model uploaded: " in printed
    assert "[node 1] finetune-agent: " in printed

    told = user.do("status", "by-command", "-o", "json").json
    assert (told["troubles"], told["restarts"], told["attempts"]) == ([], 0, [])
    assert told["resumed"]["step"] == saved
    steps = [kept["step"] for kept in user.do("checkpoints", "ls", "by-command", "-o", "json").json["checkpoints"]]
    assert steps[0] == 800
    assert "whole" in user.do("checkpoints", "verify", f"by-command@{steps[1]}").stdout
    user.do("checkpoints", "export", "by-command", "model")
    assert (tmp_path / "model" / "config.json").exists()
    reasons = {event["reason"] for event in user.do("events", "by-command", "-o", "json").json["events"]}
    assert {"Scheduled", "Started"} <= reasons
    assert user.run("suspend", "by-command").code == 1, "what has ended is not changed"
    operator.kubectl("delete", "ftj", "by-command", "-n", namespace, "--wait")


def test_an_attempt_that_failed_is_read_by_its_number(operator: Cluster, namespace: str, tmp_path: Path) -> None:
    user = User(operator, namespace, tmp_path)
    user.submit("fails-once", script_spec(operator, FAILS_ONCE))
    user.do("wait", "fails-once", "--timeout", "3m")
    (attempt,) = user.do("status", "fails-once", "-o", "json").json["attempts"]
    assert (attempt["reason"], attempt["rank"]) == ("WorkerFailed", 1)
    first = user.do("logs", "fails-once", "--attempt", "1")
    assert {"[rank 0] attempt 1 of rank 0", "[rank 1] attempt 1 of rank 1"} <= set(first.stdout.splitlines())
    assert "attempt 2 of rank" not in first.stdout
    assert first.stderr.startswith("attempt 1 ended: WorkerFailed: rank 1 ended with exit code 1")
    second = user.do("logs", "fails-once", "--attempt", "2", "--rank", "1").stdout
    assert re.search(r"^attempt 2 of rank 1$", second, re.MULTILINE)
    assert "attempt 1" not in second
    operator.kubectl("delete", "ftj", "fails-once", "-n", namespace, "--wait")


@pytest.mark.long
def test_a_job_that_fails_is_told_by_the_exit_code_and_explained(
    operator: Cluster, namespace: str, tmp_path: Path
) -> None:
    user = User(operator, namespace, tmp_path)
    user.submit("unsound", script_spec(operator, "import sys; sys.exit(78)", nodes=1))
    ran = user.run("wait", "unsound", "--timeout", "3m")
    assert ran.code == 1
    assert "has ended: BadConfig" in ran.stderr
    shown = user.do("status", "unsound").stdout
    assert "Failed: BadConfig" in shown
    assert "to do: Mend what the message names, and submit a new job." in shown
    operator.kubectl("delete", "ftj", "unsound", "-n", namespace, "--wait")
