"""One job as the API server has it."""

from dataclasses import dataclass
from typing import Any, Self

from pydantic import ValidationError

from finetune_api import contract
from finetune_api.job import ObjectMeta
from finetune_api.status import Condition, ConditionType, JobStatus
from finetune_client.errors import ClientError


@dataclass(frozen=True, slots=True)
class Job:
    """A job: the object itself, and its metadata and status as values.

    Its spec stays plain JSON: a newer operator may store what this version does not know, and none of it is decided upon here.
    """

    body: dict[str, Any]
    metadata: ObjectMeta
    status: JobStatus

    @classmethod
    def read(cls, body: dict[str, Any]) -> Self:
        """Return the job of an API object.

        Raises:
            ClientError: its status is of another version.
        """
        try:
            return cls(
                body, ObjectMeta.model_validate(body["metadata"]), JobStatus.model_validate(body.get("status") or {})
            )
        except ValidationError as error:
            name = body["metadata"].get("name")
            raise ClientError(f"the status of {name} cannot be read by this version: {error.errors()[0]}") from error

    @property
    def name(self) -> str:
        """Its name."""
        return self.metadata.name

    @property
    def namespace(self) -> str:
        """Its namespace."""
        return self.metadata.namespace

    @property
    def spec(self) -> dict[str, Any]:
        """What the user wrote, and the defaults."""
        spec: dict[str, Any] = self.body["spec"]
        return spec

    @property
    def prefix(self) -> str | None:
        """Where it writes, ``s3://…``; None for a job without storage."""
        storage = self.spec.get("storage")
        return storage and contract.job_prefix(storage["uri"], self.namespace, self.name, self.metadata.uid)

    @property
    def processes_per_node(self) -> int:
        """Ranks in each pod."""
        workers = self.spec.get("workers") or {}
        if self.status.gang is not None:
            return self.status.gang.processes_per_node
        return int(workers.get("processesPerNode") or max(1, (workers.get("resources") or {}).get("gpus", 0)))

    @property
    def max_restarts(self) -> int:
        """Restarts that one reason may cause before the job gets any further."""
        return int((self.spec.get("recovery") or {}).get("maxRestarts", 8))

    def condition(self, kind: ConditionType) -> Condition | None:
        """Return one condition, if the operator has said it."""
        return next((condition for condition in self.status.conditions if condition.type == kind), None)

    def holds(self, kind: ConditionType) -> bool:
        """Tell whether a condition is True."""
        condition = self.condition(kind)
        return condition is not None and condition.status == "True"

    @property
    def is_final(self) -> bool:
        """Whether it has succeeded or failed, for good."""
        return self.holds(ConditionType.COMPLETE) or self.holds(ConditionType.FAILED)

    @property
    def is_seen(self) -> bool:
        """Whether the operator has looked at the newest version of its spec."""
        return self.status.observed_generation == self.metadata.generation
