"""The image of light jobs: the operator's own, which has Python, and on top of it a torchrun without torch and the light trainer.

Torch takes seconds of a processor for each start of a rank; with it, a hundred seeds would be a hundred times waiting for imports.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.cluster import images
from tests.cluster.cluster import Cluster

_PACKAGES = "opt/venv/lib/python3.11/site-packages"
_TORCH = Path(__file__).resolve().parents[1] / "agent" / "fake_torch"
_TRAINER = Path(__file__).resolve().parent / "image"


def load(cluster: Cluster) -> str:
    """Bring the image to every node, and return its name."""
    files = {
        f"{_PACKAGES}/{file.relative_to(root)}": file.read_bytes()
        for root in (_TORCH, _TRAINER)
        for file in sorted(root.rglob("*.py"))
    }
    digest = hashlib.sha256(repr((cluster.operator_image, files)).encode()).hexdigest()
    name = f"localhost/finetune-light:{digest[:12]}"
    with images.lock():
        images.derive(name, cluster.operator_image, files)
        for node in cluster.nodes():
            images.load_on_node(name, node)
    return name
