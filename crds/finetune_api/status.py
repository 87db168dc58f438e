"""``status``: what is, as far as the operator knows. Written by the operator alone, in one write at a time."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from finetune_api.protocol import ResumeSource
from finetune_api.schema import StatusModel


class JobPhase(StrEnum):
    """One word for people; decisions are made from conditions."""

    SUSPENDED = "Suspended"
    PENDING = "Pending"
    STARTING = "Starting"
    RUNNING = "Running"
    RECOVERING = "Recovering"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class ConditionType(StrEnum):
    """The conditions of a job. Ready, Reconciling and Stalled follow kstatus.

    CheckpointsDelayed is True while nothing can be committed or a save that was due has to wait, CheckpointFallback from when a gang
    could not start from the newest checkpoint until there is a newer one, Straggler while one rank holds up the others without hanging.
    """

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"
    CHECKPOINTS_DELAYED = "CheckpointsDelayed"
    CHECKPOINT_FALLBACK = "CheckpointFallback"
    STRAGGLER = "Straggler"


class Condition(StatusModel):
    """One aspect of the job's state, in the form of Kubernetes' own conditions."""

    type: str = Field(max_length=64)
    """Which aspect."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: str = Field(max_length=64)
    """One CamelCase word for programs."""
    message: str = Field(default="", max_length=2048)
    """A sentence for people."""
    last_transition_time: str = Field(json_schema_extra={"format": "date-time"})
    """When status last changed."""
    observed_generation: int | None = None
    """The version of spec that this was said of."""


class Member(StatusModel):
    """One place in the gang."""

    rank: int = Field(ge=0)
    """Node rank."""
    pod: str = Field(max_length=253)
    """Name of the pod that holds it."""
    uid: str = Field(max_length=64)
    """Identity of that pod."""


class AvoidedNode(StatusModel):
    """A node on which a pod of the gang was lost or its devices failed. Its pods are created elsewhere if they can be, for an hour."""

    pod: str = Field(max_length=253)
    """The pod; it is not used again."""
    node: str = Field(max_length=253)
    """Where it was."""
    reason: str = Field(max_length=64)
    """Why, in one word."""
    time: str = Field(json_schema_extra={"format": "date-time"})
    """When that was decided."""


class Gang(StatusModel):
    """One incarnation of the gang. Committed before any agent is told, never told before."""

    generation: int = Field(ge=0)
    """Rises with each incarnation, never falls."""
    nodes: int = Field(ge=0)
    """How many members it has when complete."""
    processes_per_node: int = Field(default=1, ge=1)
    """Ranks in each member."""
    ready: int = Field(default=0, ge=0)
    """How many members report that they run it."""
    spares: int | None = Field(default=None, ge=0)
    """How many warm pods stand by; absent for a job without spares."""
    mint_time: str | None = Field(default=None, json_schema_extra={"format": "date-time"})
    """When its number was minted."""
    start_time: str | None = Field(default=None, json_schema_extra={"format": "date-time"})
    """When its members were committed."""
    stop_time: str | None = Field(default=None, json_schema_extra={"format": "date-time"})
    """When they were told to save and stop, because spec asks for another size."""
    growth_held_until: str | None = Field(default=None, json_schema_extra={"format": "date-time"})
    """Until when it makes no pods to grow by, having given back those that it had to jobs that wait."""
    master_address: str | None = Field(default=None, max_length=64)
    """Where its ranks meet."""
    master_port: int | None = None
    """Where its ranks meet."""
    members: list[Member] = Field(default_factory=list, max_length=2048, json_schema_extra={"x-list-key": "rank"})
    """Who is in it; empty while it is being assembled."""
    stand_ins: list[Member] = Field(default_factory=list, max_length=2048, json_schema_extra={"x-list-key": "rank"})
    """Spares that have taken a lost rank's place, and keep it."""
    avoid_nodes: list[AvoidedNode] = Field(default_factory=list, max_length=16, json_schema_extra={"x-list-key": "pod"})
    """Nodes that new pods of the gang are kept away from."""


class JobProgress(StatusModel):
    """How far training is, from rank 0."""

    step: int = Field(ge=0)
    """Optimizer steps done."""
    total_steps: int | None = None
    """Optimizer steps in all."""
    percent: int | None = Field(default=None, ge=0, le=100)
    """Share of steps done."""
    epoch: float | None = None
    """Passes over the training data."""
    loss: float | None = None
    """Training loss of the newest step."""
    learning_rate: float | None = None
    """Learning rate of the newest step."""
    gradient_norm: float | None = None
    """Global gradient norm of the newest step, before clipping."""
    tokens_per_second: float | None = None
    """Over all ranks."""
    estimated_completion_time: str | None = Field(default=None, json_schema_extra={"format": "date-time"})
    """From the rate of the newest steps."""
    update_time: str = Field(json_schema_extra={"format": "date-time"})
    """When rank 0 was heard last."""


class MetricValue(StatusModel):
    """One number of an evaluation."""

    name: str = Field(max_length=64)
    """Name of the metric."""
    value: str = Field(max_length=32)
    """Its value; text, so that it reads the same everywhere."""


class JobEvaluation(StatusModel):
    """The newest evaluation."""

    step: int = Field(ge=0)
    """Optimizer steps done when it was made."""
    metrics: list[MetricValue] = Field(default_factory=list, max_length=32, json_schema_extra={"x-list-key": "name"})
    """What was measured."""


class JobCheckpoint(StatusModel):
    """The newest committed checkpoint."""

    step: int = Field(ge=0)
    """Optimizer steps done when it was taken."""
    commit_time: str = Field(json_schema_extra={"format": "date-time"})
    """When it was committed."""
    bytes: int = Field(ge=0)
    """Size of all its objects."""
    uri: str = Field(max_length=2048)
    """Where it is."""


class JobSaves(StatusModel):
    """How saving goes, from rank 0."""

    saving_step: int | None = Field(default=None, ge=0)
    """Optimizer steps done in the save that is on its way to the store; absent when none is."""
    saving_since: str | None = Field(default=None, json_schema_extra={"format": "date-time"})
    """When that save was taken."""
    put_off: int = Field(default=0, ge=0)
    """How many saves in a row were due while there was no room for them in the staging memory."""
    failing_since: str | None = Field(default=None, json_schema_extra={"format": "date-time"})
    """From when on nothing could be committed; absent when the newest save could, or is the first."""
    reason: str = Field(default="", max_length=64)
    """Why nothing can be committed, in one word."""
    message: str = Field(default="", max_length=2048)
    """Why nothing can be committed, in a sentence."""
    stall_seconds: float | None = Field(default=None, ge=0)
    """How long training waited for the newest save that has ended."""
    commit_seconds: float | None = Field(default=None, ge=0)
    """How long after it had begun the newest was committed."""
    recommended_interval_seconds: int | None = Field(default=None, ge=0)
    """The interval between saves that would lose least (Young/Daly)."""


class JobResumed(StatusModel):
    """Where the newest incarnation of the gang that began to train took its state from."""

    generation: int = Field(ge=0)
    """Which incarnation."""
    step: int = Field(ge=0)
    """Optimizer steps done in the state that it started from."""
    source: ResumeSource
    """Start: nothing was saved yet. Memory: what was staged in the pods. Storage: a committed checkpoint. OtherJob: checkpoint.resumeFrom."""
    fallback: str = Field(default="", max_length=2048)
    """Why newer checkpoints could not be used; empty when the newest could."""
    rollbacks: int = Field(default=0, ge=0)
    """How often the job went back because its numbers were not finite, or its loss jumped."""
    skipped_samples: int = Field(default=0, ge=0)
    """Samples that are left out because of that."""


class RestartReason(StatusModel):
    """Restarts for one reason, and what they leave of its budget."""

    reason: str = Field(max_length=64)
    """Why."""
    count: int = Field(ge=0)
    """How many in all."""
    used: int = Field(default=0, ge=0)
    """How many of recovery.maxRestarts are used: in the present window, and since the job last got further."""
    window_start: str | None = Field(default=None, json_schema_extra={"format": "date-time"})
    """When the present window began; absent when such restarts use no budget."""
    last_step: int | None = Field(default=None, ge=0)
    """Optimizer steps done at the newest of them; a checkpoint of a later step makes the budget whole."""


class Restarts(StatusModel):
    """How often the gang was started again."""

    total: int = Field(default=0, ge=0)
    """How often in all."""
    by_reason: list[RestartReason] = Field(
        default_factory=list, max_length=32, json_schema_extra={"x-list-key": "reason"}
    )
    """How often for each reason, and what is left of its budget."""


class Attempt(StatusModel):
    """One ended incarnation of the gang, and why it ended."""

    generation: int = Field(ge=0)
    """Which."""
    start_time: str | None = Field(default=None, json_schema_extra={"format": "date-time"})
    """When its members were committed; absent when it never was complete."""
    end_time: str = Field(json_schema_extra={"format": "date-time"})
    """When the operator ended it."""
    reason: str = Field(max_length=64)
    """Why, in one word."""
    message: str = Field(default="", max_length=2048)
    """Why, in a sentence."""
    pod: str | None = Field(default=None, max_length=253)
    """The pod that was the cause."""
    node: str | None = Field(default=None, max_length=253)
    """The node it was on."""
    rank: int | None = None
    """The global rank that was the cause."""
    exit_code: int | None = None
    """How it ended."""
    signal: int | None = None
    """How it ended."""
    last_step: int | None = Field(default=None, ge=0)
    """Optimizer steps done when it ended; absent when it never told of one."""
    lost_steps: int | None = Field(default=None, ge=0)
    """How many of them had to be done again: known when a later incarnation has found where it starts."""
    fallback: str | None = Field(default=None, max_length=2048)
    """Why it could not start from the newest checkpoint, if so."""


class LostSeconds(StatusModel):
    """Where the time went that did not count."""

    startup: float = Field(default=0.0, ge=0)
    """Until the job trained for the first time."""
    recovery: float = Field(default=0.0, ge=0)
    """From the last progress of an incarnation of the gang until the next one trained."""
    recomputation: float = Field(default=0.0, ge=0)
    """For steps that had to be done again."""
    checkpoint: float = Field(default=0.0, ge=0)
    """While training stood still for saves."""


class Goodput(StatusModel):
    """How much of the job's time, from its first start on and without what it was suspended, went into training that counts."""

    percent: float = Field(default=0.0, ge=0, le=100)
    """Share of the time that counts."""
    productive_seconds: float = Field(default=0.0, ge=0)
    """The time that counts."""
    lost_seconds: LostSeconds = Field(default_factory=LostSeconds)
    """The time that does not."""
    until: str | None = Field(default=None, json_schema_extra={"format": "date-time"})
    """Up to when time is accounted for; absent while the job is suspended."""
    step_seconds: float | None = Field(default=None, ge=0)
    """What a step took of late."""
    stalled_seconds: float = Field(default=0.0, ge=0)
    """For how long the newest incarnation has stood still for saves."""


class ModelResult(StatusModel):
    """The result."""

    uri: str = Field(max_length=2048)
    """A directory in Hugging Face layout."""


class JobStatus(StatusModel):
    """What is, as far as the operator knows."""

    observed_generation: int | None = None
    """The version of spec that the rest was said of."""
    phase: JobPhase | None = None
    """One word for people."""
    conditions: list[Condition] = Field(default_factory=list, max_length=16, json_schema_extra={"x-list-key": "type"})
    """The state, aspect by aspect."""
    start_time: str | None = Field(default=None, json_schema_extra={"format": "date-time"})
    """When the first incarnation of the gang started."""
    completion_time: str | None = Field(default=None, json_schema_extra={"format": "date-time"})
    """When the job ended, either way."""
    gang: Gang | None = None
    """The newest incarnation of the gang."""
    progress: JobProgress | None = None
    """How far training is."""
    evaluation: JobEvaluation | None = None
    """The newest evaluation."""
    checkpoint: JobCheckpoint | None = None
    """The newest committed checkpoint."""
    saves: JobSaves | None = None
    """How saving goes."""
    resumed: JobResumed | None = None
    """Where the newest incarnation of the gang started."""
    restarts: Restarts | None = None
    """How often the gang was started again."""
    attempts: list[Attempt] = Field(default_factory=list, max_length=10)
    """The newest ended incarnations of the gang. Of a row that ended for want of the store or of permission, the first and the newest."""
    goodput: Goodput | None = None
    """How much of the time went into training that counts, and where the rest went; recipes only."""
    model: ModelResult | None = None
    """The result."""
