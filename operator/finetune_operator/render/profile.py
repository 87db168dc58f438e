"""The profile that a pod was made by, kept on the pod, so that a pod which joins it later is made by the same one.

An administrator may change or remove a profile at any time, and a gang on two kinds of machine, or with two fabrics, does not train. The
annotation holds the profile whole, with its name: a job that asks for another one, which it may while it is suspended, gets that.
"""

import json
from collections.abc import Sequence

from finetune_api.job import FineTuneJob
from finetune_operator.settings import Profile, Settings
from finetune_operator.views import PodView


def snapshot(name: str, profile: Profile) -> str:
    """Return what is kept of a profile."""
    return json.dumps({name: profile.to_wire()}, sort_keys=True)


def find_peer(pods: Sequence[PodView]) -> PodView | None:
    """Return a pod that trains, whose images others of its gang get."""
    return next((pod for pod in pods if pod.trains), None)


def find_example(pods: Sequence[PodView], settings: Settings) -> PodView | None:
    """Return a pod by whose profile others are made: one that trains, else one that did: it starts again, is drained, has ended.

    The latter only if this version has made it, since the ConfigMap may be made anew, and a trainer of an older profile might not read
    it. And not from a node that is gone, where a pod stays long after its job was suspended.
    """
    trained = (
        pod for pod in pods if pod.has_trained and not pod.node_lost and pod.agent_image == settings.operator_image
    )
    return find_peer(pods) or next(trained, None)


def with_profile_of(example: PodView | None, job: FineTuneJob, settings: Settings) -> Settings:
    """Return the settings with the profile that a pod of the job was made by, if it is the one that the job asks for.

    A snapshot that cannot be read, of another version or spoilt by hand, is as good as none.
    """
    name = job.spec.workers.profile
    try:
        kept = json.loads(example.profile) if example else {}
        profile = Profile.model_validate(kept[name])
    except (ValueError, KeyError, TypeError):
        return settings
    return settings.model_copy(update={"profiles": {**settings.profiles, name: profile}})
