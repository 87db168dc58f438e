"""The images of chaos: the operator's own, which has Python, with a few files more.

Light jobs: a torchrun without torch, and a trainer. Torch takes seconds of a processor for each start of a rank; with it, a hundred seeds would be a
hundred times waiting for imports.

An operator whose replicas have wall clocks of their own: a time namespace shifts other clocks only, and a library that is loaded before libc is not
at hand, so Python's own clocks are shifted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from tests.cluster import images
from tests.cluster.cluster import Cluster

_PACKAGES = "opt/venv/lib/python3.11/site-packages"
_FIRST_ON_PATH = "app/operator"
_HERE = Path(__file__).resolve().parent


def load_light(cluster: Cluster) -> str:
    """Bring the image of light jobs to every node, and return its name."""
    torch = _files(_HERE.parent / "agent" / "fake_torch", _PACKAGES)
    return _load(cluster, "localhost/finetune-light", torch | _files(_HERE / "light", _PACKAGES))


def load_skewed_operator(cluster: Cluster) -> str:
    """Bring the image of an operator with a wrong clock to every node, and return its name."""
    return _load(cluster, "localhost/finetune-skewed", _files(_HERE / "skewed", _FIRST_ON_PATH))


def _files(folder: Path, target: str) -> dict[str, bytes]:
    return {f"{target}/{file.relative_to(folder)}": file.read_bytes() for file in sorted(folder.rglob("*.py"))}


def _load(cluster: Cluster, repository: str, files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256(repr((cluster.operator_image, files)).encode()).hexdigest()
    name = f"{repository}:{digest[:12]}"
    with images.lock():
        images.derive(name, cluster.operator_image, files)
        for node in cluster.nodes():
            images.load_on_node(name, node)
    return name
