"""What the site needs beyond mkdocs: every page has a place, links to files of the repository lead there, and lists are lists.

mkdocs knows only what lies below docs/. A link out of it is checked here, and becomes one into the repository where ``repo_url`` is known and plain
text where it is not. Its Markdown wants a blank line before a list, which CommonMark, and so everybody who reads the files as they are, does not.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("mkdocs.hooks")
_LIST_ITEM = re.compile(r"(?:-|\d+\.) ")
_LINK_OUT = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Fill folders of the navigation with their pages, and add the pages that are in none."""
    root = Path(config.docs_dir)
    pages = sorted(str(page.relative_to(root)) for page in root.rglob("*.md"))
    placed = _filled(config.nav, pages)
    rest = sorted(set(pages) - set(_leaves(placed)))
    config.nav = [*placed, *([{"More": rest}] if rest else [])]
    return config


def _filled(item: Any, pages: list[str]) -> Any:
    if isinstance(item, list):
        return [_filled(each, pages) for each in item]
    if isinstance(item, dict):
        return {title: _filled(each, pages) for title, each in item.items()}
    return [page for page in pages if page.startswith(item)] if item.endswith("/") else item


def _leaves(item: Any) -> list[str]:
    if isinstance(item, str):
        return [item]
    return [leaf for each in (item.values() if isinstance(item, dict) else item) for leaf in _leaves(each)]


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Lead links out of docs/ into the repository, and part lists from what stands before them."""
    root = Path(config.config_file_path).parent

    def lead(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), target))
        if path.startswith("docs/"):
            return link.group()
        if not (root / path).exists():
            _LOG.warning("%s links to %s, which is not in the repository", page.file.src_uri, path)
        return f"[{text}]({config.repo_url}/blob/main/{path}{anchor or ''})" if config.repo_url else text

    return _with_lists_apart(_LINK_OUT.sub(lead, markdown))


def _with_lists_apart(markdown: str) -> str:
    lines: list[str] = []
    in_code = in_list = False
    for line in markdown.splitlines():
        is_item = _LIST_ITEM.match(line) is not None
        if is_item and not (in_code or in_list) and lines and lines[-1]:
            lines.append("")
        in_code ^= line.startswith("```")
        in_list = not in_code and (is_item or (in_list and line.startswith(" ")))
        lines.append(line)
    return "\n".join(lines) + "\n"
