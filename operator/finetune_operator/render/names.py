"""The names of a job's children and the place of its objects, made by us from namespace, name and uid alone."""

from finetune_api import contract
from finetune_api.job import FineTuneJob


def child_name(job: FineTuneJob) -> str:
    """Return the name of a job's ConfigMap and NetworkPolicy; another job of the same name has another one."""
    return f"{job.metadata.name}-{job.metadata.uid[:5]}"


def pod_name(job: FineTuneJob, rank: int, generation: int) -> str:
    """Return a pod's name: a replacement never waits for the name of a pod that is stuck on a dead node."""
    return f"{child_name(job)}-{rank}-{generation}"


def job_prefix(job: FineTuneJob) -> str | None:
    """Return the ``s3://`` prefix that the job writes under, and nowhere else."""
    if job.spec.storage is None:
        return None
    metadata = job.metadata
    return contract.job_prefix(job.spec.storage.uri, metadata.namespace, metadata.name, metadata.uid)


def job_labels(job: FineTuneJob) -> dict[str, str]:
    """Return the labels of all children of a job."""
    return {
        contract.MANAGED_BY_LABEL: contract.MANAGER,
        contract.JOB_LABEL: job.metadata.name,
        contract.JOB_UID_LABEL: job.metadata.uid,
    }


def child_metadata(job: FineTuneJob, name: str, labels: dict[str, str] | None = None) -> dict[str, object]:
    """Return the metadata of a child: deleted with its job, by the API server's garbage collector."""
    return {
        "name": name,
        "namespace": job.metadata.namespace,
        "labels": job_labels(job) | (labels or {}),
        "ownerReferences": [
            {
                "apiVersion": f"{contract.GROUP}/{contract.VERSION}",
                "kind": contract.KIND,
                "name": job.metadata.name,
                "uid": job.metadata.uid,
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ],
    }
