"""A Kubernetes object at the border of the API: plain JSON."""

from typing import Any

KubeObject = dict[str, Any]
