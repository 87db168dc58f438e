"""What only the operator can see to be wrong with a spec. It costs no pod, and heals by itself when its cause goes."""

from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_operator.plan.observation import Problem
from finetune_operator.settings import AMAZON_S3, ANYWHERE, Settings


def find_problem(job: FineTuneJob, settings: Settings) -> Problem | None:
    """Return why the job cannot be started as it is written, or None."""
    spec = job.spec
    return (
        _unknown_profile(spec, settings)
        or _endpoint_not_allowed(spec, settings)
        or _resume_from_not_allowed(job, settings)
    )


def _unknown_profile(spec: FineTuneJobSpec, settings: Settings) -> Problem | None:
    if spec.workers.profile in settings.profiles:
        return None
    known = ", ".join(sorted(settings.profiles))
    return Problem(
        "UnknownProfile", f"spec.workers.profile: there is no profile {spec.workers.profile!r}; known: {known}"
    )


def _endpoint_not_allowed(spec: FineTuneJobSpec, settings: Settings) -> Problem | None:
    if spec.storage is None:
        return None
    endpoint, profile = spec.storage.endpoint or AMAZON_S3, spec.workers.profile
    of_profile = settings.profiles[profile].allowed_endpoints
    allowed = [one for one in settings.allowed_endpoints if of_profile is None or one in of_profile]
    if endpoint in allowed:
        return None
    where = "here" if of_profile is None else f"for jobs with profile {profile!r}"
    return Problem(
        "EndpointNotAllowed",
        f"spec.storage.endpoint: {endpoint} is not allowed {where}; allowed: {', '.join(allowed) or 'none'}",
    )


def _resume_from_not_allowed(job: FineTuneJob, settings: Settings) -> Problem | None:
    """A bucket and a secret are often shared by namespaces whose jobs are not each other's to read.

    Whether the credentials may read the place is the store's to say; this is what keeps one namespace out of another's prefix.
    """
    wanted, storage = job.spec.checkpoint.resume_from, job.spec.storage
    if wanted is None or storage is None or ANYWHERE in settings.allowed_resume_prefixes:
        return None
    allowed = [f"{storage.uri}/{job.metadata.namespace}", *settings.allowed_resume_prefixes]
    if any(wanted.startswith(f"{prefix}/") for prefix in allowed):
        return None
    places = ", ".join(f"{prefix}/" for prefix in allowed)
    return Problem(
        "ResumeFromNotAllowed",
        f"spec.checkpoint.resumeFrom: {wanted} is not allowed here; allowed is what lies below {places}",
    )
