"""``kind: FineTuneJob``: what a user writes."""

import json
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from finetune_api import contract
from finetune_api.recipe import MetricName, Recipe
from finetune_api.schema import (
    DEFAULT_NOT_STORED,
    ApiModel,
    ByteRate,
    Bytes,
    CheckpointUri,
    Cores,
    EndpointUrl,
    EnvironmentName,
    ImageReference,
    ObjectName,
    Rule,
    StagingMemory,
    StorageUri,
)
from finetune_api.status import JobStatus

Argument = Annotated[str, Field(min_length=1, max_length=4096)]


class EnvironmentVariable(ApiModel):
    """One environment variable of a script."""

    name: EnvironmentName
    """Its name; names that the operator, torchrun or the administrator own are refused."""
    value: str = Field(default="", max_length=4096)
    """Its value, as it is. Not for secrets: anyone who may read the job reads it."""

    rules = (
        Rule(
            cel="!(self.name in [{names}]) && !self.name.matches('^({prefixes}).*$|^{pattern}$')".format(
                names=", ".join(f"'{name}'" for name in contract.RESERVED_ENVIRONMENT),
                prefixes="|".join(contract.RESERVED_ENVIRONMENT_PREFIXES),
                pattern=contract.RESERVED_ENVIRONMENT_PATTERN,
            ),
            message="this name belongs to the operator, torchrun or the administrator and cannot be set by a job",
            check=lambda variable: not contract.is_reserved_environment(variable.name),
            field="name",
        ),
    )


class Script(ApiModel):
    """Any program under torchrun, in any image with Python 3.9 and PyTorch. Its checkpoints are its own."""

    command: list[Argument] = Field(min_length=1, max_length=128)
    """What each worker runs, e.g. [python, train.py]; torchrun's environment is set for it."""
    image: ImageReference
    """The image to run it in."""
    environment: list[EnvironmentVariable] = Field(
        default_factory=list, max_length=128, json_schema_extra={"x-list-key": "name"}
    )
    """Environment variables of the workers."""

    rules = (
        Rule(
            cel=None,
            message="duplicate names: each variable can be set once",
            check=lambda script: len({variable.name for variable in script.environment}) == len(script.environment),
            field="environment",
        ),
    )


class Storage(ApiModel):
    """The object store that the job reads s3:// sources from and writes its checkpoints and result to."""

    uri: StorageUri
    """s3://bucket or s3://bucket/path; the job writes under uri/namespace/name-uid8/ and nowhere else."""
    endpoint: EndpointUrl | None = None
    """URL of an S3-compatible store that the administrator allows. Default: Amazon S3."""
    secret_name: ObjectName | None = None
    """Secret in the job's namespace with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN)."""
    service_account_name: ObjectName | None = None
    """Service account whose web identity the store accepts. Not together with secretName."""

    rules = (
        Rule(
            cel="!has(self.secretName) || !has(self.serviceAccountName)",
            message="secretName and serviceAccountName cannot both be set",
            check=lambda storage: storage.secret_name is None or storage.service_account_name is None,
        ),
    )


class CheckpointInterval(ApiModel):
    """How often to commit a checkpoint."""

    steps: int | None = Field(default=None, ge=1, le=100000000)
    """After every so many optimizer steps."""
    seconds: int | None = Field(default=None, ge=10, le=604800)
    """After every so many seconds, at the next step."""
    auto: Literal[True] | None = None
    """At the interval that loses least, from the measured cost of a save and the failures to expect of so many ranks (Young/Daly)."""

    rules = (
        Rule(
            cel="[has(self.steps), has(self.seconds), has(self.auto)].filter(chosen, chosen).size() == 1",
            message="exactly one of steps, seconds and auto must be set",
            check=lambda interval: [interval.steps, interval.seconds, interval.auto].count(None) == 2,
        ),
    )


class Checkpoint(ApiModel):
    """When to commit checkpoints, how many to keep, and what to continue from."""

    interval: CheckpointInterval = Field(
        default_factory=lambda: CheckpointInterval(seconds=600), json_schema_extra={DEFAULT_NOT_STORED: True}
    )
    """How often to commit a checkpoint; the end of training always commits one. Default: every 600 seconds."""
    keep: int = Field(default=2, ge=1, le=100)
    """How many of the newest checkpoints to keep."""
    keep_best: MetricName | None = None
    """Keep the checkpoint with the best value of this metric too, beyond keep. One of recipe.evaluation.metrics."""
    resume_from: CheckpointUri | None = None
    """Start from a checkpoint of another job, which is only read: s3://bucket/prefix, with @step for a certain step, else its newest."""
    staging_memory: StagingMemory = "1Gi"
    """Memory of each pod for checkpoints on their way to the store, on top of workers.resources.memory. A checkpoint takes 12 bytes
    for each trained parameter, shared by the nodes; room for two lets training go on while one is uploaded."""
    upload_bytes_per_second: ByteRate | None = None
    """The most that each pod uploads in a second, such as 100Mi. Default: as fast as it goes."""


class Resources(ApiModel):
    """What each training pod asks for; requests and limits are equal."""

    cpu: Cores = "1"
    """CPU cores."""
    memory: Bytes = "4Gi"
    """Memory of the trainer."""
    gpus: int = Field(default=0, ge=0, le=16)
    """GPUs (nvidia.com/gpu, or what the profile says)."""


class Workers(ApiModel):
    """The gang: how many nodes, how many processes, how large."""

    nodes: int = Field(default=1, ge=1, le=2048)
    """Training pods; all of them, or none, train."""
    processes_per_node: int | None = Field(default=None, ge=1, le=16)
    """Ranks in each pod. Default: the number of GPUs, else 1."""
    resources: Resources = Field(default_factory=Resources)
    """What each training pod asks for."""
    spares: int = Field(default=0, ge=0, le=64)
    """Warm pods beyond nodes, which take a lost rank's place at once and are replaced behind."""
    profile: ObjectName = "default"
    """An administrator's named bundle: image, placement, fabric, priority."""

    @property
    def local_processes(self) -> int:
        """Ranks in each pod."""
        return self.processes_per_node or max(1, self.resources.gpus)


class Recovery(ApiModel):
    """How many failures to recover from before giving up."""

    max_restarts: int = Field(default=8, ge=0, le=10000)
    """Restarts of the gang that failures of one kind may cause before the job gets any further."""
    window_seconds: int = Field(default=86400, ge=60, le=31536000)
    """Time over which they are counted."""
    hang_seconds: int = Field(default=60, ge=0, le=86400)
    """Silence of all training ranks that counts as a hang, unless five of their steps take longer; 0: never. Taken at the next start."""


def _same(path: str) -> str:
    """Return what holds when a field that may be absent is as it was."""
    return f"has(self.{path}) == has(oldSelf.{path}) && (!has(self.{path}) || self.{path} == oldSelf.{path})"


def _unchanged(name: str) -> Rule:
    # At the level of spec, because a rule on an optional field itself is skipped when the field appears or goes.
    return Rule(
        cel=_same(name),
        message=f"{name} cannot be changed after the job is created; create a new job",
        field=name,
    )


def _keeps_a_metric_that_is_measured(spec: "FineTuneJobSpec") -> bool:
    evaluation = spec.recipe.evaluation if spec.recipe else None
    metrics = evaluation.metrics if evaluation else []
    return spec.checkpoint.keep_best is None or spec.checkpoint.keep_best in metrics


class FineTuneJobSpec(ApiModel):
    """What to train, where it is stored, and on what it runs."""

    recipe: Recipe | None = None
    """What to train, for the project's own trainer. Exactly one of recipe and script; never changes."""
    script: Script | None = None
    """What to run instead, for any image. Exactly one of recipe and script; never changes."""
    storage: Storage | None = None
    """The object store; required with recipe; never changes."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """When to commit checkpoints and how many to keep. Edits of interval, keep, keepBest and uploadBytesPerSecond are taken at the next
    start of the gang; the rest is fixed when its pods are made."""
    workers: Workers = Field(default_factory=Workers)
    """The gang."""
    suspend: bool = False
    """Stop after a save and give the pods back, until set to false again."""
    pending_deadline_seconds: int | None = Field(default=None, ge=1, le=31536000)
    """Give all pods back when the gang is not complete within this time, and try again later. See docs/recovery.md."""
    active_deadline_seconds: int | None = Field(default=None, ge=1, le=315360000)
    """Fail the job when it has run this long since its first start, or since it was resumed last. None of it is used while it is suspended."""
    pod_ttl_seconds_after_finished: int | None = Field(
        default=None, ge=0, le=31536000, alias="podTTLSecondsAfterFinished"
    )
    """Delete the pods, and their logs, this long after the end. Default: keep them as long as the job."""
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0, le=315360000)
    """Delete the job itself this long after the end. Under GitOps it would be created, and trained, again."""
    recovery: Recovery = Field(default_factory=Recovery)
    """How many failures to recover from before giving up."""

    rules = (
        Rule(
            cel="has(self.recipe) != has(self.script)",
            message="exactly one of recipe and script must be set",
            check=lambda spec: (spec.recipe is None) != (spec.script is None),
        ),
        Rule(
            cel="!has(self.recipe) || has(self.storage)",
            message="storage is required with recipe: checkpoints and the result go there",
            check=lambda spec: spec.recipe is None or spec.storage is not None,
            field="storage",
        ),
        Rule(
            cel="!has(self.checkpoint) || !has(self.checkpoint.keepBest) || (has(self.recipe) && has(self.recipe.evaluation)"
            " && self.recipe.evaluation.metrics.exists(metric, metric == self.checkpoint.keepBest))",
            message="keepBest must be one of recipe.evaluation.metrics, which are what is measured",
            check=_keeps_a_metric_that_is_measured,
            field="checkpoint.keepBest",
        ),
        Rule(
            cel="!has(self.checkpoint) || !has(self.checkpoint.resumeFrom) || has(self.recipe)",
            message="resumeFrom is for jobs with a recipe: the checkpoints of a script are its own",
            check=lambda spec: spec.checkpoint.resume_from is None or spec.recipe is not None,
            field="checkpoint.resumeFrom",
        ),
        _unchanged("recipe"),
        _unchanged("script"),
        _unchanged("storage"),
    )


class ObjectMeta(ApiModel):
    """The part of an object's metadata that this project reads."""

    model_config = ConfigDict(extra="ignore")

    name: str
    """Name, a DNS label of at most 40 characters."""
    namespace: str = "default"
    """Namespace."""
    uid: str = ""
    """Identity: another object of the same name has another one."""
    generation: int = 1
    """Version of spec."""
    resource_version: str = ""
    """Version of the object."""
    creation_timestamp: str = ""
    """RFC 3339."""
    deletion_timestamp: str | None = None
    """RFC 3339, set while the object is going."""


class ApiVersion(StrEnum):
    """The one version so far."""

    V1ALPHA1 = f"{contract.GROUP}/{contract.VERSION}"


def _shape(field: str, same: str, what: str) -> Rule:
    # Pods are made in one shape, and all of a gang's in the same. The first gang is in status before its pods are made.
    # An operator that did not see the suspension goes by the pods (finetune_operator/plan/shape.py has the same fields).
    return Rule(
        cel=f"oldSelf.spec.suspend || self.spec.suspend || !has(oldSelf.status) || !has(oldSelf.status.gang) || ({same})",
        message=f"{what} what pods are made with: set suspend to true first, or with the same change",
        field=field,
    )


class FineTuneJob(ApiModel):
    """A distributed training job: a gang of pods under torchrun, with checkpoints that cannot be lost."""

    model_config = ConfigDict(extra="ignore")

    api_version: ApiVersion = ApiVersion.V1ALPHA1
    """finetune.dev/v1alpha1."""
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    """FineTuneJob."""
    metadata: ObjectMeta
    """Name, namespace, labels."""
    spec: FineTuneJobSpec
    """What to train, where it is stored, and on what it runs."""
    status: JobStatus | None = None
    """What is: written by the operator alone."""

    rules = (
        Rule(
            cel=f"self.metadata.name.size() <= {contract.JOB_NAME_LIMIT}"
            " && self.metadata.name.matches('^[a-z0-9]([a-z0-9-]*[a-z0-9])?$')",
            message=f"must be a DNS label (lower-case letters, digits, '-') of at most "
            f"{contract.JOB_NAME_LIMIT} characters: it becomes part of pod names",
            check=lambda job: contract.is_job_name(job.metadata.name),
            field="metadata.name",
        ),
        Rule(
            cel="!has(oldSelf.status) || !has(oldSelf.status.gang) || (has(self.status) && has(self.status.gang)"
            " && self.status.gang.generation >= oldSelf.status.gang.generation)",
            message="the generation cannot fall: it names one incarnation of the gang for ever",
            field="status.gang.generation",
        ),
        Rule(
            cel="!has(oldSelf.status) || !has(oldSelf.status.conditions) || ['Complete', 'Failed'].all(final,"
            " !oldSelf.status.conditions.exists(c, c.type == final && c.status == 'True')"
            " || (has(self.status) && has(self.status.conditions)"
            " && self.status.conditions.exists(c, c.type == final && c.status == 'True')))",
            message="a job that is Complete or Failed stays so; create a new job to continue it",
            field="status.conditions",
        ),
        _shape(
            "spec.workers",
            "self.spec.workers.resources == oldSelf.spec.workers.resources && self.spec.workers.profile == oldSelf.spec.workers.profile"
            f" && {_same('spec.workers.processesPerNode')}",
            "resources, profile and processesPerNode are",
        ),
        _shape("spec.checkpoint.stagingMemory", _same("spec.checkpoint.stagingMemory"), "stagingMemory is"),
    )


def parse_job(body: dict[str, Any]) -> FineTuneJob:
    """Return the job that an API object describes.

    By way of JSON, because strict means there what it means to the API server: "2" is no number, while "Full" is a method.

    Raises:
        pydantic.ValidationError: the object was stored by a schema that this version does not know.
    """
    return FineTuneJob.model_validate_json(json.dumps(body), strict=True)
