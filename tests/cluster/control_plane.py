"""etcd, the API server, the controllers, the scheduler and DNS, as plain processes on the host side of the bridge."""

from __future__ import annotations

import json
import secrets
import ssl
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import kubeconfig
from tests.cluster.certificates import Authority
from tests.cluster.places import API_PORT, HOST_ADDRESS, MAX_NODES, SERVICE_NETWORK
from tests.cluster.process import Supervisor, wait_for

_API_NAMES = (
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
    "localhost",
)

_DNS_RIGHTS = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRole",
    "metadata": {"name": "system:coredns"},
    "rules": [
        {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ],
}
_DNS_BINDING = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRoleBinding",
    "metadata": {"name": "system:coredns"},
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"},
    "subjects": [{"kind": "User", "name": "system:coredns"}],
}
DNS_MANIFESTS = (_DNS_RIGHTS, _DNS_BINDING)

# Every request of the operator's service account, without what is in it; nobody else's.
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "userGroups": ["system:serviceaccounts:finetune-system"]}],
}


@dataclass(frozen=True, slots=True)
class ControlPlane:
    directory: Path
    supervisor: Supervisor
    programs: Mapping[str, Path]
    namespace: str

    @property
    def authority(self) -> Authority:
        return Authority(self.directory / "pki")

    @property
    def admin(self) -> Path:
        return self.directory / "kubeconfig"

    @property
    def audit_log(self) -> Path:
        return self.directory / "audit.log"

    @property
    def _audit_policy(self) -> Path:
        return self.directory / "audit-policy.json"

    def component(self, name: str) -> Path:
        return self.directory / "kubeconfigs" / name

    def prepare(self) -> None:
        """Keys, certificates, and a random token for each component and each node there may ever be."""
        authority = self.authority
        authority.create()
        authority.service_account_keys()
        addresses = [f"DNS:{name}" for name in _API_NAMES]
        addresses += [f"IP:{address}" for address in ("127.0.0.1", HOST_ADDRESS, SERVICE_NETWORK[1])]
        authority.issue("api", "kube-apiserver", addresses=addresses)
        authority.issue("kubelet-client", "kube-apiserver-kubelet-client", groups=["system:masters"])
        self._write_tokens()
        self._audit_policy.write_text(json.dumps(_AUDIT_POLICY))

    def _write_tokens(self) -> None:
        users = [("admin", "admin", "system:masters")]
        users += [
            (name, f"system:{name}", "")
            for name in ("kube-controller-manager", "kube-scheduler", "kube-proxy", "coredns")
        ]
        users += [(f"node{i}", f"system:node:node{i}", "system:nodes") for i in range(1, MAX_NODES + 1)]
        lines = []
        for name, user, group in users:
            token = secrets.token_hex(24)
            lines.append(f'{token},{user},{name},"{group}"')
            file = self.admin if name == "admin" else self.component(name)
            kubeconfig.write(file, self.authority.certificate, {"token": token})
        kubeconfig.write_secret(self.directory / "tokens.csv", "\n".join(lines) + "\n")

    def start(self) -> None:
        self._start("etcd", "--data-dir", self.directory / "etcd", "--unsafe-no-fsync", "--log-level", "warn")
        self.start_apiserver()
        self._start_controllers()
        self._start_dns()

    def start_apiserver(self) -> None:
        pki = self.authority.directory
        self._start(
            "kube-apiserver",
            "--etcd-servers=http://127.0.0.1:2379",
            f"--advertise-address={HOST_ADDRESS}",
            f"--secure-port={API_PORT}",
            f"--tls-cert-file={pki / 'api.crt'}",
            f"--tls-private-key-file={pki / 'api.key'}",
            f"--client-ca-file={self.authority.certificate}",
            f"--token-auth-file={self.directory / 'tokens.csv'}",
            # Without a client certificate for the kubelets, `kubectl logs` and `exec` are refused.
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={pki / 'kubelet-client.crt'}",
            f"--kubelet-client-key={pki / 'kubelet-client.key'}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged",
            "--profiling=false",
            f"--service-account-key-file={pki / 'service-accounts.pub'}",
            f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={SERVICE_NETWORK}",
            f"--audit-policy-file={self._audit_policy}",
            f"--audit-log-path={self.audit_log}",
            "--audit-log-maxsize=4096",  # megabytes: never turned over
        )

    def wait_until_ready(self) -> None:
        wait_for("the API server is not ready", self._look_at_readyz(), 60, self.supervisor, "kube-apiserver")

    def _look_at_readyz(self) -> Iterator[bool]:
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        while True:
            try:
                # Discovery and health are open to anybody by RBAC's own default roles.
                with urllib.request.urlopen(
                    f"https://{HOST_ADDRESS}:{API_PORT}/readyz", timeout=2, context=context
                ) as answer:
                    yield answer.status == 200
            except OSError:
                yield False

    def _start_controllers(self) -> None:
        pki = self.authority.directory
        self._start(
            "kube-controller-manager",
            f"--kubeconfig={self.component('kube-controller-manager')}",
            f"--service-account-private-key-file={pki / 'service-accounts.key'}",
            f"--root-ca-file={self.authority.certificate}",
            f"--cluster-signing-cert-file={self.authority.certificate}",
            f"--cluster-signing-key-file={self.authority.key}",
            "--use-service-account-credentials",
            "--leader-elect=false",
            # Half of the default, so that a test of a dead node takes half as long: NotReady about 19 s after the cut.
            "--node-monitor-grace-period=20s",
            "--node-monitor-period=2s",
            "--profiling=false",
        )
        self._start(
            "kube-scheduler",
            f"--kubeconfig={self.component('kube-scheduler')}",
            "--leader-elect=false",
            "--profiling=false",
        )

    def _start_dns(self) -> None:
        corefile = self.directory / "Corefile"
        corefile.write_text(
            "cluster.local:53 in-addr.arpa:53 {\n"
            f"  bind {HOST_ADDRESS}\n"
            "  errors\n"
            f"  ready {HOST_ADDRESS}:8181\n"
            "  kubernetes cluster.local in-addr.arpa {\n"
            f"    kubeconfig {self.component('coredns')} finetune\n"
            "    ttl 5\n"
            "  }\n"
            "}\n"
        )
        self._start("coredns", "-conf", corefile)

    def wait_until_dns_is_ready(self) -> None:
        wait_for("cluster DNS is not ready", self._look_at_dns(), 60, self.supervisor, "coredns")

    def _look_at_dns(self) -> Iterator[bool]:
        while True:
            try:
                with urllib.request.urlopen(f"http://{HOST_ADDRESS}:8181/ready", timeout=2) as answer:
                    yield answer.status == 200
            except OSError:
                yield False

    def _start(self, program: str, *arguments: str | Path) -> None:
        self.supervisor.start(program, [self.programs[program], *arguments], namespace=self.namespace)
