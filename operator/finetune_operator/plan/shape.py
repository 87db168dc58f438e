"""The shape of pods: what of spec they are made with, and which of them were made with something else.

The API server takes another shape only with ``suspend: true``, but nobody promises that an operator sees the suspension: it may be over in a
moment, or while no operator runs. So each pod carries a digest of the shape that it was made in, and whoever looks later compares.

The digest is of what spec says and of nothing else: not of profiles, which are the administrator's, and of no field that is not named here. A
version that names another one must leave the digest of a job without it as it was, or an upgrade would take down every gang. A pod
that says nothing was made by an older operator, and fits.
"""

import hashlib
import json
from collections.abc import Iterable

from finetune_api.job import FineTuneJob
from finetune_operator.views import PodView


def shape_of(job: FineTuneJob) -> str:
    """Return the digest of the shape that spec asks for."""
    workers = job.spec.workers
    resources = workers.resources
    made_with = {
        "cpu": resources.cpu,
        "memory": resources.memory,
        "gpus": resources.gpus,
        "profile": workers.profile,
        "processesPerNode": workers.local_processes,
        "stagingMemory": job.spec.checkpoint.staging_memory,
    }
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]


def in_shape(job: FineTuneJob, pods: Iterable[PodView]) -> tuple[PodView, ...]:
    """Return the pods that are made as spec asks for."""
    shape = shape_of(job)
    return tuple(pod for pod in pods if pod.shape in ("", shape))


def misshapen(job: FineTuneJob, pods: Iterable[PodView]) -> tuple[PodView, ...]:
    """Return the pods that are made in another way."""
    shape = shape_of(job)
    return tuple(pod for pod in pods if pod.shape not in ("", shape))
