"""The operator on a cluster, installed as users install it: with Helm, from the project's charts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_NAMESPACE = "finetune-system"
RELEASE = "finetune-operator"
CRDS_RELEASE = "finetune-crds"


@dataclass(frozen=True)
class Images:
    """What the installation runs."""

    operator: str
    trainer: str


def install_operator(
    run: Callable[..., str],
    folder: Path,
    *,
    images: Images,
    endpoints: list[str],
    values: Mapping[str, Any] | None = None,
) -> None:
    """Install or upgrade both charts, and wait until the operator is ready. ``run`` runs a program and raises when it fails."""
    document = {
        "image": {"reference": images.operator},
        "allowedEndpoints": endpoints,
        "profiles": {"default": {"image": images.trainer}},
        **(values or {}),
    }
    file = folder / "operator-values.json"
    file.write_text(json.dumps(document))
    upgrade = ("helm", "upgrade", "--install")
    run(
        *upgrade,
        CRDS_RELEASE,
        str(ROOT / "charts/finetune-crds"),
        "--namespace",
        SYSTEM_NAMESPACE,
        "--create-namespace",
    )
    chart = str(ROOT / "charts/finetune-operator")
    run(*upgrade, RELEASE, chart, "--namespace", SYSTEM_NAMESPACE, "--values", str(file), "--wait", "--timeout", "120s")


def install_on(cluster: Cluster, values: Mapping[str, Any] | None = None) -> None:
    """Install the operator on a cluster of the harness, with the images that it has loaded."""

    def run(program: str, *arguments: str) -> str:
        assert program == "helm"
        return cluster.helm(*arguments)

    images = Images(operator=cluster.operator_image, trainer=cluster.trainer_image)
    install_operator(run, cluster.directory, images=images, endpoints=[cluster.s3.endpoint], values=values)


def uninstall_operator(cluster: Cluster) -> None:
    """Remove the operator; the CRD and all jobs stay."""
    cluster.helm("uninstall", RELEASE, "--namespace", SYSTEM_NAMESPACE, "--wait", "--ignore-not-found")


def leader(cluster: Cluster) -> str:
    """Return the name of the pod that holds the lease; empty when none does."""
    lease = cluster.get("lease", RELEASE, SYSTEM_NAMESPACE)
    return str(lease["spec"].get("holderIdentity", "")).partition("_")[0]


def operator_log(cluster: Cluster) -> str:
    """Return what the operator's replicas have printed."""
    selector = f"app.kubernetes.io/instance={RELEASE}"
    return cluster.kubectl(
        "logs", "--namespace", SYSTEM_NAMESPACE, "-l", selector, "--prefix", "--tail=-1", check=False
    )
