"""The Python types refuse what the API server refuses, at the same place and for the same reason."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from finetune_api.job import FineTuneJob, parse_job
from tests.api import strategies
from tests.api.manifests import minimal_job, recipe_job, script_job
from tests.api.refusals import WRONG, Wrong

RULE = re.compile(r"Value error, (?:(?P<field>[A-Za-z.]+): )?(?P<message>.*)", re.DOTALL)


def told(error: ValidationError) -> dict[str, str]:
    """What a user is told, by field path in the notation of the API server."""
    by_path: dict[str, str] = {}
    for detail in error.errors():
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).lstrip(".")
        rule = RULE.fullmatch(detail["msg"])
        if rule and rule["field"]:
            path = f"{path}.{rule['field']}".lstrip(".")
        by_path[path] = by_path.get(path, "") + (rule["message"] if rule else detail["msg"])
    return by_path


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.because)
def test_types_refuse(wrong: Wrong) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_job(wrong.manifest)
    messages, path = told(caught.value), wrong.types_path or wrong.path
    assert path in messages
    for words in wrong.types_say or wrong.says:
        assert words.lower() in messages[path].lower()


@pytest.mark.parametrize(
    "manifest", [minimal_job(), recipe_job(), script_job()], ids=lambda job: job["metadata"]["name"]
)
def test_what_users_write_is_understood(manifest: dict[str, object]) -> None:
    assert parse_job(manifest)


@given(strategies.jobs())
@settings(max_examples=100, deadline=None)
def test_a_job_survives_the_wire(manifest: dict[str, object]) -> None:
    job = parse_job(manifest)
    assert parse_job(job.to_wire()) == job
    assert FineTuneJob.model_validate(job.to_wire()) == job


def test_every_reason_to_refuse_is_a_sentence_of_its_own() -> None:
    reasons = [wrong.because for wrong in WRONG]
    assert len(set(reasons)) == len(reasons)
