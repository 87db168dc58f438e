"""Runs ``finetune checkpoints``, and what else has a command line: in this process where a test needs many, in one of its own where that is what it is about."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_cli.__main__ import run
from tests.storage.seaweedfs import S3Server

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


def run_here(program: Callable[[Sequence[str]], int], *arguments: str) -> Ran:
    """Run a program in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = program(arguments)
    return Ran(code, stdout.getvalue(), stderr.getvalue())


def run_alone(environment: Mapping[str, str], *command: str, stdin: str | None = None) -> Ran:
    """Run Python with these arguments in a process of its own."""
    ended = subprocess.run(
        [sys.executable, *command], input=stdin, capture_output=True, text=True, env=dict(environment), check=False
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def finetune(server: S3Server, *arguments: str, **environment: str) -> Ran:
    """Run a command here, with the server's credentials and endpoint in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**server.environment, "AWS_ENDPOINT_URL": server.endpoint, **environment}.items():
            patch.setenv(name, value)
        return run_here(run, "checkpoints", *arguments)


def finetune_alone(server: S3Server, *arguments: str, program: str = "") -> Ran:
    """Run the program in a process of its own; ``program`` is what it does instead of ``python -m finetune_cli``."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FINETUNE_"))},
        **server.environment,
        "AWS_ENDPOINT_URL": server.endpoint,
        "PYTHONPATH": f"{ROOT / 'crds'}:{ROOT / 'trainer'}",
    }
    interpreted = ("-c", program) if program else ("-m", "finetune_cli")
    return run_alone(environment, *interpreted, "checkpoints", *arguments)
