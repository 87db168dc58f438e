"""What only the operator can see to be wrong with a spec. It costs no pod, and heals by itself when its cause goes."""

from finetune_api.job import FineTuneJobSpec
from finetune_operator.plan.observation import Problem
from finetune_operator.settings import AMAZON_S3, Settings


def find_problem(spec: FineTuneJobSpec, settings: Settings) -> Problem | None:
    """Return why the job cannot be started as it is written, or None."""
    return _unsupported(spec) or _unknown_profile(spec, settings) or _endpoint_not_allowed(spec, settings)


def _unsupported(spec: FineTuneJobSpec) -> Problem | None:
    asked = {
        "checkpoint.resumeFrom": spec.checkpoint.resume_from is not None,
        "checkpoint.interval.auto": spec.checkpoint.interval.auto is not None,
        "workers.spares": spec.workers.spares > 0,
        "pendingDeadlineSeconds": spec.pending_deadline_seconds is not None,
    }
    fields = ", ".join(f"spec.{name}" for name, is_asked in asked.items() if is_asked)
    if not fields:
        return None
    return Problem("Unsupported", f"{fields}: this version of the operator does not support it yet; leave it out")


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
    endpoint = spec.storage.endpoint or AMAZON_S3
    if endpoint in settings.allowed_endpoints:
        return None
    allowed = ", ".join(settings.allowed_endpoints) or "none"
    return Problem("EndpointNotAllowed", f"spec.storage.endpoint: {endpoint} is not allowed here; allowed: {allowed}")
