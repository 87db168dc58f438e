"""Is what a job reads still what its checkpoints were trained on?

A recipe names its sources by URI, and whoever overwrites what lies there between two generations changes the order of samples, the
number of steps, the tokenizer or, under an adapter, the frozen weights, and nothing of that shows in the recipe. So each checkpoint
says which version each file had, in the groups of :class:`Group`, and a generation that finds another one ends and names the file.

What a checkpoint does not say is not judged: not a group that it does not have, for nobody could tell then.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeAlias

from finetune_trainer.errors import BadData

Sources: TypeAlias = Mapping[str, Mapping[str, str]]
"""The version of each file by its URI, by the value of :class:`Group`."""


class Group(StrEnum):
    """What files are read for."""

    MODEL = "model"
    BASE = "base"
    """The weights that stay frozen: they are in no checkpoint, so who continues another job's must find the same ones."""
    TRAIN = "train"


def require_unchanged(then: Sources, now: Sources, checkpoint: str) -> None:
    """Return if a job reads what its checkpoint was trained on.

    Raises:
        BadData: a file is another one, gone or new; the message names it.
    """
    for group in (group for group in Group if group in then and group in now):
        if change := _change(then[group], now[group]):
            raise BadData(
                f"{change}. Checkpoint {checkpoint} was trained on the former, and a job is not continued on anything else: put back "
                "what was there, or start a new job, which may take up the checkpoint by spec.checkpoint.resumeFrom"
            )


def require_same_base(then: Sources, now: Sources, checkpoint: str) -> None:
    """Return if another job's checkpoint was trained on these frozen weights, as far as can be told: elsewhere may lie a copy.

    Raises:
        BadData: a file of theirs is another one.
    """
    before, after = then.get(Group.BASE, {}), now.get(Group.BASE, {})
    if before.keys() & after.keys() and (change := _change(before, after)):
        raise BadData(
            f"{change}. The adapters of checkpoint {checkpoint} (spec.checkpoint.resumeFrom) were trained beside the former and "
            "fit no other weights: put back what was there, or start without resumeFrom"
        )


def _change(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return what happened to the first file that is not what it was; nothing if all are."""
    for uri in sorted({*then, *now}):
        if then.get(uri) != now.get(uri):
            return f"{uri} has changed: it was {_told(then, uri)} and is {_told(now, uri)}"
    return ""


def _told(versions: Mapping[str, str], uri: str) -> str:
    return f"version {versions[uri]}" if uri in versions else "not there"


def sources_to_json(sources: Sources) -> dict[str, Any]:
    """Return the sources' part of a document: no field where nothing is known."""
    return {"sources": {group: dict(versions) for group, versions in sources.items()}} if sources else {}


def sources_from_json(document: Mapping[str, Any]) -> Sources:
    """Return the sources that a document tells.

    Raises:
        TypeError: it tells something else.
    """
    return {group: {**versions} for group, versions in {**document.get("sources", {})}.items()}
