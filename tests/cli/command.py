"""Runs the program as its users do, in a process of its own, and in this one where a test needs many."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def finetune(server: S3Server, *arguments: str, wrapper: tuple[str, ...] = ("-m", "finetune_cli")) -> Ran:
    """Run ``finetune checkpoints`` on a server."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FINETUNE_"))},
        **server.environment,
        "AWS_ENDPOINT_URL": server.endpoint,
        "PYTHONPATH": f"{ROOT / 'crds'}:{ROOT / 'trainer'}:{ROOT}",
    }
    command = [sys.executable, *wrapper, "checkpoints", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return Ran(ended.returncode, ended.stdout, ended.stderr)
