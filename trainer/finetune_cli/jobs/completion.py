"""What a shell is offered behind the words that stand already. One that cannot be told is offered nothing, quietly."""

import typer

from finetune_api.reasons import REASONS
from finetune_client import ClientError, Jobs


def job_names(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of the jobs in the namespace that is meant."""
    given = {name: context.params.get(name) for name in ("namespace", "context", "kubeconfig")}
    try:
        jobs = Jobs.connect(**given).list()
    except ClientError:
        return []
    return [job.name for job in jobs if job.name.startswith(incomplete)]


def reasons(incomplete: str) -> list[str]:
    """Return the reasons that are explained."""
    return [name for name in REASONS if name.startswith(incomplete)]
