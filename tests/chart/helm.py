"""The real Helm, and what it renders."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.binaries import COMPONENTS, ensure_alone

ROOT = Path(__file__).resolve().parents[2]
CHARTS = ROOT / "charts"
CRDS, OPERATOR = CHARTS / "finetune-crds", CHARTS / "finetune-operator"
RELEASE, NAMESPACE = "finetune-operator", "finetune-system"
# Without a cluster Helm assumes a version; ours is built from its module and assumes 1.20.
KUBERNETES = ("--kube-version", "1.34.4")


@dataclass(frozen=True, slots=True)
class Ran:
    code: int
    output: str


def helm(*arguments: str | Path) -> Ran:
    done = subprocess.run(
        [_program(), *map(str, arguments)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    return Ran(done.returncode, done.stdout + done.stderr)


def render(chart: Path, *arguments: str | Path) -> list[dict[str, Any]]:
    ran = helm("template", RELEASE, chart, "--namespace", NAMESPACE, *KUBERNETES, *arguments)
    assert ran.code == 0, ran.output
    return [document for document in yaml.safe_load_all(ran.output) if document]


def ci_values() -> Iterator[tuple[Path, Path]]:
    for chart in (CRDS, OPERATOR):
        for values in sorted(chart.glob("ci/*-values.yaml")):
            yield chart, values


def example(name: str) -> Path:
    return OPERATOR / "ci" / f"{name}-values.yaml"


def find(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = (item for item in documents if item["kind"] == kind and item["metadata"]["name"] == name)
    return found


@functools.cache
def _program() -> Path:
    (component,) = (component for component in COMPONENTS if component.name == "helm")
    return ensure_alone(component) / "helm"
