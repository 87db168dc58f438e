"""Attempts at saves: folders below ``checkpoints/``. Those that ``HEAD`` does not list are remains, or saves under way. Pure."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from finetune_trainer.checkpoint.commit import CHECKPOINTS_KEY
from finetune_trainer.checkpoint.head import Head
from finetune_trainer.object_store import ObjectInfo

_FOLDER = re.compile(re.escape(CHECKPOINTS_KEY) + r"step-(?P<step>\d+)/g(?P<generation>\d+)-[^/]+/")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at one save: its objects, and their size together."""

    folder: str
    step: int
    generation: int
    uris: tuple[str, ...]
    size_bytes: int


def uncommitted(objects: Iterable[ObjectInfo], prefix: str, head: Head | None) -> list[Attempt]:
    """Return the attempts that ``HEAD`` does not list, newest first. Objects that lie elsewhere are nobody's attempt."""
    listed = set() if head is None else {kept.folder for kept in head.kept}
    found: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in objects:
        match = _FOLDER.match(info.uri.removeprefix(f"{prefix}/"))
        if match is not None and match[0] not in listed:
            found[match[0]].append(info)
    attempts = (_attempt(folder, infos) for folder, infos in found.items())
    return sorted(attempts, key=lambda attempt: (attempt.step, attempt.generation, attempt.folder), reverse=True)


def is_dead(attempt: Attempt, head: Head) -> bool:
    """Whether it can never be committed any more.

    A higher generation has fenced its own, or its own has committed a later step: an incarnation saves in rising steps, and a swap
    that still arrives for an earlier one finds its ETag gone.
    """
    later = any(_place(kept.folder) >= (attempt.generation, attempt.step) for kept in head.kept)
    return attempt.generation < head.generation or (attempt.generation == head.generation and later)


def _place(folder: str) -> tuple[int, int]:
    match = _FOLDER.match(folder)
    return (0, 0) if match is None else (int(match["generation"]), int(match["step"]))


def _attempt(folder: str, infos: list[ObjectInfo]) -> Attempt:
    match = _FOLDER.match(folder)
    assert match is not None, folder
    uris = tuple(info.uri for info in infos)
    return Attempt(folder, int(match["step"]), int(match["generation"]), uris, sum(info.size for info in infos))
