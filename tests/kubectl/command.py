"""Runs ``kubectl-finetune``: in this process where a test needs many, in one of its own where that is what it is about."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_cli.kubectl import run

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    """How it ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def finetune(kubeconfig: Path, *arguments: str) -> Ran:
    """Run a command here."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = run([*arguments, "--kubeconfig", str(kubeconfig)])
    return Ran(code, stdout.getvalue(), stderr.getvalue())


def environment(kubeconfig: Path | None = None, **more: str) -> dict[str, str]:
    """Return the environment of a user who has no other cluster."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "KUBE", "PYTHON"))}
    paths = f"{ROOT / 'crds'}:{ROOT / 'trainer'}"
    config = str(kubeconfig) if kubeconfig else "/nowhere"
    return kept | {"PYTHONPATH": paths, "KUBECONFIG": config, "HOME": "/nowhere"} | more


def finetune_alone(kubeconfig: Path | None, *arguments: str, stdin: str | None = None, **more: str) -> Ran:
    """Run the program in a process of its own."""
    command = [sys.executable, "-m", "finetune_cli.kubectl", *arguments]
    ended = subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=environment(kubeconfig, **more), check=False
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)
