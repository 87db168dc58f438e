"""What a bare Debian machine lacks, and how it gets it: apt-get, without questions and without starting services."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.cluster.console import ClusterError, step
from tests.cluster.process import run

PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ipset": "ipset",
    "socat": "socat",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "mount": "mount",
    "openssl": "openssl",
    "buildah": "buildah",
    "skopeo": "skopeo",
    "debootstrap": "debootstrap",
}
"""Command (or file) → the Debian package that has it."""


def missing_packages() -> list[str]:
    return sorted({package for command, package in PACKAGES.items() if not _is_there(command)})


def _is_there(command: str) -> bool:
    sbin = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return Path(command).exists() if command.startswith("/") else shutil.which(command, path=sbin) is not None


def ensure_packages() -> None:
    if os.geteuid() != 0:
        raise ClusterError("a cluster needs root: it makes network namespaces, mounts and control groups")
    packages = missing_packages()
    if not packages:
        return
    if shutil.which("apt-get") is None:
        raise ClusterError(
            f"these Debian packages are missing, and there is no apt-get to fetch them: {' '.join(packages)}"
        )
    # RUNLEVEL=1 keeps a package's service (containerd has one) from being started: we run our own.
    env = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    with step(f"installing Debian packages {' '.join(packages)}", "about 15 s"):
        run(["apt-get", "update", "-qq"], env=env)
        run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages], env=env)
    if still := missing_packages():
        raise ClusterError(f"apt-get could not install {' '.join(still)}")
