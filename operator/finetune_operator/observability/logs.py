"""Logs of the whole process, of libraries too: a JSON object a line, or plain text, on standard error.

A line that concerns a job has fields for it: ``namespace``, ``job``, ``uid``, ``generation`` (of its gang), ``rank``. They come from ``about``,
which surrounds the work on a job, unless the record's own ``extra`` says otherwise; in kopf's lines, from its reference to the object.

No secret is logged on purpose. What texts of others carry into a line in spite of that (an API server that quotes a request, a traceback) is
taken out by its form, in both formats.
"""

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from finetune_api.contract import KIND
from finetune_operator.settings import Logging

FIELDS = ("namespace", "job", "uid", "generation", "rank")
REDACTED = "[redacted]"
_SECRETS = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"),  # a signed token
    re.compile(r"(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"(?i)(?<=bearer )[\w.~+/=-]{16,}"),
    re.compile(r"(?i)(?<=x-amz-signature=)\w+"),
    re.compile(
        r"(?i)(?:secret_?access_?key|session_?token|security-token|password|passwd)[\"']?\s*[=:]\s*[\"']?[^\s\"'&,;]+"
    ),
)

_about: ContextVar[Mapping[str, Any]] = ContextVar("about", default={})  # noqa: B039  never changed in place


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Give every line that is logged meanwhile, by this task and those it starts, these fields."""
    token = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(token)


def configure_logging(settings: Logging) -> None:
    """Log as the settings say, from now on and whatever was set up before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format == "JSON" else TextFormatter())
    logging.basicConfig(level=settings.level, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)


def redact(text: str) -> str:
    """Return ``text`` without what has the form of a secret."""
    for pattern in _SECRETS:
        text = pattern.sub(REDACTED, text)
    return text


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """For people who read along."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return redact(super().format(record))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    own = {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
    known = {**_from_kopf(record), **_about.get(), **own}
    return {name: known[name] for name in FIELDS if known.get(name) is not None}


def _from_kopf(record: logging.LogRecord) -> Mapping[str, Any]:
    reference = getattr(record, "k8s_ref", {})
    if reference.get("kind") != KIND:
        return {}
    return {"namespace": reference["namespace"], "job": reference["name"], "uid": reference["uid"]}
