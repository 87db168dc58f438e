"""The profile that a pod was made by, kept on the pod, so that a pod which joins it later is made by the same one.

An administrator may change or remove a profile at any time, and a gang on two kinds of machine, or with two fabrics, does not train. The
annotation holds the profile whole, with its name: a job that asks for another one gets that.
"""

import json

from finetune_api.job import FineTuneJob
from finetune_operator.settings import Profile, Settings
from finetune_operator.views import PodView


def snapshot(name: str, profile: Profile) -> str:
    """Return what is kept of a profile."""
    return json.dumps({name: profile.to_wire()}, sort_keys=True)


def with_profile_of(peer: PodView | None, job: FineTuneJob, settings: Settings) -> Settings:
    """Return the settings with the profile that a pod of the job was made by, if it is the one that the job asks for.

    A snapshot that cannot be read, of another version or spoilt by hand, is as good as none.
    """
    name = job.spec.workers.profile
    try:
        kept = json.loads(peer.profile) if peer else {}
        profile = Profile.model_validate(kept[name])
    except (ValueError, KeyError, TypeError):
        return settings
    return settings.model_copy(update={"profiles": {**settings.profiles, name: profile}})
