"""What is wrong in a manifest is told before anything is sent, with the line and the field."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from finetune_client import Fault, Refused, read_manifests
from finetune_client.manifest import located
from tests.api.manifests import minimal_job, recipe_job, script_job
from tests.api.refusals import WRONG, Wrong

JOB = """\
# comments count
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: sentiment}
spec:
  script:
    command: [python, train.py]
    image: registry.example/any:1
    environment:
      - name: GREETING
        value: hello
  workers:
    nodes: 2
"""


def faults(text: str) -> list[Fault]:
    with pytest.raises(Refused) as caught:
        read_manifests(text)
    return list(caught.value.faults)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.because)
def test_every_wrong_manifest_is_told_with_its_line(wrong: Wrong):
    text = json.dumps(wrong.manifest, indent=1)  # YAML too
    path = wrong.types_path or wrong.path
    told = [fault for fault in faults(text) if fault.path == path]
    assert told, path
    assert told[0].line is not None
    assert innermost_key(wrong.manifest, path) in text.splitlines()[told[0].line - 1]


def innermost_key(manifest: Any, path: str) -> str:
    """Return the last key on a field's path that is written at all."""
    found = ""
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(manifest, list):
            manifest = manifest[int(part)]
        elif isinstance(manifest, dict) and part in manifest:
            manifest, found = manifest[part], part
        else:
            break
    return found if not isinstance(manifest, str) else ""


@pytest.mark.parametrize("job", [minimal_job(), recipe_job(), script_job()], ids=lambda job: job["metadata"]["name"])
def test_what_is_right_is_read_from_yaml_and_from_json(job):
    for text in (yaml.safe_dump(job), json.dumps(job)):
        (manifest,) = read_manifests(text)
        assert (manifest.body, manifest.name) == (job, job["metadata"]["name"])


# id: (what is changed in the job above, where and what is told)
SPOILED = {
    "an unknown field": (("nodes: 2", "node: 2"), "13: spec.workers.node: is no field; did you mean nodes?"),
    "a field in another case": (("nodes: 2", "processespernode: 2"), "13: spec.workers.processespernode: is no field; did you mean processesPerNode?"),
    "a field like no other": (("nodes: 2", "zzz: 2"), "13: spec.workers.zzz: is no field"),
    "text for a number": (("nodes: 2", "nodes: '2'"), "13: spec.workers.nodes: input should be a valid integer"),
    "an element of a list": (("name: GREETING", "name: PATH"), "10: spec.script.environment[0].name"),
    "a missing field": (("    command: [python, train.py]\n", ""), "6: spec.script.command: is required"),
    "a key that stands twice": (("nodes: 2", "nodes: 2\n    nodes: 3"), "14: spec.workers.nodes: stands here again, after line 13"),
    "another kind": (("FineTuneJob", "Pod"), "3: kind: must be apiVersion: finetune.dev/v1alpha1, kind: FineTuneJob; for anything else there is kubectl"),
    "no kind": (("kind: FineTuneJob\n", ""), "2: kind: must be"),
    "no name": (("{name: sentiment}", "{}"), "4: metadata.name: is required"),
    "no YAML": (("[python, train.py]", "[python"), "8: "),
}  # fmt: skip


@pytest.mark.parametrize(("change", "told"), SPOILED.values(), ids=SPOILED.keys())
def test_a_fault_names_line_field_and_cause(change, told):
    assert change[0] in JOB
    (fault, *_) = faults(JOB.replace(*change))
    assert f"{fault.line}: {fault.path}: {fault.message}".startswith(told)


def test_all_faults_of_all_jobs_are_told_in_the_order_of_lines():
    text = f"{JOB.replace('nodes: 2', 'nodes: 0')}---\n{JOB}---\n{JOB.replace('nodes: 2', 'nodes: x')}"
    assert [fault.line for fault in faults(text)] == [13, 41]


def test_several_jobs_are_read_and_empty_documents_left_out():
    other = JOB.replace("sentiment", "other")
    assert [manifest.name for manifest in read_manifests(f"---\n{JOB}---\n---\n{other}---\n")] == ["sentiment", "other"]


@pytest.mark.parametrize("text", ["", "---\n", "# nothing\n"])
def test_a_text_without_a_job_is_refused(text: str):
    assert faults(text) == [Fault("there is no job in it")]


def test_numbers_and_dates_are_read_as_kubectl_reads_them():
    learning_rate = recipe_job()
    text = yaml.safe_dump(learning_rate).replace("2.0e-05", "2e-5").replace("sentiment", "2026-01-01")
    (manifest,) = read_manifests(text)
    assert manifest.body["spec"]["recipe"]["training"]["optimizer"]["learningRate"] == 2e-5
    assert manifest.name == "2026-01-01"


def test_what_the_api_server_finds_is_told_with_its_line_too():
    (manifest,) = read_manifests(JOB)
    assert located(Fault("no", "spec.script.environment[0].value"), manifest).line == 11
    assert (
        located(Fault("no", "spec.workers.spares"), manifest).line == 12
    )  # not written: the line of what it belongs to
