"""FineTuneJobs from Python: submit them, look at them, wait for them, read their logs.

    jobs = Jobs.connect(namespace="team-a")
    job = jobs.submit(read_manifests(Path("sentiment.yaml").read_text())[0])
    job = jobs.wait(job.name, Goal.COMPLETE)
    print(job.status.model.uri)

Synchronous, over the official client's connection handling (kubeconfig, login, TLS) without its models. Layers, each of which knows only
those after it:

    jobs         what can be done with the jobs of a namespace
    logs         which lines of which pods belong to a rank or an attempt
    manifest     what a user wrote, and in which line
    connection   plain JSON to and from an API server
    job, errors  values
"""

from finetune_client.errors import (
    ClientError,
    EndedOtherwise,
    Exists,
    Fault,
    Forbidden,
    NoCluster,
    NotFound,
    NotInstalled,
    Refused,
    TimedOut,
)
from finetune_client.job import Job
from finetune_client.jobs import Event, Goal, Jobs
from finetune_client.manifest import Manifest, read_manifests

__all__ = [
    "ClientError",
    "EndedOtherwise",
    "Event",
    "Exists",
    "Fault",
    "Forbidden",
    "Goal",
    "Job",
    "Jobs",
    "Manifest",
    "NoCluster",
    "NotFound",
    "NotInstalled",
    "Refused",
    "TimedOut",
    "read_manifests",
]
