"""The NetworkPolicy of a job: its pods talk to one another, to DNS, to the job server and to the store, and to nothing else.

Link-local addresses stay out of reach whatever the store's ranges are: the metadata service of a cloud lives there.
"""

from ipaddress import IPv4Network, IPv6Network, ip_network
from urllib.parse import urlsplit

from finetune_api import contract
from finetune_api.job import FineTuneJob
from finetune_operator.kube_object import KubeObject
from finetune_operator.render.names import child_metadata, child_name
from finetune_operator.settings import Settings

LINK_LOCAL = (ip_network("169.254.0.0/16"), ip_network("fe80::/10"))
NAMESPACE_LABEL = "kubernetes.io/metadata.name"  # the API server's own, on every namespace
OPERATOR_SELECTOR = {"app.kubernetes.io/name": contract.MANAGER}


def render_network_policy(job: FineTuneJob, settings: Settings) -> KubeObject:
    """Return the NetworkPolicy of a job's pods."""
    own = {"podSelector": {"matchLabels": {contract.JOB_UID_LABEL: job.metadata.uid}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": child_metadata(job, child_name(job)),
        "spec": {
            **own,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [own]}],
            "egress": [
                {"to": [own]},
                _names(settings),
                _job_server(settings),
                *_store(job, settings),
            ],
        },
    }


def _names(settings: Settings) -> KubeObject:
    """Return the rule for DNS. Without a list of peers it allows every place: a range of addresses need not cover pods everywhere."""
    ports = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    if not settings.dns_cidrs:
        return {"ports": ports}
    cluster = {"namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: "kube-system"}}}
    return {"to": [cluster, *({"ipBlock": {"cidr": cidr}} for cidr in settings.dns_cidrs)], "ports": ports}


def _job_server(settings: Settings) -> KubeObject:
    return {
        "to": [
            {
                "namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: settings.namespace}},
                "podSelector": {"matchLabels": OPERATOR_SELECTOR},
            }
        ],
        "ports": [{"protocol": "TCP", "port": settings.job_server_port}],
    }


def _store(job: FineTuneJob, settings: Settings) -> list[KubeObject]:
    endpoint = job.spec.storage.endpoint if job.spec.storage else None
    parts = urlsplit(endpoint or "https://s3")
    ports = {parts.port or (443 if parts.scheme == "https" else 80)}
    if job.spec.recipe is not None and job.spec.recipe.model.source.startswith("hf://"):
        ports.add(443)
    blocks = [
        {"ipBlock": {"cidr": cidr, **_except(cidr)}} for cidr in settings.storage_cidrs if not _is_link_local(cidr)
    ]
    if not blocks:
        return []  # an empty list of peers would mean everywhere
    return [{"to": blocks, "ports": [{"protocol": "TCP", "port": port} for port in sorted(ports)]}]


def _except(cidr: str) -> dict[str, list[str]]:
    within = [str(network) for network in LINK_LOCAL if _contains(cidr, network)]
    return {"except": within} if within else {}


def _is_link_local(cidr: str) -> bool:
    return any(_contains(str(network), ip_network(cidr)) for network in LINK_LOCAL)


def _contains(outer: str, inner: IPv4Network | IPv6Network) -> bool:
    network = ip_network(outer)
    return network.version == inner.version and network.overlaps(inner) and network.prefixlen <= inner.prefixlen
