"""What the jobs of the tests train on: a tiny classifier and sentences with a lesson in them, in the cluster's own S3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster
from tests.cluster.object_store import BUCKET, ObjectStore
from tests.trainer.sentences import LABELS, rated_sentences

SECRET = "s3-credentials"


def make_namespace(cluster: Cluster, name: str, *, secret: bool = True) -> None:
    """Make a namespace that enforces the Pod Security Standard "restricted", with the store's credentials in it."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    if secret:
        make_secret(cluster, name)


def make_secret(cluster: Cluster, namespace: str, keys: ObjectStore | None = None) -> None:
    """Make the secret with the store's credentials: those that may do everything, or other ``keys``."""
    keys = keys or cluster.s3
    data = {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key}
    metadata = {"name": SECRET, "namespace": namespace}
    cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data})


def upload_inputs(cluster: Cluster, folder: Path) -> None:
    """Put model and data of the tests into S3."""
    from tests.trainer.tiny_models import save_bert

    client = cluster.s3.client()
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)
    upload_model(cluster, save_bert(folder / "bert"))
    for name, count, seed in (("train", 256, 1), ("evaluation", 64, 2)):
        put_data(cluster, f"{name}.jsonl", rated_sentences(count, seed=seed))


def upload_model(cluster: Cluster, folder: Path) -> str:
    """Put a model into S3 under the folder's name and return its URI."""
    for file in folder.iterdir():
        cluster.s3.client().upload_file(str(file), BUCKET, f"models/{folder.name}/{file.name}")
    return f"s3://{BUCKET}/models/{folder.name}"


def put_data(cluster: Cluster, name: str, rows: list[dict[str, str]] | bytes) -> str:
    """Put one data file into S3 and return its URI."""
    body = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
    cluster.s3.client().put_object(Bucket=BUCKET, Key=f"data/{name}", Body=body)
    return f"s3://{BUCKET}/data/{name}"


def recipe_spec(cluster: Cluster, *, steps: int = 12, nodes: int = 2, train: str = "train.jsonl") -> dict[str, Any]:
    """Return a spec that trains the tiny classifier in seconds."""
    return {
        "recipe": {
            "model": {"source": f"s3://{BUCKET}/models/bert"},
            "task": {"type": "SequenceClassification", "labels": list(LABELS)},
            "data": {
                "train": {"source": f"s3://{BUCKET}/data/{train}"},
                "evaluation": {"source": f"s3://{BUCKET}/data/evaluation.jsonl"},
                "maxTokens": 32,
            },
            "training": {
                "steps": steps,
                "globalBatchSize": 16,
                "microBatchSize": 8,
                "precision": "FP32",
                "optimizer": {"learningRate": 0.002},
            },
            "evaluation": {"metrics": ["Accuracy", "MacroF1"]},
        },
        "storage": {"uri": f"s3://{BUCKET}/jobs", "endpoint": cluster.s3.endpoint, "secretName": SECRET},
        "checkpoint": {"interval": {"steps": 5}},
        "workers": workers(nodes),
    }


def script_spec(cluster: Cluster, code: str, *, nodes: int = 2, image: str | None = None) -> dict[str, Any]:
    """Return a spec that runs a piece of Python on every node."""
    return {
        "script": {"command": ["python", "-c", code], "image": image or cluster.trainer_image},
        "workers": workers(nodes),
    }


def workers(nodes: int) -> dict[str, Any]:
    return {"nodes": nodes, "resources": {"cpu": "1", "memory": "2Gi"}}
