"""The CRD: fresh, small, described, and what the API server makes of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.crd import build_crd, crd_yaml
from tests.api.api_server import ApiServer, Json
from tests.api.manifests import minimal_job, script_job
from tests.cluster import Cluster

ROOT = Path(__file__).parents[2]
BYTES_LIMIT = 100_000
(VERSION,) = build_crd()["spec"]["versions"]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
# The API server describes these itself.
ITS_OWN = {"apiVersion", "kind", "metadata", "metadata.name"}


def fields(schema: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    for name, child in schema.get("properties", {}).items():
        where = f"{path}.{name}".lstrip(".")
        yield where, child
        yield from fields(child, where)
        yield from fields(child.get("items", {}), f"{where}[]")


def test_generated_files_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune_api", "--check"], cwd=ROOT, env={"PYTHONPATH": "crds"}, capture_output=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()


def test_it_is_small() -> None:
    assert len(crd_yaml().encode()) < BYTES_LIMIT


def test_every_field_is_described() -> None:
    assert [path for path, field in fields(SCHEMA) if path not in ITS_OWN and not field.get("description")] == []


def test_every_string_list_and_number_of_spec_is_bounded() -> None:
    """Unbounded ones cost CEL its budget, and etcd its space."""
    bounds = {"string": {"maxLength", "enum"}, "array": {"maxItems"}, "integer": {"maximum"}, "number": {"maximum"}}
    spec = [(path, field) for path, field in fields(SCHEMA) if path.startswith("spec")]
    items = [(f"{path}[]", field["items"]) for path, field in spec if "items" in field]
    unbounded = [
        path for path, field in spec + items if field.get("type") in bounds and not bounds[field["type"]] & set(field)
    ]
    assert unbounded == []


def test_the_api_server_fills_in_the_defaults(api: ApiServer) -> None:
    assert api.create(minimal_job(), dry_run=True)["spec"] == {
        "recipe": {
            "model": {"source": "s3://models/minilm", "initialization": "Pretrained"},
            "task": {"type": "CausalLM"},
            "data": {
                "train": {"source": "s3://datasets/reviews.jsonl"},
                "columns": {"text": "text", "label": "label"},
                "maxTokens": 512,
            },
            "tuning": {"method": "Full"},
            "training": {
                "steps": 10,
                "globalBatchSize": 8,
                "precision": "BF16",
                "optimizer": {
                    "name": "AdamW",
                    "learningRate": 2e-05,
                    "weightDecay": 0,
                    "beta1": 0.9,
                    "beta2": 0.999,
                    "epsilon": 1e-08,
                },
                "schedule": {"name": "Linear"},
                "maxGradientNorm": 1,
                "seed": 42,
                "onLossSpike": "RollBack",
                "gradientCheckpointing": False,
            },
            "zero": {"stage": 2, "offload": {"optimizer": "None", "parameters": "None"}},
        },
        "storage": {"uri": "s3://checkpoints"},
        "checkpoint": {"keep": 2, "stagingMemory": "1Gi"},
        "workers": {
            "nodes": 1,
            "resources": {"cpu": "1", "memory": "4Gi", "gpus": 0},
            "spares": 0,
            "profile": "default",
        },
        "suspend": False,
        "recovery": {"maxRestarts": 8, "windowSeconds": 86400, "hangSeconds": 60},
    }


def test_the_api_server_finds_the_schema_structural(api: ApiServer, cluster: Cluster) -> None:
    crd = cluster.get("customresourcedefinition", "finetunejobs.finetune.dev")
    conditions = {condition["type"]: condition["status"] for condition in crd["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}


PUBLISHED_SECONDS = 60.0  # the API server makes its OpenAPI documents some seconds after a CRD is established


@pytest.mark.parametrize("path", ["spec.recipe.zero.stage", "spec.storage.secretName", "status.gang.generation"])
def test_kubectl_explains(api: ApiServer, cluster: Cluster, path: str) -> None:
    described = dict(fields(SCHEMA))[path]["description"]
    deadline = time.monotonic() + PUBLISHED_SECONDS
    while "DESCRIPTION" not in (said := cluster.kubectl("explain", f"ftj.{path}", check=False)):
        assert time.monotonic() < deadline, said
        time.sleep(0.3)
    assert " ".join(described.split()) in " ".join(said.split())


def test_kubectl_shows_what_people_look_for(api: ApiServer, cluster: Cluster) -> None:
    job = api.create(script_job("columns"))
    try:
        progress = STATUS["progress"] | {"estimatedCompletionTime": "2999-01-01T00:00:00Z"}
        api.merge(job, {"status": STATUS | {"progress": progress}}, subresource="status")
        get = ("get", "ftj", "columns", "--namespace", api.namespace)
        header, row = (line.split() for line in cluster.kubectl(*get).splitlines())
        wide, wide_row = (line.split() for line in cluster.kubectl(*get, "-o", "wide").splitlines())
    finally:
        api.delete(job)
    assert header == [name.upper() for name in _columns(priority=0)]
    assert row[:7] == ["columns", "Succeeded", "36", "120", "0.61", "2", "1"]
    assert wide == [name.upper() for name in _columns(priority=1)]
    assert wide_row[wide.index("ETA")] == "2999-01-01T00:00:00Z"


def test_jobs_are_found_by_phase_and_by_category(api: ApiServer, cluster: Cluster) -> None:
    job = api.create(script_job("found"))
    try:
        api.merge(job, {"status": STATUS}, subresource="status")
        where = ("--namespace", api.namespace, "-o", "name")
        assert "found" in cluster.kubectl("get", "ftj", "--field-selector", "status.phase=Succeeded", *where)
        assert "found" not in cluster.kubectl("get", "ftj", "--field-selector", "status.phase=Running", *where)
        assert "found" in cluster.kubectl("get", "finetune", *where)
        assert "found" in cluster.kubectl("get", "all", *where)
    finally:
        api.delete(job)


# Of a finished job: an operator that happens to run on the cluster leaves it as it is.
MOMENT = "2026-01-01T00:00:00Z"
STATUS: dict[str, Any] = {
    "phase": "Succeeded",
    "conditions": [{"type": "Complete", "status": "True", "reason": "Succeeded", "lastTransitionTime": MOMENT}],
    "completionTime": MOMENT,
    "gang": {"generation": 2, "nodes": 2, "ready": 2},
    "progress": {"step": 120, "totalSteps": 330, "percent": 36, "loss": 0.61, "updateTime": MOMENT},
    "restarts": {"total": 1},
}


def _columns(*, priority: int) -> list[str]:
    return ["Name"] + [c["name"] for c in VERSION["additionalPrinterColumns"] if c.get("priority", 0) <= priority]
