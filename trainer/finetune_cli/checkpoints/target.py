"""What a command is about: ``s3://bucket/path`` of a job, and after an ``@`` one step of it."""

import re
from dataclasses import dataclass

from finetune_cli.errors import CannotTell

_TARGET = re.compile(r"(?P<prefix>s3://[^/@]+(/.*?)?)/*(@(?P<step>\d+))?")


@dataclass(frozen=True, slots=True)
class Target:
    """A job's prefix, without a slash at its end, and perhaps a step."""

    prefix: str
    step: int | None = None


def parse_target(text: str) -> Target:
    """Return the target.

    Raises:
        CannotTell: it is none.
    """
    match = _TARGET.fullmatch(text)
    if match is None:
        raise CannotTell(f"{text!r} is not a job's prefix: write s3://bucket/path, or s3://bucket/path@step")
    return Target(match["prefix"], None if match["step"] is None else int(match["step"]))
