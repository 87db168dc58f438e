"""Runs ``kubectl-finetune``: in this process where a test needs many, in one of its own where that is what it is about."""

from __future__ import annotations

import os
from pathlib import Path

from finetune_cli.kubectl import run
from tests.cli.command import ROOT, Ran, run_alone, run_here


def finetune(kubeconfig: Path, *arguments: str) -> Ran:
    """Run a command here."""
    return run_here(run, *arguments, "--kubeconfig", str(kubeconfig))


def environment(kubeconfig: Path | None = None, **more: str) -> dict[str, str]:
    """Return the environment of a user who has no other cluster."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "KUBE", "PYTHON"))}
    paths = f"{ROOT / 'crds'}:{ROOT / 'trainer'}"
    config = str(kubeconfig) if kubeconfig else "/nowhere"
    return kept | {"PYTHONPATH": paths, "KUBECONFIG": config, "HOME": "/nowhere"} | more


def finetune_alone(kubeconfig: Path | None, *arguments: str, stdin: str | None = None, **more: str) -> Ran:
    """Run the program in a process of its own."""
    return run_alone(environment(kubeconfig, **more), "-m", "finetune_cli.kubectl", *arguments, stdin=stdin)
