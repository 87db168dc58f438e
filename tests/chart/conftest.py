"""Both charts on a real cluster. The operator's pod has nowhere to run: these tests are about what the API server does."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.api.api_server import Refused
from tests.chart.helm import CRDS, OPERATOR, example
from tests.cluster import Cluster
from tests.cluster.console import ClusterError
from tests.cluster.installation import CRDS_RELEASE, SYSTEM_NAMESPACE

PATIENCE_SECONDS = 30.0  # for policies and rights, which the API server learns of by its own watches
RBAC = "rbac.authorization.k8s.io"


@dataclass(frozen=True)
class Installation:
    """The charts as installed, and a namespace of a tenant."""

    cluster: Cluster
    release: str
    namespace: str
    tenant: str
    users: dict[str, Path] = field(default_factory=dict)

    def install(self, *arguments: str) -> str:
        """Install or upgrade the operator."""
        values = ("--values", str(example("minimal")), "--set", "nodeSelector.runs-on=nothing")
        return self.cluster.helm(
            *("upgrade", "--install", self.release, str(OPERATOR), "--namespace", self.namespace), *values, *arguments
        )

    def as_user(self, user: str, *arguments: str, job: dict[str, Any] | None = None) -> str:
        """Run kubectl as a user in the tenant's namespace; raises ``ClusterError`` with what was said when it fails."""
        kubeconfig = ("--kubeconfig", str(self.user(user)), "--namespace", self.tenant)
        return self.cluster.kubectl(*kubeconfig, *arguments, input=yaml.safe_dump(job) if job else None)

    def user(self, name: str) -> Path:
        """Return the kubeconfig of a user."""
        if name not in self.users:
            self.users[name] = self.cluster.user_kubeconfig(name)
        return self.users[name]

    def allow(self, user: str, name: str, *rules: dict[str, Any]) -> None:
        """Give a user a Role in the tenant's namespace."""
        meta = {"name": f"{user}-{name}", "namespace": self.tenant}
        role = {"apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": meta, "rules": list(rules)}
        self.cluster.apply(role)
        self.bind(user, meta["name"], kind="Role")

    def bind(self, user: str, role: str, *, kind: str = "ClusterRole") -> None:
        """Bind a user to a role in the tenant's namespace."""
        binding = {
            "apiVersion": f"{RBAC}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": f"{user}-{role}", "namespace": self.tenant},
            "roleRef": {"apiGroup": RBAC, "kind": kind, "name": role},
            "subjects": [{"apiGroup": RBAC, "kind": "User", "name": user}],
        }
        self.cluster.apply(binding)


@pytest.fixture(scope="module")
def installation(cluster: Cluster) -> Iterator[Installation]:
    suffix = secrets.token_hex(3)
    made = Installation(cluster, f"finetune-operator-{suffix}", f"chart-{suffix}", f"tenant-{suffix}")
    cluster.helm("upgrade", "--install", CRDS_RELEASE, str(CRDS), "--namespace", SYSTEM_NAMESPACE, "--create-namespace")
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    for name in (made.namespace, made.tenant):
        cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": restricted}})
    made.install()
    yield made
    cluster.helm("uninstall", made.release, "--namespace", made.namespace, "--ignore-not-found")
    for name in (made.namespace, made.tenant):
        cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def refusal() -> Callable[[Callable[[], str]], str]:
    """Try until it is refused, and return why."""

    def wait(attempt: Callable[[], str]) -> str:
        return _until(attempt, refused=True)

    return wait


@pytest.fixture
def acceptance() -> Callable[[Callable[[], str]], str]:
    """Try until it is accepted, and return what was said."""

    def wait(attempt: Callable[[], str]) -> str:
        return _until(attempt, refused=False)

    return wait


NOT_HEARD_YET = "cannot create resource"
"""What the API server says while it does not know of a user's new role: all of them may create jobs."""


def _until(attempt: Callable[[], str], *, refused: bool) -> str:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            said, is_refused = attempt(), False
        except (ClusterError, Refused) as error:
            said, is_refused = str(error), True
        if is_refused == refused and NOT_HEARD_YET not in said:
            return said
        assert time.monotonic() < deadline, f"{'never' if refused else 'still'} refused: {said}"
        time.sleep(0.2)
