"""One version: ``project.version`` of pyproject.toml. Everything else that names it is written from there.

``python release/versions.py`` writes it, ``--check`` tells where it is another one, ``--print`` prints it. Standard library only: a release looks at
the versions before it installs anything.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

_NUMBER = r"\d+\.\d+\.\d+(?:-[0-9A-Za-z.]+)?"
# Where it stands (globs) and what stands before it.
PLACES = {
    "charts/*/Chart.yaml": r"^(?:version|appVersion): ",
    "operator/finetune_agent/__init__.py": r'^__version__ = "',
    "Dockerfile.*": r"^ARG VERSION=",
    "README.md": r"finetune-(?:operator|trainer):",
    "docs/*.md": r"finetune-(?:operator|trainer):",
    "examples/gitops/*/*.yaml": r"finetune-(?:operator|trainer):|(?:targetRevision: |tag: )v(?=\d)",
}


def version(root: Path) -> str:
    """Return the project's version."""
    number: str = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    return number


def stale(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield each file that names another version, with the text that it should have."""
    number = version(root)
    for place, before in PLACES.items():
        for file in sorted(root.glob(place)):
            text = file.read_text()
            wanted = re.sub(f"({before}){_NUMBER}", rf"\g<1>{number}", text, flags=re.MULTILINE)
            if wanted != text:
                yield file, wanted


def unwritten(root: Path) -> str:
    """Return why the version cannot be released yet; empty when it can."""
    if f"\n## {version(root)} " not in (root / "CHANGELOG.md").read_text():
        return f"CHANGELOG.md has no section `## {version(root)} (date)`"
    return ""


def main() -> int:
    """Write the version to where it stands, or say where it is another one."""
    parser = argparse.ArgumentParser(prog="python release/versions.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the version is another one")
    parser.add_argument("--print", action="store_true", help="print the version")
    arguments = parser.parse_args()
    root = Path(__file__).parents[1]
    if arguments.print:
        sys.stdout.write(version(root) + "\n")
        return 0
    files = list(stale(root))
    for file, text in files:
        if arguments.check:
            sys.stderr.write(
                f"{file.relative_to(root)} names another version than pyproject.toml: run `make version`\n"
            )
        else:
            file.write_text(text)
    if arguments.check and unwritten(root):
        sys.stderr.write(unwritten(root) + "\n")
    return 1 if arguments.check and (files or unwritten(root)) else 0


if __name__ == "__main__":
    sys.exit(main())
