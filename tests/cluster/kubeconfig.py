"""Kubeconfig files: how each component and each person reaches the API server. Readable by root alone."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from tests.cluster.places import API_PORT, HOST_ADDRESS


def write(path: Path, authority: Path, user: Mapping[str, str], *, namespace: str = "default") -> Path:
    """`user` is what Kubernetes calls it: `token`, or `client-certificate-data` and `client-key-data`."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "finetune",
                "cluster": {
                    "server": f"https://{HOST_ADDRESS}:{API_PORT}",
                    "certificate-authority-data": encoded(authority),
                },
            }
        ],
        "users": [{"name": "user", "user": dict(user)}],
        "contexts": [{"name": "finetune", "context": {"cluster": "finetune", "user": "user", "namespace": namespace}}],
        "current-context": "finetune",
    }
    write_secret(path, yaml.safe_dump(document))
    return path


def encoded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def write_secret(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
