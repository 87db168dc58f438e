"""What the real API server refuses, and what it tells users: the field, and what is allowed.

Creation is tried with ``dryRun``, which runs all of admission; changes are tried on objects that are really there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import yaml
from hypothesis import given, settings
from pydantic import ValidationError

from finetune_api.job import parse_job
from tests.api import strategies
from tests.api.api_server import ApiServer, Json, Refused
from tests.api.manifests import changed, minimal_job, recipe_job, script_job
from tests.api.refusals import WRONG, Wrong

E = TypeVar("E", bound=Exception)
EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*/job.yaml"))


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.because)
def test_refused_with_the_field_and_what_is_allowed(api: ApiServer, wrong: Wrong) -> None:
    with pytest.raises(Refused) as caught:
        api.create(wrong.manifest, dry_run=True)
    _expect(caught.value, wrong.path, wrong.says)


@pytest.mark.parametrize(
    "manifest", [minimal_job(), recipe_job(), script_job()], ids=lambda job: job["metadata"]["name"]
)
def test_what_users_write_is_accepted(api: ApiServer, manifest: Json) -> None:
    assert api.create(manifest, dry_run=True)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.parent.name)
def test_an_example_is_accepted(api: ApiServer, example: Path) -> None:
    jobs = [document for document in yaml.safe_load_all(example.read_text()) if document["kind"] == "FineTuneJob"]
    assert jobs
    for job in jobs:
        job["metadata"].pop("namespace", None)
        assert api.create(job, dry_run=True)


@given(manifest=strategies.jobs())
@settings(max_examples=100, deadline=None)
def test_server_and_types_read_the_same(api: ApiServer, manifest: Json) -> None:
    """What the API server stores, defaults and all, is what the types make of the manifest without it."""
    assert parse_job(api.create(manifest, dry_run=True)).spec == parse_job(manifest).spec


@given(manifest=strategies.edited_jobs())
@settings(max_examples=200, deadline=None)
def test_server_and_types_refuse_the_same(api: ApiServer, manifest: Json) -> None:
    by_types = _refused(lambda: parse_job(manifest), ValidationError)
    by_server = _refused(lambda: api.create(manifest, dry_run=True), Refused)
    assert by_server is None or by_server.status["code"] in (400, 422), by_server
    assert (by_types is None) == (by_server is None), f"types: {by_types}\nserver: {by_server}"


# Changes


@dataclass(frozen=True, slots=True)
class Change:
    """An edit of a stored job, refused at ``path`` with ``says``, or taken when there is no path."""

    what: str
    patch: Json
    path: str | None = None
    says: str = ""
    job: str = "recipe"


NEW_JOB = "cannot be changed after the job is created; create a new job"
SUSPEND_FIRST = "set suspend to true first"
TRAINING = recipe_job()["spec"]["recipe"]["training"]
# fmt: off
CHANGES = (
    Change("another learning rate", {"recipe": {"training": {"optimizer": {"learningRate": 1.0e-4}}}}, "spec.recipe", NEW_JOB),
    Change("another batch size", {"recipe": {"training": {"globalBatchSize": 32}}}, "spec.recipe", NEW_JOB),
    Change("labels in another order", {"recipe": {"task": {"labels": ["positive", "neutral", "negative"]}}}, "spec.recipe", NEW_JOB),
    Change("a field of the recipe taken out", {"recipe": {"training": {"microBatchSize": None}}}, "spec.recipe", NEW_JOB),
    Change("a field of the recipe added", {"recipe": {"training": {"schedule": {"name": "Cosine"}}}}, "spec.recipe", NEW_JOB),
    Change("a recipe becomes a script", {"recipe": None, "script": script_job()["spec"]["script"]}, "spec.recipe", NEW_JOB),
    Change("a recipe becomes a script (the script)", {"recipe": None, "script": script_job()["spec"]["script"]}, "spec.script", NEW_JOB),
    Change("a script becomes a recipe", {"script": None, "recipe": minimal_job()["spec"]["recipe"]}, "spec.script", NEW_JOB, "script"),
    Change("another command", {"script": {"command": ["python", "other.py"]}}, "spec.script", NEW_JOB, "script"),
    Change("another variable", {"script": {"environment": []}}, "spec.script", NEW_JOB, "script"),
    Change("storage appears", {"storage": {"uri": "s3://checkpoints"}}, "spec.storage", NEW_JOB, "script"),
    Change("storage disappears", {"storage": None}, "spec.storage", NEW_JOB),
    Change("storage moves", {"storage": {"uri": "s3://elsewhere"}}, "spec.storage", NEW_JOB),
    Change("another secret", {"storage": {"secretName": "other"}}, "spec.storage", NEW_JOB),
    Change("the secret disappears", {"storage": {"secretName": None}}, "spec.storage", NEW_JOB),
    Change("an unknown field", {"workers": {"replicas": 2}}, "spec.workers.replicas", "unknown field"),
    Change("steps beside seconds", {"checkpoint": {"interval": {"seconds": 60}}}, "spec.checkpoint.interval", "exactly one of"),
    Change("resumed", {"suspend": False}),
    Change("more nodes", {"workers": {"nodes": 4}}),
    Change("more memory while suspended", {"workers": {"resources": {"memory": "6Gi"}}}),
    Change("more memory when it is resumed", {"suspend": False, "workers": {"resources": {"memory": "6Gi"}}}),
    Change("more memory when it is suspended", {"suspend": True, "workers": {"resources": {"memory": "6Gi"}}}, job="running"),
    Change("more nodes and spares while it runs", {"workers": {"nodes": 4, "spares": 1}}, job="running"),
    Change("more memory while it runs", {"workers": {"resources": {"memory": "6Gi"}}}, "spec.workers", SUSPEND_FIRST, "running"),
    Change("another profile while it runs", {"workers": {"profile": "large"}}, "spec.workers", SUSPEND_FIRST, "running"),
    Change("more processes while it runs", {"workers": {"processesPerNode": 2}}, "spec.workers", SUSPEND_FIRST, "running"),
    Change("more staging memory while it runs", {"checkpoint": {"stagingMemory": "2Gi"}}, "spec.checkpoint.stagingMemory", SUSPEND_FIRST, "running"),
    Change("more staging memory when it is suspended", {"suspend": True, "checkpoint": {"stagingMemory": "2Gi"}}, job="running"),
    Change("more staging memory before there are pods", {"checkpoint": {"stagingMemory": "2Gi"}}, job="new"),
    Change("another checkpoint interval while it runs", {"checkpoint": {"interval": {"seconds": 60}}}, job="running"),
    Change("another profile before there are pods", {"workers": {"profile": "large", "processesPerNode": 2}}, job="new"),
    Change("another checkpoint interval", {"checkpoint": {"interval": {"steps": None, "seconds": 60}}}),
    Change("another metric to keep the best by", {"checkpoint": {"keepBest": "MacroF1"}}),
    Change("a metric to keep the best by that is not measured", {"checkpoint": {"keepBest": "Perplexity"}}, "spec.checkpoint.keepBest", "one of recipe.evaluation.metrics"),
    Change("another size of staging and pace of uploads", {"checkpoint": {"stagingMemory": "2Gi", "uploadBytesPerSecond": "100Mi"}}),
    Change("no checkpoint settings any more", {"checkpoint": None}),
    Change("more restarts", {"recovery": {"maxRestarts": 20}}),
    Change("a deadline", {"activeDeadlineSeconds": 3600, "ttlSecondsAfterFinished": 60, "podTTLSecondsAfterFinished": 0}),
)
# fmt: on


@pytest.fixture(scope="module")
def stored(api: ApiServer) -> Iterator[dict[str, Json]]:
    """Jobs by how they are. No operator touches those that are not suspended: their profile is unknown to it."""
    awake = {"spec.suspend": False, "spec.workers": {"profile": "nobodys"}}
    jobs = {
        "recipe": api.create(recipe_job("stored-recipe")),
        "script": api.create(script_job("stored-script")),
        "new": api.create(changed(script_job("stored-new"), awake)),
        "running": api.create(changed(script_job("stored-running"), awake)),
    }
    jobs["running"] = api.merge(jobs["running"], {"status": {"gang": gang(1)}}, subresource="status")
    yield jobs
    for job in jobs.values():
        api.delete(job)


@pytest.mark.parametrize(
    "change", CHANGES, ids=lambda change: f"{change.what}: {'refused' if change.path else 'taken'}"
)
def test_a_change_of_spec(api: ApiServer, stored: dict[str, Json], change: Change) -> None:
    def merge() -> Json:
        return api.merge(stored[change.job], {"spec": change.patch}, dry_run=True)

    if change.path is None:
        assert merge()
        return
    with pytest.raises(Refused) as caught:
        merge()
    _expect(caught.value, change.path, (change.says,))


def test_the_checkpoint_interval_changes_with_a_plain_apply(api: ApiServer) -> None:
    """A default that the API server had stored would stay beside what the user sets now."""
    job = minimal_job("interval") | {"spec": minimal_job()["spec"] | {"suspend": True}}
    api.apply(job)
    try:
        for interval in ({"steps": 50}, {"seconds": 60}, {"auto": True}):
            job["spec"]["checkpoint"] = {"interval": interval}
            defaults = {"keep": 2, "stagingMemory": "1Gi"}
            assert api.apply(job)["spec"]["checkpoint"] == {"interval": interval} | defaults
    finally:
        api.delete(job)


# Status


@dataclass(frozen=True, slots=True)
class Step:
    """Status before, a merge patch of it, and where and why it is refused; without a path it is taken."""

    what: str
    before: Json
    patch: Json | None
    path: str | None = None
    says: str = ""


def gang(generation: int) -> Json:
    return {"generation": generation, "nodes": 2}


def conditions(**statuses: str) -> Json:
    moment = "2026-01-01T00:00:00Z"
    return {
        "conditions": [
            {"type": name, "status": status, "reason": "Tested", "lastTransitionTime": moment}
            for name, status in statuses.items()
        ]
    }


FALLS, STAYS = "cannot fall", "create a new job to continue it"
# fmt: off
STEPS = (
    Step("the generation falls", {"gang": gang(3)}, {"gang": gang(2)}, "status.gang.generation", FALLS),
    Step("the gang disappears", {"gang": gang(3)}, {"gang": None}, "status.gang.generation", FALLS),
    Step("status disappears", {"gang": gang(3)}, None, "status.gang.generation", FALLS),
    Step("Complete becomes false", conditions(Complete="True"), conditions(Complete="False"), "status.conditions", STAYS),
    Step("Complete becomes unknown", conditions(Complete="True"), conditions(Complete="Unknown"), "status.conditions", STAYS),
    Step("Complete disappears", conditions(Complete="True"), conditions(Ready="True"), "status.conditions", STAYS),
    Step("Failed becomes false", conditions(Failed="True"), conditions(Failed="False"), "status.conditions", STAYS),
    Step("Failed becomes Complete", conditions(Failed="True"), conditions(Complete="True"), "status.conditions", STAYS),
    Step("all conditions disappear", conditions(Failed="True"), {"conditions": None}, "status.conditions", STAYS),
    Step("a condition twice", {}, {"conditions": conditions(Ready="True")["conditions"] * 2}, "status.conditions[1]", "Duplicate"),
    Step("an unknown phase", {}, {"phase": "Sleeping"}, "status.phase", "Recovering"),
    Step("the first generation", {}, {"gang": gang(1)}),
    Step("the next generation", {"gang": gang(3)}, {"gang": gang(4)}),
    Step("progress within a generation", {"gang": gang(3)}, {"gang": {"ready": 2}}),
    Step("Ready becomes false", conditions(Ready="True"), conditions(Ready="False")),
    Step("Complete, and something else changes", conditions(Complete="True"), conditions(Complete="True", Ready="True")),
)
# fmt: on


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.what}: {'refused' if step.path else 'taken'}")
def test_a_change_of_status(api: ApiServer, step: Step) -> None:
    job = api.create(script_job("status"))
    try:
        if step.before:
            api.merge(job, {"status": step.before}, subresource="status")
        if step.path is None:
            assert api.merge(job, {"status": step.patch}, subresource="status", dry_run=True)
            return
        with pytest.raises(Refused) as caught:
            api.merge(job, {"status": step.patch}, subresource="status", dry_run=True)
        _expect(caught.value, step.path, (step.says,))
    finally:
        api.delete(job)


def test_a_user_cannot_write_status_beside_spec(api: ApiServer) -> None:
    assert "status" not in api.create(script_job() | {"status": {"phase": "Succeeded"}}, dry_run=True)


def _expect(refused: Refused, path: str, says: tuple[str, ...]) -> None:
    told = " ".join(refusal.message for refusal in refused.refusals if refusal.path == path)
    assert told, f"nothing was said about {path}: {refused}"
    for words in says:
        assert words.lower() in told.lower()


def _refused(attempt: Callable[[], object], error: type[E]) -> E | None:
    try:
        attempt()
    except error as refusal:
        return refusal
    return None
