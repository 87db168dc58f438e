"""Whole manifests to start from, and ways to spoil them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tests.api.api_server import Json

GONE = object()  # as a value: take the field out


def minimal_job(name: str = "minimal") -> Json:
    """The least that a user can write."""
    return _job(
        name,
        {
            "recipe": {
                "model": {"source": "s3://models/minilm"},
                "task": {"type": "CausalLM"},
                "data": {"train": {"source": "s3://datasets/reviews.jsonl"}},
                "training": {"steps": 10, "globalBatchSize": 8},
            },
            "storage": {"uri": "s3://checkpoints"},
        },
    )


def recipe_job(name: str = "sentiment") -> Json:
    """The example of the design: a classifier, evaluated, with everything that users usually write."""
    return _job(
        name,
        {
            "recipe": {
                "model": {"source": "s3://models/minilm"},
                "task": {"type": "SequenceClassification", "labels": ["negative", "neutral", "positive"]},
                "data": {
                    "train": {"source": "s3://datasets/reviews/train.jsonl"},
                    "evaluation": {"source": "s3://datasets/reviews/evaluation.jsonl"},
                    "columns": {"text": "text", "label": "label"},
                    "maxTokens": 128,
                },
                "tuning": {"method": "Full"},
                "training": {
                    "epochs": 2,
                    "globalBatchSize": 64,
                    "microBatchSize": 16,
                    "precision": "BF16",
                    "optimizer": {"name": "AdamW", "learningRate": 2.0e-5, "weightDecay": 0.01},
                    "schedule": {"name": "Linear", "warmupRatio": 0.1},
                    "maxGradientNorm": 1.0,
                    "seed": 42,
                },
                "evaluation": {"everySteps": 50, "metrics": ["Accuracy", "MacroF1"]},
                "zero": {"stage": 2, "offload": {"optimizer": "None", "parameters": "None"}},
            },
            "storage": {
                "uri": "s3://checkpoints/team-a",
                "endpoint": "http://store:8333",
                "secretName": "s3-credentials",
            },
            "checkpoint": {"interval": {"steps": 50}, "keep": 2},
            "workers": {
                "nodes": 2,
                "processesPerNode": 1,
                "resources": {"cpu": "1", "memory": "3Gi", "gpus": 0},
                "profile": "default",
            },
            "suspend": True,  # so that no operator takes up the jobs of these tests
            "recovery": {"maxRestarts": 8, "windowSeconds": 86400, "hangSeconds": 60},
        },
    )


def script_job(name: str = "script") -> Json:
    """Any program in any image, without a store of ours."""
    return _job(
        name,
        {
            "script": {
                "command": ["python", "train.py"],
                "image": "registry.example.com/team/train:1.0",
                "environment": [{"name": "EPOCHS", "value": "3"}],
            },
            "suspend": True,
        },
    )


def changed(manifest: Json, changes: Mapping[str, Any]) -> Json:
    """A copy with values put at dotted paths; ``GONE`` takes a field out, and what lies on the way is made."""
    manifest = copy.deepcopy(manifest)
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = manifest
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is GONE:
            del place[last]
        else:
            place[last] = copy.deepcopy(value)
    return manifest


def _job(name: str, spec: Json) -> Json:
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
