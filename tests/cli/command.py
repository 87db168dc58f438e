"""Runs ``finetune checkpoints``: in this process where a test needs many, in one of its own where that is what it is about."""

import io
import json
import os
import subprocess
import sys
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


def finetune(server: S3Server, *arguments: str, **environment: str) -> Ran:
    """Run a command here, with the server's credentials and endpoint in the environment."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        for name, value in {**server.environment, "AWS_ENDPOINT_URL": server.endpoint, **environment}.items():
            patch.setenv(name, value)
        code = run(["checkpoints", *arguments])
    return Ran(code, stdout.getvalue(), stderr.getvalue())


def finetune_alone(server: S3Server, *arguments: str, program: str = "") -> Ran:
    """Run the program in a process of its own; ``program`` is what it does instead of ``python -m finetune_cli``."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FINETUNE_"))},
        **server.environment,
        "AWS_ENDPOINT_URL": server.endpoint,
        "PYTHONPATH": f"{ROOT / 'crds'}:{ROOT / 'trainer'}",
    }
    interpreted = ("-c", program) if program else ("-m", "finetune_cli")
    command = [sys.executable, *interpreted, "checkpoints", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return Ran(ended.returncode, ended.stdout, ended.stderr)
