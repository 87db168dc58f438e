"""Kubernetes, etcd, CoreDNS, Helm, the pause program and Prometheus, built from pinned Go modules.

Each component has a module file of its own under ``go/``, since etcd, Helm and Kubernetes want different versions of the same
modules. A component is built once and kept under the hash of everything that decides about it: module files, sources, flags
and the Go release. The result moves to its place in one rename, and builders take turns on a file lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

from tests.cluster.console import ClusterError, say, step
from tests.cluster.places import CACHE, GO
from tests.cluster.process import run

KUBERNETES = "1.34.4"
HELM = "3.21.4"
_VERSION = "k8s.io/component-base/version"


@dataclass(frozen=True, slots=True)
class Component:
    name: str
    packages: tuple[str, ...]
    programs: tuple[str, ...]
    expected: str
    ldflags: str = "-s -w"
    tags: str = field(default="", repr=False)  # not in the text that the key is made of: what has none keeps its build


_KUBERNETES_PROGRAMS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
)
COMPONENTS = (
    Component("pause", (".",), ("pause",), "about 10 s"),
    Component("etcd", ("go.etcd.io/etcd/server/v3",), ("etcd",), "about 40 s the first time"),
    Component(
        "kubernetes",
        tuple(f"k8s.io/kubernetes/cmd/{program}" for program in _KUBERNETES_PROGRAMS),
        _KUBERNETES_PROGRAMS,
        "about 7 min the first time",
        # kubectl and the node's checks of version skew read these; a plain build says v0.0.0-master.
        f"-s -w -X {_VERSION}.gitVersion=v{KUBERNETES} -X {_VERSION}.gitMajor=1 -X {_VERSION}.gitMinor=34",
    ),
    Component("coredns", (".",), ("coredns",), "about 70 s the first time"),
    Component(
        "helm",
        ("helm.sh/helm/v3/cmd/helm",),
        ("helm",),
        "about 70 s the first time",
        f"-s -w -X helm.sh/helm/v3/internal/version.version=v{HELM}",
    ),
)


# No part of the cluster: tests alone use it, and a demo need not wait for it. It discovers by files only, which leaves out every cloud's SDK.
PROMETHEUS = Component(
    "prometheus",
    ("github.com/prometheus/prometheus/cmd/prometheus", "github.com/prometheus/prometheus/cmd/promtool"),
    ("prometheus", "promtool"),
    "about 5 min the first time",
    tags="remove_all_sd",
)


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a file lock; say so when somebody else holds it, since a silent wait looks like a hang."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is {what} …")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure_binaries() -> dict[str, Path]:
    """Every program of the cluster, built where it is missing: name → path."""
    return _ensure_all(COMPONENTS)


def ensure_prometheus() -> dict[str, Path]:
    """Prometheus and promtool: name → path."""
    return _ensure_all((PROMETHEUS,))


def _ensure_all(components: Iterable[Component]) -> dict[str, Path]:
    if shutil.which("go") is None:
        raise ClusterError(
            "Go is missing: install Go 1.26 or later (https://go.dev/dl), the cluster is built from source; it is looked for on PATH"
            " and, by make, in /usr/local/go/bin"
        )
    release = run(["go", "env", "GOVERSION"]).strip()
    return {
        program: directory / program
        for component in components
        for directory in [_ensure(component, release)]
        for program in component.programs
    }


def _ensure(component: Component, release: str) -> Path:
    directory = CACHE / "bin" / f"{component.name}-{_key(component, release)}"
    if directory.exists():
        return directory
    with exclusive(CACHE / "locks" / f"build-{component.name}", f"building {component.name}"):
        if not directory.exists():
            with step(f"building {component.name} ({', '.join(component.programs)})", component.expected):
                _build(component, directory)
    return directory


def ensure_alone(component: Component) -> Path:
    """The folder of one component's programs, without whatever else a cluster needs."""
    return _ensure(component, run(["go", "env", "GOVERSION"]).strip())


def sources(name: str, module: str) -> Path:
    """The files of a module that is pinned under ``go/<name>``, where nothing of it is to be built."""
    told = run(["go", "mod", "download", "-json", module], cwd=GO / name, env={"GOWORK": "off"})
    return Path(json.loads(told)["Dir"])


def _key(component: Component, release: str) -> str:
    digest = hashlib.sha256(f"{release} {component}{component.tags}".encode())
    for file in sorted((GO / component.name).iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _build(component: Component, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(mkdtemp(prefix=".building-", dir=directory.parent))
    try:
        run(
            [
                "nice",
                "-n",
                "5",
                "go",
                "build",
                "-trimpath",
                "-mod=readonly",
                "-ldflags",
                component.ldflags,
                "-tags",
                component.tags,
                "-o",
                f"{scratch}/",
                *component.packages,
            ],
            cwd=GO / component.name,
            env={"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false", "GOWORK": "off"},
        )
        _name_programs(component, scratch)
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _name_programs(component: Component, scratch: Path) -> None:
    """Go names a program after the last element of its package's path, which for etcd is `server`."""
    built = sorted(file.name for file in scratch.iterdir())
    if built != sorted(component.programs):
        if len(built) != 1 or len(component.programs) != 1:
            raise ClusterError(f"building {component.name} made {built}, not {list(component.programs)}")
        (scratch / built[0]).rename(scratch / component.programs[0])
    scratch.chmod(0o755)
