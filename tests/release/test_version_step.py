"""What the release refuses before it builds anything: the first job's own shell, run on a copy of the files that it looks at."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from release import versions

ROOT = Path(__file__).parents[2]
VERSION = versions.version(ROOT)
_STEPS = yaml.safe_load((ROOT / ".github/workflows/release.yaml").read_text())["jobs"]["version"]["steps"]
(STEP,) = (step for step in _STEPS if step.get("id") == "version")


@dataclass
class Release:
    """A checkout, and what is set where it is released."""

    folder: Path

    def run(self, tag: str, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {"TAG": tag, "REGISTRY": "registry.example", "NAMESPACE": "team", **environment}
        outputs = self.folder / "outputs"
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", STEP["run"]],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "GITHUB_OUTPUT": str(outputs), **settings},
            capture_output=True,
            text=True,
            check=False,
        )

    def change(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        assert old in text
        (self.folder / file).write_text(text.replace(old, new))


@pytest.fixture
def release(tmp_path: Path) -> Release:
    """A checkout whose changelog has the version's date."""
    files = [ROOT / "pyproject.toml", ROOT / "CHANGELOG.md", ROOT / "release/versions.py"]
    files += [file for place in versions.PLACES for file in ROOT.glob(place)]
    for file in files:
        (tmp_path / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace(f"## {VERSION} (unreleased)", f"## {VERSION} (2026-01-01)"))
    return Release(tmp_path)


def test_a_tag_of_the_version_is_released(release: Release) -> None:
    ran = release.run(f"v{VERSION}")
    assert ran.returncode == 0, ran.stderr
    assert (release.folder / "outputs").read_text() == f"version={VERSION}\n"


def test_a_tag_of_another_version_is_refused(release: Release) -> None:
    ran = release.run("v99.0.0")
    assert (ran.returncode, ran.stdout) == (1, f"the tag is v99.0.0, the version is {VERSION}\n")


def test_a_version_that_the_changelog_calls_unreleased_is_refused(release: Release) -> None:
    release.change("CHANGELOG.md", "(2026-01-01)", "(unreleased)")
    ran = release.run(f"v{VERSION}")
    assert (ran.returncode, ran.stdout) == (1, f"CHANGELOG.md calls {VERSION} unreleased\n")


def test_a_version_that_the_changelog_does_not_know_is_refused(release: Release) -> None:
    release.change("CHANGELOG.md", f"## {VERSION} ", "## 0.0.1 ")
    ran = release.run(f"v{VERSION}")
    assert ran.returncode == 1
    assert f"CHANGELOG.md has no section `## {VERSION} (date)`" in ran.stderr


def test_a_chart_of_another_version_is_refused(release: Release) -> None:
    release.change("charts/finetune-operator/Chart.yaml", f"appVersion: {VERSION}", "appVersion: 0.0.1")
    ran = release.run(f"v{VERSION}")
    assert ran.returncode == 1
    assert "charts/finetune-operator/Chart.yaml names another version" in ran.stderr


@pytest.mark.parametrize("missing", ["REGISTRY", "NAMESPACE"])
def test_a_repository_that_does_not_say_where_to_is_told_so(release: Release, missing: str) -> None:
    ran = release.run(f"v{VERSION}", **{missing: ""})
    assert ran.returncode != 0
    assert "is not set" in ran.stderr
    assert not (release.folder / "outputs").exists()
