"""The documents that the tests of the operator start from, each as a user or an administrator would write it."""

from datetime import UTC, datetime
from typing import Any

import yaml

from finetune_api.job import FineTuneJob, parse_job
from finetune_operator.settings import Settings

NOON = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
JOB_UID = "aaaaabbb-0000-4000-8000-000000000001"

RECIPE = """
recipe:
  model: {source: s3://models/minilm}
  task: {type: SequenceClassification, labels: [negative, positive]}
  data:
    train: {source: s3://datasets/reviews/train.jsonl}
    columns: {text: text, label: label}
  training: {steps: 100, globalBatchSize: 8}
storage: {uri: s3://checkpoints/team-a, endpoint: "http://store.example:8333", secretName: s3-credentials}
"""
SCRIPT = """
script: {command: [python, train.py], image: "registry.example/any:1"}
"""
SETTINGS = """
namespace: finetune-system
service: finetune-operator
operatorImage: registry.example/finetune-operator:0.1.0
allowedEndpoints: ["http://store.example:8333", amazon-s3]
profiles:
  default: {image: "registry.example/finetune-trainer:0.1.0"}
  fabric:
    image: registry.example/finetune-trainer:0.1.0
    imagePullPolicy: Always
    imagePullSecrets: [registry]
    nodeSelector: {fabric: infiniband}
    tolerations: [{key: gpu, operator: Exists}]
    sharedMemory: 8Gi
    priorityClassName: training
    runtimeClassName: nvidia
    environment: {NCCL_SOCKET_IFNAME: eth0}
    resources: {rdma/hca: "4", hugepages-2Mi: 1Gi}
"""


def settings(changes: str = "") -> Settings:
    """Return an administrator's settings, with changes at the top level."""
    return Settings.model_validate(yaml.safe_load(SETTINGS) | (yaml.safe_load(changes) or {}))


def job_body(spec: str = "", *, base: str = RECIPE, nodes: int = 2, **metadata: Any) -> dict[str, Any]:
    """Return a job of two nodes as the API server would, with changes at the top level of spec."""
    changes = yaml.safe_load(spec) or {}
    workers = {"nodes": nodes} | changes.pop("workers", {})
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {
            "name": "sentiment",
            "namespace": "team-a",
            "uid": JOB_UID,
            "generation": 1,
            "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T12:00:00Z",
            **metadata,
        },
        "spec": yaml.safe_load(base) | {"workers": workers} | changes,
    }


def a_job(spec: str = "", *, base: str = RECIPE, nodes: int = 2, **metadata: Any) -> FineTuneJob:
    """Return the same as the operator's own type."""
    return parse_job(job_body(spec, base=base, nodes=nodes, **metadata))
