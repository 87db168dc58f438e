"""The pods of a gang.

Each passes the Pod Security Standard "restricted", holds no right to the Kubernetes API, and runs the agent as PID 1 of the user's
image: an init container copies it out of the operator's own image, so any image with Python and PyTorch will do. Images that expect to be
root find a writable HOME, a user name and cache folders.

A pod that takes a place beside others has their images and their profile, whatever the operator and its settings have become meanwhile: one gang
runs one agent and one trainer, on machines of one kind. A gang that starts without a pod gets the newest.
"""

from finetune_api import contract
from finetune_api.job import FineTuneJob, Script
from finetune_api.quantity import total_bytes
from finetune_api.recipe import Recipe
from finetune_operator.kube_object import KubeObject
from finetune_operator.plan.observation import NewPod
from finetune_operator.plan.shape import shape_of
from finetune_operator.render.names import child_metadata, child_name, job_labels, pod_name
from finetune_operator.render.profile import snapshot
from finetune_operator.settings import Profile, Settings
from finetune_operator.views import PodView

USER_ID = 65532
GRACE_SECONDS = 60
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
CUDA_RESOURCES = (
    "nvidia.com/",
    "amd.com/",
)  # what PyTorch and DeepSpeed call cuda, ROCm too; other devices have names of their own
INIT_RESOURCES = {"cpu": "100m", "memory": "128Mi"}


def render_pod(job: FineTuneJob, place: NewPod, settings: Settings, peer: PodView | None = None) -> KubeObject:
    """Return the pod for one place in the gang, with the images of a ``peer`` that trains, if there is one."""
    profile = settings.profiles[job.spec.workers.profile]
    labels = {contract.RANK_LABEL: str(place.rank), contract.GENERATION_LABEL: str(place.generation)}
    annotations = {
        contract.PROFILE_ANNOTATION: snapshot(job.spec.workers.profile, profile),
        contract.SHAPE_ANNOTATION: shape_of(job),
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": child_metadata(job, pod_name(job, place.rank, place.generation), labels)
        | {"annotations": annotations},
        "spec": {
            "restartPolicy": "OnFailure",
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **_spread(job, place),
            **_placement(job, profile),
            "initContainers": [_init_container(settings, peer)],
            "containers": [_trainer_container(job, profile, peer)],
            "volumes": _volumes(job, profile),
        },
    }


def _spread(job: FineTuneJob, place: NewPod) -> KubeObject:
    """Spread the gang over nodes, or keep the pod away from some: the scheduler adds up wishes, and would weigh one against the other."""
    if not place.avoid:
        return {"topologySpreadConstraints": [_one_per_node(job)]}
    elsewhere = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in place.avoid]
    wish = {"weight": 100, "preference": {"matchFields": elsewhere}}
    return {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [wish]}}}


def _one_per_node(job: FineTuneJob) -> KubeObject:
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {contract.JOB_UID_LABEL: job_labels(job)[contract.JOB_UID_LABEL]}},
    }


def _placement(job: FineTuneJob, profile: Profile) -> KubeObject:
    placement: KubeObject = {}
    if job.spec.storage is not None and job.spec.storage.service_account_name is not None:
        placement["serviceAccountName"] = job.spec.storage.service_account_name
    if profile.node_selector:
        placement["nodeSelector"] = profile.node_selector
    if profile.tolerations:
        placement["tolerations"] = list(profile.tolerations)
    if profile.priority_class_name:
        placement["priorityClassName"] = profile.priority_class_name
    if profile.runtime_class_name:
        placement["runtimeClassName"] = profile.runtime_class_name
    if profile.image_pull_secrets:
        placement["imagePullSecrets"] = [{"name": name} for name in profile.image_pull_secrets]
    return placement


def _init_container(settings: Settings, peer: PodView | None) -> KubeObject:
    return {
        "name": contract.AGENT_CONTAINER,
        "image": peer.agent_image if peer else settings.operator_image,
        **_pull_policy(settings.operator_image_pull_policy),
        "args": ["install-agent", contract.AGENT_FILE],
        "securityContext": RESTRICTED,
        "resources": {"requests": INIT_RESOURCES, "limits": INIT_RESOURCES},
        "volumeMounts": [{"name": "agent", "mountPath": contract.AGENT_FOLDER}],
    }


def _trainer_container(job: FineTuneJob, profile: Profile, peer: PodView | None) -> KubeObject:
    script = job.spec.script
    resources = _resources(job, profile)
    image = script.image if script else profile.image
    mounts = [
        {"name": "agent", "mountPath": contract.AGENT_FOLDER},
        {"name": "config", "mountPath": contract.CONFIG_FOLDER, "readOnly": True},
        {"name": "token", "mountPath": contract.TOKEN_FOLDER, "readOnly": True},
        {"name": "scratch", "mountPath": contract.SCRATCH_FOLDER},
        {"name": "scratch", "mountPath": "/tmp", "subPath": "tmp"},  # noqa: S108  the pod's own
        {"name": "shared-memory", "mountPath": contract.SHARED_MEMORY_FOLDER},
    ]
    if staging_memory(job) is not None:
        mounts.append({"name": "staging", "mountPath": contract.STAGING_FOLDER})
    if _secret(job) is not None:
        mounts.append({"name": "credentials", "mountPath": contract.CREDENTIALS_FOLDER, "readOnly": True})
    claims = [
        {"name": volume, "mountPath": f"{contract.CLAIMS_FOLDER}/{claim}", "readOnly": True}
        for volume, claim in claims_of(job).items()
    ]
    return {
        "name": contract.TRAINER_CONTAINER,
        "image": peer.trainer_image if peer else image,
        **_pull_policy(profile.image_pull_policy),
        "command": ["python3", contract.AGENT_FILE],
        "env": _environment(job, profile, script),
        "securityContext": RESTRICTED,
        "resources": {"requests": resources, "limits": resources},
        "terminationMessagePolicy": "File",
        "volumeMounts": mounts + claims,
    }


def _resources(job: FineTuneJob, profile: Profile) -> dict[str, str]:
    """Return what the trainer asks for, and on top of it what lies in its volumes of memory, which the kernel counts as the pod's."""
    asked = job.spec.workers.resources
    in_memory = [profile.shared_memory, staging_memory(job) or "0"]
    resources = {"cpu": asked.cpu, "memory": total_bytes(asked.memory, *in_memory)}
    gpus = {profile.gpu_resource: str(asked.gpus)} if asked.gpus else {}
    return profile.resources | resources | gpus


def staging_memory(job: FineTuneJob) -> str | None:
    """Return the size of the volume for checkpoints on their way, or None for a script, whose checkpoints are its own."""
    return job.spec.checkpoint.staging_memory if job.spec.recipe is not None else None


def _environment(job: FineTuneJob, profile: Profile, script: Script | None) -> list[KubeObject]:
    literal = {
        "HOME": contract.SCRATCH_FOLDER,
        "USER": contract.MANAGER,
        "LOGNAME": contract.MANAGER,
        "XDG_CACHE_HOME": f"{contract.SCRATCH_FOLDER}/.cache",
        "HF_HOME": f"{contract.SCRATCH_FOLDER}/.cache/huggingface",
        "TRITON_CACHE_DIR": f"{contract.SCRATCH_FOLDER}/.cache/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{contract.SCRATCH_FOLDER}/.cache/inductor",
        "MPLCONFIGDIR": f"{contract.SCRATCH_FOLDER}/.cache/matplotlib",
        "PYTHONUNBUFFERED": "1",
        contract.GRACE_SECONDS: str(GRACE_SECONDS - contract.GRACE_MARGIN_SECONDS),
    }
    # Else DeepSpeed takes an image with CUDA for a machine with CUDA, and a machine whose CUDA is broken for one without.
    if job.spec.workers.resources.gpus == 0:
        literal["DS_ACCELERATOR"] = "cpu"
    elif profile.gpu_resource.startswith(CUDA_RESOURCES):
        literal["DS_ACCELERATOR"] = "cuda"
    literal |= profile.environment
    own = script.environment if script else ()
    literal |= {variable.name: variable.value.replace("$", "$$") for variable in own}  # a kubelet expands $(NAME) in it
    fields = {
        contract.POD_NAME: "metadata.name",
        contract.POD_UID: "metadata.uid",
        contract.POD_ADDRESS: "status.podIP",
    }
    return [
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()),
        *({"name": name, "value": value} for name, value in sorted(literal.items())),
        *_credentials(job),
    ]


def _credentials(job: FineTuneJob) -> list[KubeObject]:
    """Name the keys of the user's secret: the kubelet reads it, the operator never does."""
    secret = _secret(job)
    if secret is None:
        return []
    return [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": optional}}}
        for key, optional in contract.CREDENTIALS.items()
    ]


def _secret(job: FineTuneJob) -> str | None:
    return job.spec.storage.secret_name if job.spec.storage else None


def _storage_volumes(job: FineTuneJob) -> list[KubeObject]:
    """Return the volumes of what goes to storage and of the right to do so.

    The secret is optional as a volume: one that is missing shows in the reason why the container waits for its environment, and a
    volume would hide that.
    """
    volumes: list[KubeObject] = []
    size, secret = staging_memory(job), _secret(job)
    if size is not None:
        volumes.append({"name": "staging", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
    if secret is not None:
        items = [{"key": key, "path": key} for key in contract.CREDENTIALS]
        source = {"secretName": secret, "optional": True, "defaultMode": 0o440, "items": items}
        volumes.append({"name": "credentials", "secret": source})
    return volumes


def _volumes(job: FineTuneJob, profile: Profile) -> list[KubeObject]:
    token = {"audience": contract.TOKEN_AUDIENCE, "expirationSeconds": contract.TOKEN_SECONDS, "path": "token"}
    claims = [
        {"name": volume, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        for volume, claim in claims_of(job).items()
    ]
    return [
        {"name": "agent", "emptyDir": {}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": profile.shared_memory}},
        {"name": "config", "configMap": {"name": child_name(job)}},
        {"name": "token", "projected": {"sources": [{"serviceAccountToken": token}]}},
        *_storage_volumes(job),
        *claims,
    ]


def claims_of(job: FineTuneJob) -> dict[str, str]:
    """Return the persistent volume claims that a recipe reads from, each once, by the name of their volume."""
    sources = _sources(job.spec.recipe) if job.spec.recipe else []
    claims = sorted({uri.removeprefix("pvc://").split("/", 1)[0] for uri in sources if uri.startswith("pvc://")})
    return {f"claim-{number}": claim for number, claim in enumerate(claims)}


def _sources(recipe: Recipe) -> list[str]:
    evaluation = [recipe.data.evaluation.source] if recipe.data.evaluation else []
    return [recipe.model.source, recipe.data.train.source, *evaluation]


def _pull_policy(policy: str | None) -> KubeObject:
    return {"imagePullPolicy": policy} if policy else {}
