"""The pages that users read, taken apart: fenced blocks, commands, what stands in inline code, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = {ROOT / "docs/reference/finetunejob.md"}
PAGES = sorted(
    {
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("README.md"),
        *(ROOT / "charts").rglob("README.md"),
    }
    - GENERATED
)
_BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_WITHIN = re.compile(r"\$\(([^()]*)\)")


@dataclass(frozen=True, slots=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True, slots=True)
class Command:
    """One command, without its comment, and what the page shows of its output."""

    block: Block
    words: tuple[str, ...]
    output: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.block}: {' '.join(self.words)}"

    def path(self, name: str) -> Path:
        """A file that it names: from the root of the repository, or where the page lies."""
        return next(
            (folder / name for folder in (ROOT, self.block.page.parent) if (folder / name).exists()), ROOT / name
        )


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        indent, language, body = found.groups()
        lines = (line.removeprefix(indent) for line in body.splitlines())
        yield Block(page, text.count("\n", 0, found.start()) + 1, language, "\n".join(lines) + "\n")


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def commands() -> list[Command]:
    """What a reader would type, also within ``$(…)``."""
    consoles = (_typed(block) for block in all_blocks("console"))
    shells = ([(line, ()) for line in _joined(block.text).splitlines()] for block in all_blocks("sh", "bash", "shell"))
    found = []
    for block, lines in [
        *zip(all_blocks("console"), consoles, strict=True),
        *zip(all_blocks("sh", "bash", "shell"), shells, strict=True),
    ]:
        for line, output in lines:
            for text in (*_WITHIN.findall(line), _WITHIN.sub("VALUE", line)):
                found += [Command(block, words, output) for words in _pipeline(text)]
    return found


def inline_commands() -> list[Command]:
    """What kubectl is told in the running text. Other commands are only named there, without what they need."""
    return [
        Command(Block(page, 1, "", text), words)
        for page in PAGES
        for text in sorted(inline_code(page))
        if re.match(r"kubectl (?!finetune )\S+ \S", text)
        for words in _pipeline(text)
    ]


def _pipeline(text: str) -> Iterator[tuple[str, ...]]:
    """The programs of a pipeline, without what they read from files."""
    words: list[str] = []
    for word in [*shlex.split(re.sub(r" < \S+", "", text), comments=True), "|"]:
        if word != "|":
            words.append(word)
        elif words:
            yield tuple(words)
            words = []


def _typed(block: Block) -> list[tuple[str, tuple[str, ...]]]:
    typed: list[tuple[str, tuple[str, ...]]] = []
    for line in _joined(block.text).splitlines():
        if line.startswith("$ "):
            typed.append((line.removeprefix("$ "), ()))
        elif typed:
            typed[-1] = (typed[-1][0], (*typed[-1][1], line))
    return typed


def _joined(text: str) -> str:
    return re.sub(r"\\\n\s*", "", text)


def inline_code(page: Path) -> set[str]:
    return set(_INLINE.findall(_BLOCK.sub("", page.read_text())))


def links(page: Path) -> set[str]:
    found = set(_LINK.findall(_BLOCK.sub("", page.read_text())))
    return {link for link in found if not re.match(r"[a-z]+:", link)}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", title) for title in _HEADING.findall(_BLOCK.sub("", page.read_text())))
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}
