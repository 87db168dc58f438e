"""The version stands in pyproject.toml, and is the same wherever else it is named."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from release import versions

ROOT = Path(__file__).parents[2]
FILES = {place: sorted(ROOT.glob(place)) for place in versions.PLACES}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that name the version, where they can be changed."""
    for file in [ROOT / "pyproject.toml", ROOT / "CHANGELOG.md", *(file for files in FILES.values() for file in files)]:
        (tmp_path / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    return tmp_path


def named(file: Path, before: str) -> list[str]:
    return re.findall(rf"(?:{before})({versions._NUMBER})", file.read_text(), re.MULTILINE)


@pytest.mark.parametrize(("place", "before"), versions.PLACES.items(), ids=versions.PLACES.keys())
def test_every_place_names_the_version(place: str, before: str) -> None:
    found = [number for file in FILES[place] for number in named(file, before)]
    assert found
    assert set(found) == {versions.version(ROOT)}


def test_both_charts_and_both_images_are_among_them() -> None:
    assert [len(FILES[place]) for place in ("charts/*/Chart.yaml", "Dockerfile.*")] == [2, 2]
    for chart in FILES["charts/*/Chart.yaml"]:
        assert len(named(chart, versions.PLACES["charts/*/Chart.yaml"])) == 2, "version and appVersion"
    for dockerfile in FILES["Dockerfile.*"]:
        assert 'org.opencontainers.image.version="${VERSION}"' in dockerfile.read_text()


def test_a_new_version_is_missed_everywhere_and_then_written(copy: Path) -> None:
    project = copy / "pyproject.toml"
    old = versions.version(copy)
    project.write_text(project.read_text().replace(f'version = "{old}"', 'version = "7.8.9-rc.1"', 1))
    missed = {file.relative_to(copy) for file, _ in versions.stale(copy)}
    expected = {
        file.relative_to(ROOT)
        for place, before in versions.PLACES.items()
        for file in FILES[place]
        if named(file, before)
    }
    assert missed == expected
    for file, text in versions.stale(copy):
        file.write_text(text)
    assert not list(versions.stale(copy))
    assert set(named(copy / "charts/finetune-operator/Chart.yaml", "^appVersion: ")) == {"7.8.9-rc.1"}
    assert "7.8.9-rc.1" in versions.unwritten(copy)


def test_the_changelog_tells_of_this_version() -> None:
    assert versions.unwritten(ROOT) == ""


def test_a_release_reads_the_version_before_anything_is_installed() -> None:
    program = [sys.executable, "-I", "-S", str(ROOT / "release/versions.py")]
    done = subprocess.run([*program, "--print"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == versions.version(ROOT)
    assert subprocess.run([*program, "--check"], check=False).returncode == 0
