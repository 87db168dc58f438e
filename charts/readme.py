"""Write the tables of values in the charts' READMEs from the comments in their values.yaml: ``python charts/readme.py [--check]``.

What stands above a key, or behind its value, is what the table says of it. A line ``# Title ----`` begins a section. A key that stands in a
comment (``# key: example    what it is``) is one that may be set and is not.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

CHARTS = Path(__file__).resolve().parent
TABLE = re.compile(r"(?<=<!-- values: generated from values.yaml by `make generate` -->\n).*(?=<!-- end of values -->)", re.DOTALL)  # fmt: skip
TITLE = re.compile(r"# (.+?) -{3,}")
UNSET = re.compile(r"\s*# (\w+): (.+?)\s{2,}(\S.*)")
HEAD = "| Value | Default | Meaning |\n|---|---|---|\n"


def readme(chart: Path) -> str:
    """Return the README of a chart with its tables as they should be."""
    text = (chart / "README.md").read_text()
    found = TABLE.search(text)
    if found is None:
        raise ValueError(f"{chart / 'README.md'} has no place for the table of values")
    return text[: found.start()] + tables((chart / "values.yaml").read_text()) + text[found.end() :]


def tables(values: str) -> str:
    """Return the tables of all values, one a section."""
    lines = values.splitlines()
    written, title = HEAD, ""
    root = yaml.compose(values)
    assert isinstance(root, yaml.MappingNode)
    for line, path, node in _leaves(root, ""):
        section = next((match[1] for above in reversed(lines[:line]) if (match := TITLE.fullmatch(above))), "")
        if section != title:
            written, title = f"{written}\n### {section}\n\n{HEAD}", section
        written += _row(path, _value(node), _meaning(lines, line, path))
        written += "".join(_unset(lines, line + 1, path))
    return written


def _leaves(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[int, str, yaml.Node]]:
    """Yield each key that has a value of its own: one written in braces is a value, one written as a block has keys."""
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _leaves(value, f"{path}.")
        else:
            yield key.start_mark.line, path, value


def _meaning(lines: list[str], line: int, path: str) -> str:
    """Return what stands above a key, or above the parent whose first key it is, and behind its value."""
    behind = lines[line].partition("  # ")[2]
    above: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("# ") and not TITLE.fullmatch(lines[line - 1]):
        line -= 1
        above.insert(0, lines[line].strip().removeprefix("# "))
    opens_parent = "." in path and line > 0 and lines[line - 1].strip() == f"{path.split('.')[-2]}:"
    parent = _meaning(lines, line - 1, path.rpartition(".")[0]) if opens_parent and not above else ""
    return " ".join(part for part in (parent, *above, _sentence(behind)) if part)


def _unset(lines: list[str], line: int, path: str) -> Iterator[str]:
    """Yield the keys that stand in comments below one that is set."""
    for text in lines[line:]:
        found = UNSET.fullmatch(text)
        if found is None:
            return
        yield _row(path.removesuffix(path.rpartition(".")[2]) + found[1], f"not set, e.g. `{found[2]}`", found[3])


def _value(node: yaml.Node) -> str:
    return f"`{json.dumps(yaml.safe_load(yaml.serialize(node)))}`"


def _row(path: str, value: str, meaning: str) -> str:
    if not meaning:
        raise ValueError(f"values.yaml says nothing of {path}: write it above the key, or behind its value")
    escaped = meaning.replace("|", "\\|").replace("<", "&lt;")
    return f"| `{path}` | {value} | {_sentence(escaped)} |\n"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def main() -> int:
    """Write the READMEs, or with ``--check`` tell which are stale."""
    parser = argparse.ArgumentParser(prog="python charts/readme.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is stale")
    check = parser.parse_args().check
    charts = sorted(path.parent for path in CHARTS.glob("*/Chart.yaml"))
    stale = [chart for chart in charts if (chart / "README.md").read_text() != readme(chart)]
    for chart in stale:
        if check:
            sys.stderr.write(f"{chart.name}/README.md is stale: run `make generate`\n")
        else:
            (chart / "README.md").write_text(readme(chart))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
