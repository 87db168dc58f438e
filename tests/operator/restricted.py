"""The Pod Security Standard "restricted", as https://kubernetes.io/docs/concepts/security/pod-security-standards/ lists it."""

from collections.abc import Iterator
from typing import Any

VOLUME_TYPES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SAFE_SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
}


PROBES = ("livenessProbe", "readinessProbe", "startupProbe")


def violations(pod: dict[str, Any]) -> list[str]:
    """Return what the standard would refuse in a pod; empty for one that passes."""
    annotations = pod["metadata"].get("annotations", {})
    confined = [name for name in annotations if name.startswith("container.apparmor.security.beta.kubernetes.io/")]
    return [*confined, *_violations(pod["spec"])]


def _violations(spec: dict[str, Any]) -> Iterator[str]:
    context = spec.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield field
    for volume in spec.get("volumes", ()):
        if not volume.keys() - {"name"} <= VOLUME_TYPES:
            yield f"volume {volume['name']} is of a type that is not allowed"
    if {item["name"] for item in context.get("sysctls", ())} - SAFE_SYSCTLS:
        yield "unsafe sysctls"
    for container in (*spec.get("initContainers", ()), *spec["containers"], *spec.get("ephemeralContainers", ())):
        yield from _container_violations(container, context)


def _container_violations(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    own, name = container.get("securityContext", {}), container["name"]
    effective = {**{key: pod[key] for key in ("runAsNonRoot", "runAsUser", "seccompProfile") if key in pod}, **own}
    if own.get("privileged"):
        yield f"{name} is privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{name} may escalate its privileges"
    if own.get("capabilities", {}).get("drop") != ["ALL"]:
        yield f"{name} keeps capabilities"
    if set(own.get("capabilities", {}).get("add", ())) - {"NET_BIND_SERVICE"}:
        yield f"{name} adds capabilities"
    if effective.get("runAsNonRoot") is not True or effective.get("runAsUser") == 0:
        yield f"{name} may run as root"
    if effective.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{name} has no seccomp profile"
    if own.get("procMount", "Default") != "Default":
        yield f"{name} sees an unmasked /proc"
    if any(port.get("hostPort") for port in container.get("ports", ())):
        yield f"{name} takes ports of the host"
    handlers = [container.get(probe, {}) for probe in PROBES] + list(container.get("lifecycle", {}).values())
    if any(handler.get(kind, {}).get("host") for handler in handlers for kind in ("httpGet", "tcpSocket")):
        yield f"{name} has the kubelet ask elsewhere"
    if {"appArmorProfile", "seLinuxOptions", "windowsOptions"} & {*own, *pod}:
        yield f"{name} changes what the runtime confines it with"
