"""The ConfigMap of a job: recipe, contract values, and the certificates that the job server may show."""

import json

from finetune_api import contract
from finetune_api.job import Checkpoint, FineTuneJob
from finetune_api.protocol import JobCheckpoint, JobFile, JobStorage, to_wire
from finetune_api.quantity import quantity_value
from finetune_operator.kube_object import KubeObject
from finetune_operator.render.names import child_metadata, child_name, job_prefix
from finetune_operator.settings import Settings


def render_config(job: FineTuneJob, settings: Settings, ca_certificates: str) -> KubeObject:
    """Return the ConfigMap that every pod of the job mounts."""
    recipe = {} if job.spec.recipe is None else job.spec.recipe.to_wire()
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": child_metadata(job, child_name(job)),
        "data": {
            _file(contract.RECIPE_FILE): _json(recipe),
            _file(contract.JOB_FILE): _json(to_wire(job_file(job, settings))),
            _file(contract.CA_FILE): ca_certificates,
        },
    }


def job_file(job: FineTuneJob, settings: Settings) -> JobFile:
    """Return the contract values of a job."""
    prefix = job_prefix(job)
    endpoint = job.spec.storage.endpoint if job.spec.storage else None
    return JobFile(
        namespace=job.metadata.namespace,
        name=job.metadata.name,
        uid=job.metadata.uid,
        job_server=settings.job_server_url,
        command=list(job.spec.script.command) if job.spec.script else [],
        storage=JobStorage(prefix=prefix, endpoint=endpoint) if prefix else None,
        checkpoint=_checkpoint(job.spec.checkpoint),
    )


def _checkpoint(asked: Checkpoint) -> JobCheckpoint:
    interval, rate = asked.interval, asked.upload_bytes_per_second
    return JobCheckpoint(
        interval_steps=interval.steps,
        interval_seconds=interval.seconds,
        interval_auto=interval.auto is not None,
        keep=asked.keep,
        keep_best=asked.keep_best,
        resume_from=asked.resume_from,
        upload_bytes_per_second=int(quantity_value(rate)) if rate is not None else None,
    )


def _file(path: str) -> str:
    return path.removeprefix(contract.CONFIG_FOLDER + "/")


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True)
