"""Logs as programs read them, and what never stands in them."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from finetune_operator.observability.logs import JsonFormatter, TextFormatter, about, redact
from finetune_operator.settings import Logging

logger = logging.getLogger("finetune_operator.test")
TOKEN = "eyJhbGciOiJSUzI1NiIsImtpZCI6ImEifQ.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged, as JSON lines."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(JsonFormatter().format(record))
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield told
    root.removeHandler(handler)
    root.setLevel(level)


def test_a_line_is_an_object_whatever_stands_in_it(lines: list[str]) -> None:
    logger.warning('two\nlines and a "quote": %s', "é")
    (entry,) = map(json.loads, lines)
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "WARNING",
        "logger": "finetune_operator.test",
        "message": 'two\nlines and a "quote": é',
    }


def test_lines_about_a_job_say_so_and_others_do_not(lines: list[str]) -> None:
    with about(namespace="team-a", job="sentiment", uid="u", generation=3):
        logger.info("here")
        logger.info("a rank of an ended generation", extra={"generation": 2, "rank": 1})
        with about(rank=0):
            logger.info("inside")
    logger.info("elsewhere")
    fields = [
        {name: value for name, value in json.loads(line).items() if name not in ("time", "level", "logger", "message")}
        for line in lines
    ]
    job = {"namespace": "team-a", "job": "sentiment", "uid": "u"}
    assert fields == [
        job | {"generation": 3},
        job | {"generation": 2, "rank": 1},
        job | {"generation": 3, "rank": 0},
        {},
    ]


def test_what_is_not_known_yet_is_no_field(lines: list[str]) -> None:
    with about(namespace="team-a", job="sentiment", uid=None, generation=None):
        logger.info("a job that is gone")
    assert json.loads(lines[0]).keys() == {"time", "level", "logger", "message", "namespace", "job"}


def test_kopfs_lines_carry_the_job_and_not_the_pod_that_they_are_about(lines: list[str]) -> None:
    reference = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "name": "a",
        "uid": "u",
        "namespace": "n",
    }
    kopf = logging.getLogger("kopf.objects")
    kopf.info("seen", extra={"k8s_ref": reference})
    kopf.info("seen", extra={"k8s_ref": reference | {"kind": "Pod", "name": "p"}})
    first, second = map(json.loads, lines)
    assert (first["namespace"], first["job"], first["uid"]) == ("n", "a", "u")
    assert "job" not in second


def test_an_exception_has_its_traceback_without_secrets(lines: list[str]) -> None:
    try:
        int(f"Bearer {TOKEN}")
    except ValueError:
        logger.exception("a bug")
    entry = json.loads(lines[0])
    assert "ValueError: invalid literal for int() with base 10: 'Bearer [redacted]'" in entry["exception"]
    assert "Traceback" in entry["exception"]
    assert TOKEN not in lines[0]


SECRETS = {
    "a service account's token": (f"sent {TOKEN} to", TOKEN),
    "a bearer token of another kind": ("Authorization: Bearer abcdefghijklmnop0123", "abcdefghijklmnop0123"),
    "a private key": ("a -----BEGIN EC PRIVATE KEY-----\nMHcCAQ\n-----END EC PRIVATE KEY----- b", "MHcCAQ"),
    "a private key that is cut off": ("-----BEGIN PRIVATE KEY-----\nMIIEvQ", "MIIEvQ"),
    "a password in an address": ("http://user:hunter2@proxy:3128/", "hunter2"),
    "an access key": ("key AKIAIOSFODNN7EXAMPLE is unknown", "AKIAIOSFODNN7EXAMPLE"),
    "a secret key in an environment": ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG", "wJalrXUtnFEMI"),
    "a secret key in JSON": ('{"secretAccessKey": "wJalrXUtnFEMI"}', "wJalrXUtnFEMI"),
    "a signed address": ("https://s3/b/k?X-Amz-Signature=0123abcd&X-Amz-Expires=60", "0123abcd"),
}


@pytest.mark.parametrize(("text", "secret"), SECRETS.values(), ids=SECRETS.keys())
def test_what_has_the_form_of_a_secret_is_taken_out(text: str, secret: str) -> None:
    assert secret not in redact(text)
    assert "[redacted]" in redact(text)
    record = logging.LogRecord("a", logging.INFO, "f", 1, "%s", (text,), None)
    for formatter in (JsonFormatter(), TextFormatter()):
        assert secret not in formatter.format(record)


@pytest.mark.parametrize(
    "text",
    [
        "a bearer token is required",
        "pods/sentiment-aaaaa-0-1 is forbidden: exceeded quota: compute, requested: pods=1",
        "GET https://198.18.0.253:6443/apis/finetune.dev/v1alpha1/finetunejobs: 503",
        "secret s3-credentials is missing the key AWS_SECRET_ACCESS_KEY",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


PROGRAM = """
import logging, warnings
from finetune_operator.observability.logs import configure_logging
from finetune_operator.settings import Logging
logging.basicConfig(level=logging.DEBUG)
configure_logging(Logging({settings}))
logging.getLogger("kopf").debug("fine print")
logging.getLogger("any.library").warning("a word")
warnings.warn("careful")
"""


@pytest.mark.parametrize(
    ("settings", "lines"),
    [("", 2), ('level="DEBUG"', 3), ('format="Text"', None)],
    ids=["as JSON", "as JSON with all detail", "as text"],
)
def test_a_process_logs_once_and_in_one_form(settings: str, lines: int | None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(settings=settings)], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    if lines is None:
        assert "WARNING any.library a word" in done.stderr
        return
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert len(told) == lines
    assert told[-2]["message"] == "a word"
    assert "careful" in told[-1]["message"]


def test_the_settings_of_a_log_are_few() -> None:
    assert Logging() == Logging(format="JSON", level="INFO")
    with pytest.raises(ValueError, match="format"):
        Logging(format="XML")
