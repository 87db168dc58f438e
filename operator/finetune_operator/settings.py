"""What the administrator decides, from the chart's values: read once at start from a YAML file.

FINETUNE_OPERATOR_CONFIG   path of the file, default /etc/finetune-operator/config.yaml
"""

import os
import socket
from contextlib import suppress
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, Field, model_validator

from finetune_api.contract import CREDENTIALS, JOB_SERVER_PORT
from finetune_api.quantity import quantity_value
from finetune_api.schema import ApiModel, StorageUri

CONFIG_VARIABLE = "FINETUNE_OPERATOR_CONFIG"
CONFIG_FILE = "/etc/finetune-operator/config.yaml"
AMAZON_S3 = "amazon-s3"  # in allowedEndpoints: jobs without an endpoint of their own
ANYWHERE = "*"  # in allowedResumePrefixes: wherever the store lets the job's credentials read


def _checked_network(text: str) -> str:
    ip_network(text)
    return text


def _checked_quantity(text: str) -> str:
    quantity_value(text)
    return text


def _checked_endpoint(text: str) -> str:
    """Refuse what is the node's own, however it is written: a metadata service gives away the node's credentials."""
    host = urlsplit(text).hostname or ""
    with suppress(OSError):  # a name, and no address
        address = IPv4Address(socket.inet_aton(host))
        if address.is_link_local or address.is_loopback:
            raise ValueError(f"{text} is link-local or loopback, where no store of a cluster is")
    if host in ("localhost", "metadata.google.internal") or host.endswith(".localhost"):
        raise ValueError(f"{text} names the pod or the node itself")
    return text


Cidr = Annotated[str, AfterValidator(_checked_network)]


class Profile(ApiModel):
    """A named bundle of what a job's pods get beside what the job says."""

    image: str
    """Trainer image of recipe jobs."""
    image_pull_policy: str | None = None
    """Default: the kubelet's own rule (Always for :latest, else IfNotPresent)."""
    image_pull_secrets: tuple[str, ...] = ()
    """Names of secrets in the job's namespace."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that nodes must have."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Taints that pods tolerate."""
    gpu_resource: str = "nvidia.com/gpu"
    """The extended resource that workers.resources.gpus counts."""
    shared_memory: Annotated[str, AfterValidator(_checked_quantity)] = "1Gi"
    """Size of /dev/shm; added to the pod's memory limit."""
    priority_class_name: str | None = None
    """Priority class of the pods."""
    runtime_class_name: str | None = None
    """Runtime class of the pods."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment of the workers, such as NCCL settings."""
    resources: dict[str, Annotated[str, AfterValidator(_checked_quantity)]] = Field(default_factory=dict)
    """What each pod gets beside what the job asks for, such as devices of a fabric and huge pages."""
    allowed_endpoints: tuple[str, ...] | None = None
    """Of the endpoints that jobs may name, those for jobs with this profile. Default: all."""
    restricted: bool = Field(default=False, exclude=True)
    """Only for who has the verb use on it: the chart's policy and roles see to that. No part of what a job keeps of its profile."""

    @model_validator(mode="after")
    def _adds_and_replaces_nothing(self) -> Self:
        taken = sorted(self.resources.keys() & {"cpu", "memory", self.gpu_resource})
        if taken:
            raise ValueError(f"resources: {', '.join(taken)} is for the job to ask for, in spec.workers.resources")
        ours = sorted(name for name in self.environment if name.startswith("FINETUNE_") or name in CREDENTIALS)
        if ours:
            raise ValueError(f"environment: {', '.join(ours)} is set by the operator")
        return self


class LeaderElection(ApiModel):
    """How long a leader is believed to live, and how soon it gives up by itself. See leader.py."""

    lease_seconds: int = Field(default=15, ge=2)
    """After so long without a sign of life the leader's place is free."""
    renew_seconds: float = Field(default=10.0, gt=0)
    """So long after its last renewal a leader stops by itself: less, by as much as clocks may differ in rate."""
    retry_seconds: float = Field(default=2.0, gt=0)
    """How often a leader renews and the others look."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 1.2 * self.renew_seconds <= self.lease_seconds or not 3 * self.retry_seconds <= self.renew_seconds:
            raise ValueError(
                "leaseSeconds must be at least 1.2 times renewSeconds, and that at least 3 times retrySeconds"
            )
        return self


class Logging(ApiModel):
    """What the operator's log looks like."""

    format: Literal["JSON", "Text"] = "JSON"
    """A JSON object a line, or plain text."""
    level: Literal["DEBUG", "INFO", "WARNING"] = "INFO"
    """The least that is logged."""


class Settings(ApiModel):
    """Everything that the operator is told."""

    namespace: str
    """Where the operator itself runs."""
    service: str
    """The Service in front of its job server."""
    operator_image: str
    """The operator's own image: pods copy the agent out of it."""
    operator_image_pull_policy: str | None = None
    """Default: the kubelet's own rule."""
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces to serve; empty means all."""
    allowed_endpoints: tuple[Annotated[str, AfterValidator(_checked_endpoint)], ...] = (AMAZON_S3,)
    """Endpoints that jobs may name; amazon-s3 stands for jobs that name none."""
    allowed_resume_prefixes: tuple[Literal["*"] | StorageUri, ...] = ()
    """Where else checkpoint.resumeFrom may point, besides the job's own storage.uri/namespace/; * means anywhere."""
    storage_cidrs: tuple[Cidr, ...] = ("0.0.0.0/0",)
    """Where training pods may connect to the store; link-local addresses never."""
    dns_cidrs: tuple[Cidr, ...] = ()
    """Where training pods may ask for names, beside the pods of kube-system. Default: anywhere, on port 53."""
    profiles: dict[str, Profile]
    """Named bundles; a job that names none gets `default`."""
    job_server_port: int = JOB_SERVER_PORT
    """TCP port of the job server."""
    health_port: int = 8080
    """TCP port of /healthz and /readyz."""
    metrics_port: int = 8081
    """TCP port of /metrics, plain HTTP."""
    logging: Logging = Logging()
    """What the log looks like."""
    workers: int = Field(default=8, ge=1, le=256)
    """How many jobs are reconciled at a time."""
    progress_seconds: float = Field(default=10.0, ge=0)
    """At most one status write for progress alone, or for how far a start is, in this time, per job."""
    silent_seconds: float = Field(default=30.0, ge=20)
    """An agent that is silent for so long is lost, unless all are or its gang goes on. They say something every 10 s; a lost answer costs
    one 10 s more, and trying again up to 5."""

    leader_election: LeaderElection = LeaderElection()
    """How replicas agree on who leads."""

    @property
    def job_server_url(self) -> str:
        """Where agents find the job server."""
        return f"https://{self.job_server_host}:{self.job_server_port}"

    @property
    def job_server_host(self) -> str:
        """The name that the job server's certificate carries."""
        return f"{self.service}.{self.namespace}.svc"


def read_settings() -> Settings:
    """Return the settings of this process.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not what it should be; the message names the field.
    """
    path = Path(os.environ.get(CONFIG_VARIABLE, CONFIG_FILE))
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    return Settings.model_validate(document)
