"""The site builds: no dead link or anchor, every page in the navigation, nothing fetched from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://code.example/finetune"


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(root / "mkdocs.yml")]
    environment = os.environ | {"REPOSITORY_URL": REPOSITORY}
    return subprocess.run(
        [*command, "--site-dir", str(site)], capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    written = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    assert written <= {page.relative_to(site) for page in site.rglob("*.html")}
    assert not (site / "hooks").exists()


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|img|iframe)[^>]* src=\"(\w+:)?//|<link[^>]* href=\"(\w+:)?//", page.read_text()
        )
        assert not fetched, page


def test_a_link_out_of_the_pages_leads_into_the_repository(site: Path) -> None:
    assert f'href="{REPOSITORY}/blob/main/benchmarks/bench_recovery.md"' in (site / "workers.html").read_text()


def test_lists_are_lists_and_the_picture_is_there(site: Path) -> None:
    assert "<li>The idle fork server" in (site / "workers.html").read_text()
    assert 'src="concepts.svg"' in (site / "concepts.html").read_text()
    assert (site / "concepts.svg").is_file()


BREAKS = {
    "a dead link": ("[there](nowhere.md)", "nowhere.md"),
    "a dead anchor": ("[there](recovery.md#nowhere)", "nowhere"),
    "a link to a file that the repository does not have": ("[there](../tests/nowhere.py)", "tests/nowhere.py"),
}


def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    page = tmp_path / "docs/broken.md"
    page.write_text("# Broken\n\n" + "\n".join(text for text, _ in BREAKS.values()) + "\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    for _, told in BREAKS.values():
        assert told in built.stderr
