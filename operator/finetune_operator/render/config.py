"""The ConfigMap of a job: recipe, contract values, and the certificates that the job server may show."""

import json
from dataclasses import asdict

from finetune_api import contract
from finetune_api.job import FineTuneJob
from finetune_api.protocol import JobCheckpoint, JobFile, JobStorage, to_wire
from finetune_operator.kube_object import KubeObject
from finetune_operator.plan.checkpoint_wish import checkpoint_wish
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
    """Return the contract values of a job, as they are when its pods are made. What is wished of checkpoints comes with each order again."""
    prefix, asked = job_prefix(job), job.spec.checkpoint
    endpoint = job.spec.storage.endpoint if job.spec.storage else None
    return JobFile(
        namespace=job.metadata.namespace,
        name=job.metadata.name,
        uid=job.metadata.uid,
        job_server=settings.job_server_url,
        command=list(job.spec.script.command) if job.spec.script else [],
        storage=JobStorage(prefix=prefix, endpoint=endpoint) if prefix else None,
        checkpoint=JobCheckpoint(**asdict(checkpoint_wish(asked)), resume_from=asked.resume_from),
    )


def _file(path: str) -> str:
    return path.removeprefix(contract.CONFIG_FOLDER + "/")


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True)
