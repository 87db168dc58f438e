"""The workflows are correct as far as they can be told to be without running them, and sign what they should."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.binaries import Component, ensure_alone

ROOT = Path(__file__).parents[2]
ACTIONLINT = Component(
    "actionlint", ("github.com/rhysd/actionlint/cmd/actionlint",), ("actionlint",), "about 10 s the first time"
)
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yaml"))
JOBS: dict[str, Any] = {
    f"{workflow.stem}.{name}": job
    for workflow in WORKFLOWS
    for name, job in yaml.safe_load(workflow.read_text())["jobs"].items()
}


def lint(*files: Path) -> str:
    """Return what actionlint finds: syntax, expressions, contexts, the inputs of the actions it knows, job needs."""
    command = [ensure_alone(ACTIONLINT) / "actionlint", "-no-color", "-shellcheck=", "-pyflakes=", *files]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout


def test_actionlint_finds_nothing() -> None:
    assert lint(*WORKFLOWS) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("needs: version\n", "needs: verson\n"),
        ("steps.build.outputs.digest", "steps.built.outputs.digest"),
        ("provenance: mode=max", "provenence: mode=max"),
        ("id-token: write # the identity", "id-token: wrote # the identity"),
    ],
    ids=["a job that is not there", "an output that is not there", "a misspelt input", "a right that is none"],
)
def test_actionlint_would_find(right: str, wrong: str, tmp_path: Path) -> None:
    text = (ROOT / ".github/workflows/release.yaml").read_text()
    assert right in text
    broken = tmp_path / "broken.yaml"
    broken.write_text(text.replace(right, wrong))
    assert "broken.yaml" in lint(broken)


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_a_job_ends_and_runs_released_actions(job: dict[str, Any]) -> None:
    assert job["timeout-minutes"] <= 90
    for step in job["steps"]:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+(\.\d+)*|[0-9a-f]{40})", step.get("uses", "actions/checkout@v4"))
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_a_pipe_that_breaks_ends_the_step(workflow: Path) -> None:
    assert yaml.safe_load(workflow.read_text())["defaults"] == {"run": {"shell": "bash"}}


def test_only_what_signs_may_speak_for_the_project() -> None:
    signing = {name for name, job in JOBS.items() if job.get("permissions", {}).get("id-token") == "write"}
    assert signing == {"release.images", "release.charts"}
    for workflow in WORKFLOWS:
        assert yaml.safe_load(workflow.read_text())["permissions"] in ({}, {"contents": "read"})


def test_images_carry_sbom_and_provenance_and_everything_is_signed_by_digest() -> None:
    (build,) = [step for step in JOBS["release.images"]["steps"] if step.get("id") == "build"]
    assert (build["with"]["sbom"], build["with"]["provenance"]) == (True, "mode=max")
    for name in ("release.images", "release.charts"):
        commands = "\n".join(step.get("run", "") for step in JOBS[name]["steps"])
        signed = re.findall(r"cosign sign --yes (.*)", commands)
        assert len(signed) == 1
        assert re.search(r"@\$\{?(DIGEST|digest)\b", signed[0])


def test_everything_that_is_built_here_is_released() -> None:
    images = set(JOBS["release.images"]["strategy"]["matrix"]["image"])
    assert images == {file.suffix[1:] for file in ROOT.glob("Dockerfile.*")}
    charts = set(JOBS["release.charts"]["strategy"]["matrix"]["chart"])
    assert charts == {file.parent.name for file in ROOT.glob("charts/*/Chart.yaml")}


def test_where_it_is_released_to_is_configuration() -> None:
    text = "\n".join(workflow.read_text() for workflow in WORKFLOWS)
    assert not re.search(r"\b(ghcr|docker|quay|gcr|pkg)\.(io|dev)\b", text)
