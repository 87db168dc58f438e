"""The pods of a gang: one compared whole, and what must hold for every job that the API accepts."""

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api import contract
from finetune_api.job import FineTuneJob, parse_job
from finetune_api.protocol import JobFile, from_wire
from finetune_api.quantity import quantity_value, total_bytes
from finetune_api.recipe import MetricName
from finetune_operator.plan.observation import NewPod
from finetune_operator.render.config import render_config
from finetune_operator.render.names import child_name, job_prefix, pod_name
from finetune_operator.render.network import render_network_policy
from finetune_operator.render.pod import render_pod
from finetune_operator.render.profile import with_profile_of
from finetune_operator.settings import Profile
from finetune_operator.views import pod_view
from tests.api import strategies
from tests.operator.documents import RECIPE, SCRIPT, a_job, job_body
from tests.operator.documents import settings as administrator
from tests.operator.restricted import violations
from tests.operator.story import document

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


def test_a_whole_pod() -> None:
    pod = render_pod(a_job(), NewPod(rank=1, generation=3), administrator())
    assert pod == document("""
      apiVersion: v1
      kind: Pod
      metadata:
        name: sentiment-aaaaa-1-3
        namespace: team-a
        labels:
          app.kubernetes.io/managed-by: finetune-operator
          finetune.dev/job: sentiment
          finetune.dev/job-uid: aaaaabbb-0000-4000-8000-000000000001
          finetune.dev/rank: "1"
          finetune.dev/generation: "3"
        annotations:
          finetune.dev/profile: >-
            {"default": {"environment": {}, "gpuResource": "nvidia.com/gpu", "image": "registry.example/finetune-trainer:0.1.0",
            "imagePullSecrets": [], "nodeSelector": {}, "resources": {}, "sharedMemory": "1Gi", "tolerations": []}}
          finetune.dev/shape: 6e0a7adf04203227
        ownerReferences:
        - apiVersion: finetune.dev/v1alpha1
          kind: FineTuneJob
          name: sentiment
          uid: aaaaabbb-0000-4000-8000-000000000001
          controller: true
          blockOwnerDeletion: false
      spec:
        restartPolicy: OnFailure
        terminationGracePeriodSeconds: 60
        automountServiceAccountToken: false
        enableServiceLinks: false
        securityContext:
          runAsNonRoot: true
          runAsUser: 65532
          runAsGroup: 65532
          fsGroup: 65532
          fsGroupChangePolicy: OnRootMismatch
          seccompProfile: {type: RuntimeDefault}
        topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector: {matchLabels: {finetune.dev/job-uid: aaaaabbb-0000-4000-8000-000000000001}}
        initContainers:
        - name: agent
          image: registry.example/finetune-operator:0.1.0
          args: [install-agent, /finetune/agent.pyz]
          securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
          resources: {requests: {cpu: 100m, memory: 128Mi}, limits: {cpu: 100m, memory: 128Mi}}
          volumeMounts: [{name: agent, mountPath: /finetune}]
        containers:
        - name: trainer
          image: registry.example/finetune-trainer:0.1.0
          command: [python3, /finetune/agent.pyz]
          env:
          - {name: FINETUNE_POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
          - {name: FINETUNE_POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
          - {name: FINETUNE_POD_ADDRESS, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
          - {name: DS_ACCELERATOR, value: cpu}
          - {name: FINETUNE_GRACE_SECONDS, value: "50"}
          - {name: HF_HOME, value: /scratch/.cache/huggingface}
          - {name: HOME, value: /scratch}
          - {name: LOGNAME, value: finetune-operator}
          - {name: MPLCONFIGDIR, value: /scratch/.cache/matplotlib}
          - {name: PYTHONUNBUFFERED, value: "1"}
          - {name: TORCHINDUCTOR_CACHE_DIR, value: /scratch/.cache/inductor}
          - {name: TRITON_CACHE_DIR, value: /scratch/.cache/triton}
          - {name: USER, value: finetune-operator}
          - {name: XDG_CACHE_HOME, value: /scratch/.cache}
          - {name: AWS_ACCESS_KEY_ID, valueFrom: {secretKeyRef: {name: s3-credentials, key: AWS_ACCESS_KEY_ID, optional: false}}}
          - {name: AWS_SECRET_ACCESS_KEY, valueFrom: {secretKeyRef: {name: s3-credentials, key: AWS_SECRET_ACCESS_KEY, optional: false}}}
          - {name: AWS_SESSION_TOKEN, valueFrom: {secretKeyRef: {name: s3-credentials, key: AWS_SESSION_TOKEN, optional: true}}}
          securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
          resources:
            requests: {cpu: "1", memory: "6442450944"}
            limits: {cpu: "1", memory: "6442450944"}
          terminationMessagePolicy: File
          volumeMounts:
          - {name: agent, mountPath: /finetune}
          - {name: config, mountPath: /etc/finetune, readOnly: true}
          - {name: token, mountPath: /var/run/secrets/finetune, readOnly: true}
          - {name: scratch, mountPath: /scratch}
          - {name: scratch, mountPath: /tmp, subPath: tmp}
          - {name: shared-memory, mountPath: /dev/shm}
          - {name: staging, mountPath: /staging}
          - {name: credentials, mountPath: /var/run/secrets/storage, readOnly: true}
        volumes:
        - {name: agent, emptyDir: {}}
        - {name: scratch, emptyDir: {}}
        - {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: 1Gi}}
        - {name: config, configMap: {name: sentiment-aaaaa}}
        - {name: token, projected: {sources: [{serviceAccountToken: {audience: job-server.finetune.dev, expirationSeconds: 3600, path: token}}]}}
        - {name: staging, emptyDir: {medium: Memory, sizeLimit: 1Gi}}
        - name: credentials
          secret:
            secretName: s3-credentials
            optional: true
            defaultMode: 288
            items:
            - {key: AWS_ACCESS_KEY_ID, path: AWS_ACCESS_KEY_ID}
            - {key: AWS_SECRET_ACCESS_KEY, path: AWS_SECRET_ACCESS_KEY}
            - {key: AWS_SESSION_TOKEN, path: AWS_SESSION_TOKEN}
    """)


def test_what_a_profile_says_is_in_the_pod() -> None:
    spec = render_pod(
        a_job("workers: {profile: fabric, resources: {memory: 3Gi, gpus: 4}}"), NewPod(0, 1), administrator()
    )["spec"]
    trainer = spec["containers"][0]
    placement = {
        name: spec[name]
        for name in ("nodeSelector", "tolerations", "priorityClassName", "runtimeClassName", "imagePullSecrets")
    }
    assert placement == document("""
      nodeSelector: {fabric: infiniband}
      tolerations: [{key: gpu, operator: Exists}]
      priorityClassName: training
      runtimeClassName: nvidia
      imagePullSecrets: [{name: registry}]
    """)
    assert trainer["imagePullPolicy"] == "Always"
    assert trainer["resources"]["requests"] == trainer["resources"]["limits"]
    assert trainer["resources"]["limits"] == document("""
      {cpu: "1", memory: "12884901888", nvidia.com/gpu: "4", rdma/hca: "4", hugepages-2Mi: 1Gi}
    """)
    names = {variable["name"]: variable.get("value") for variable in trainer["env"]}
    assert names["NCCL_SOCKET_IFNAME"] == "eth0"
    assert names["DS_ACCELERATOR"] == "cuda", "a GPU that is there and does not work is an error"


def test_a_pod_that_avoids_nodes_is_kept_away_by_their_names_and_not_spread() -> None:
    spec = render_pod(a_job(), NewPod(0, 2, ("node-1", "node-2")), administrator())["spec"]
    assert spec["affinity"] == document("""
      nodeAffinity:
        preferredDuringSchedulingIgnoredDuringExecution:
        - weight: 100
          preference:
            matchFields:
            - {key: metadata.name, operator: NotIn, values: [node-1]}
            - {key: metadata.name, operator: NotIn, values: [node-2]}
    """)
    assert "topologySpreadConstraints" not in spec


def test_a_web_identity_takes_the_place_of_a_secret() -> None:
    job = a_job("storage: {uri: s3://checkpoints, serviceAccountName: trainer}")
    pod = render_pod(job, NewPod(0, 1), administrator())
    assert pod["spec"]["serviceAccountName"] == "trainer"
    assert "secretKeyRef" not in json.dumps(pod)
    assert not [volume for volume in pod["spec"]["volumes"] if "secret" in volume]


STAGING = {
    "512Mi": "what is asked for",
    2147483648: "a number",
    "1.5Gi": "a part of a gigabyte",
}


@pytest.mark.parametrize("size", STAGING, ids=STAGING.values())
def test_staging_is_memory_of_its_own_on_top_of_the_trainer_s(size: str | int) -> None:
    job = a_job(json.dumps({"checkpoint": {"stagingMemory": size}}))
    spec = render_pod(job, NewPod(0, 1), administrator())["spec"]
    (volume,) = (volume for volume in spec["volumes"] if volume["name"] == "staging")
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": str(size)}
    limits = spec["containers"][0]["resources"]["limits"]
    assert limits["memory"] == total_bytes("4Gi", "1Gi", str(size)), "the trainer's, /dev/shm, staging"


def test_a_script_has_no_staging_and_pays_for_none() -> None:
    spec = render_pod(a_job(base=SCRIPT), NewPod(0, 1), administrator())["spec"]
    assert "staging" not in json.dumps(spec)
    assert spec["containers"][0]["resources"]["limits"]["memory"] == total_bytes("4Gi", "1Gi")


def test_each_claim_that_a_recipe_reads_is_mounted_once_and_read_only() -> None:
    recipe = document(RECIPE)["recipe"]
    recipe["model"] = {"source": "pvc://models/minilm"}
    recipe["data"]["train"] = {"source": "pvc://data/train.jsonl"}
    recipe["data"]["evaluation"] = {"source": "pvc://data/eval.jsonl"}
    recipe["evaluation"] = {"everySteps": 10, "metrics": ["Accuracy"]}
    spec = render_pod(a_job(json.dumps({"recipe": recipe})), NewPod(0, 1), administrator())["spec"]
    assert [volume for volume in spec["volumes"] if "persistentVolumeClaim" in volume] == [
        {"name": "claim-0", "persistentVolumeClaim": {"claimName": "data", "readOnly": True}},
        {"name": "claim-1", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
    ]
    assert spec["containers"][0]["volumeMounts"][-2:] == [
        {"name": "claim-0", "mountPath": "/claims/data", "readOnly": True},
        {"name": "claim-1", "mountPath": "/claims/models", "readOnly": True},
    ]


def test_a_script_runs_in_its_own_image_with_its_own_environment_and_its_command_in_a_file() -> None:
    script = 'script: {command: [python, "train.py; rm -rf /"], image: "mine:1", environment: [{name: MODE, value: "fast$(HOME)$$"}, {name: USER, value: me}]}'
    job = a_job(script, base=SCRIPT)
    trainer = render_pod(job, NewPod(0, 1), administrator())["spec"]["containers"][0]
    assert (trainer["image"], trainer["command"]) == ("mine:1", ["python3", "/finetune/agent.pyz"])
    environment = {variable["name"]: variable.get("value") for variable in trainer["env"]}
    assert (environment["MODE"], environment["USER"]) == ("fast$$(HOME)$$$$", "me"), (
        "a kubelet makes of it what was written"
    )
    config = json.loads(render_config(job, administrator(), "CA")["data"]["job.json"])
    assert config["command"] == ["python", "train.py; rm -rf /"]


def test_the_whole_config_map() -> None:
    config = render_config(a_job("checkpoint: {interval: {steps: 50}, keep: 3}"), administrator(), "CA PEM")
    assert config["metadata"]["name"] == "sentiment-aaaaa"
    assert config["metadata"]["ownerReferences"][0]["uid"] == a_job().metadata.uid
    assert config["data"].keys() == {"recipe.json", "job.json", "ca.crt"}
    assert config["data"]["ca.crt"] == "CA PEM"
    assert json.loads(config["data"]["job.json"]) == document("""
      namespace: team-a
      name: sentiment
      uid: aaaaabbb-0000-4000-8000-000000000001
      jobServer: https://finetune-operator.finetune-system.svc:9443
      command: []
      storage: {prefix: s3://checkpoints/team-a/team-a/sentiment-aaaaabbb, endpoint: "http://store.example:8333"}
      checkpoint: {intervalSteps: 50, intervalAuto: false, keep: 3}
    """)
    recipe = json.loads(config["data"]["recipe.json"])
    assert recipe["model"]["source"] == "s3://models/minilm"


CHECKPOINTS = {
    "nothing said: every ten minutes": ("{}", {"intervalSeconds": 600}),
    "an interval in steps": ("{interval: {steps: 7}}", {"intervalSteps": 7}),
    "the interval that loses least": ("{interval: {auto: true}}", {"intervalAuto": True}),
    "the best kept": ("{keepBest: MacroF1, interval: {steps: 7}}", {"intervalSteps": 7, "keepBest": "MacroF1"}),
    "another job's checkpoint": (
        '{resumeFrom: "s3://checkpoints/team-a/team-a/old-12345678@50"}',
        {"intervalSeconds": 600, "resumeFrom": "s3://checkpoints/team-a/team-a/old-12345678@50"},
    ),
    "a pace of uploads, in bytes": ("{uploadBytesPerSecond: 1.5Mi}", {"intervalSeconds": 600, "uploadBytesPerSecond": 1572864}),
    "a pace of uploads as a number": ("{uploadBytesPerSecond: 2000000}", {"intervalSeconds": 600, "uploadBytesPerSecond": 2000000}),
}  # fmt: skip


@pytest.mark.parametrize(("asked", "told"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_what_the_trainer_is_told_of_checkpoints(asked: str, told: dict[str, Any]) -> None:
    recipe = document(RECIPE)["recipe"]
    recipe["data"]["evaluation"] = {"source": "s3://datasets/reviews/evaluation.jsonl"}
    recipe["evaluation"] = {"metrics": ["Accuracy", "MacroF1"]}
    job = a_job(json.dumps({"recipe": recipe, "checkpoint": document(asked)}))
    file = json.loads(render_config(job, administrator(), "")["data"]["job.json"])
    assert file["checkpoint"] == {"intervalAuto": False, "keep": 2} | told
    assert from_wire(JobFile, file).checkpoint.keep_best in (None, *MetricName), "in the words of the recipe"


def test_the_trainer_reads_the_recipe_that_the_user_wrote() -> None:
    from finetune_api.recipe import Recipe

    job = a_job()
    assert (
        Recipe.model_validate(json.loads(render_config(job, administrator(), "")["data"]["recipe.json"]))
        == job.spec.recipe
    )


# What holds for every job that the API accepts, and every profile that the settings do.

names = strategies.names.filter(contract.is_job_name)
objects = strategies.labels_of_dns
texts = st.dictionaries(st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8})?", fullmatch=True), objects, max_size=3)
profiles = st.fixed_dictionaries(
    {"image": st.sampled_from(["train", f"registry.example:5000/train@sha256:{'0' * 64}"])},
    optional={
        "imagePullPolicy": st.sampled_from(["Always", "IfNotPresent", "Never"]),
        "imagePullSecrets": st.lists(objects, max_size=2),
        "nodeSelector": texts,
        "tolerations": st.lists(st.sampled_from([{"operator": "Exists"}, {"key": "gpu", "operator": "Exists"}]), max_size=2),
        "gpuResource": st.sampled_from(["nvidia.com/gpu", "amd.com/gpu"]),
        "sharedMemory": strategies.memory.map(str),
        "priorityClassName": objects,
        "runtimeClassName": objects,
        "environment": st.dictionaries(strategies.environment_names | st.sampled_from(["HOME", "LD_LIBRARY_PATH", "AWS_REGION", "NCCL_NET_PLUGIN"]), st.text(max_size=9), max_size=4),
        "resources": st.dictionaries(st.sampled_from(["rdma/hca", "vpc.amazonaws.com/efa", "hugepages-2Mi"]), st.sampled_from(["1", "32", "5Gi"]), max_size=3),
    },
).map(Profile.model_validate)  # fmt: skip


@st.composite
def jobs(draw: st.DrawFn) -> FineTuneJob:
    body = job_body(name=draw(names), namespace=draw(objects), uid=str(draw(st.uuids())))
    spec = draw(strategies.jobs())["spec"]
    return parse_job(body | {"spec": spec | {"workers": spec.get("workers", {}) | {"profile": "drawn"}}})


nodes = st.lists(objects, max_size=16, unique=True).map(tuple)
places = st.builds(NewPod, st.integers(0, 2047), st.integers(1, 10**8), nodes)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(jobs(), places, profiles)
def test_every_pod_of_every_job_passes_the_restricted_standard_and_the_contract(job, place, profile) -> None:
    pod = render_pod(job, place, administrator().model_copy(update={"profiles": {"drawn": profile}}))
    assert violations(pod) == []
    name = pod["metadata"]["name"]
    assert len(name) <= 63
    assert LABEL.fullmatch(name)
    assert all(
        len(value) <= 63 and re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", value)
        for value in pod["metadata"]["labels"].values()
    )
    init, trainer = pod["spec"]["initContainers"][0], pod["spec"]["containers"][0]
    assert init["args"] == ["install-agent", contract.AGENT_FILE]
    assert "command" not in init
    assert "args" not in trainer
    assert trainer["command"] == ["python3", contract.AGENT_FILE], "nothing of the job is in a command line"
    environment = [variable["name"] for variable in trainer["env"]]
    assert len(environment) == len(set(environment))
    for variable in trainer["env"]:
        if variable["name"] in contract.CREDENTIALS:
            assert variable["valueFrom"].keys() == {"secretKeyRef"}, "credentials are only ever named"
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert trainer["resources"]["requests"] == trainer["resources"]["limits"]
    asked = job.spec.workers.resources
    assert trainer["resources"]["limits"]["cpu"] == asked.cpu
    assert trainer["resources"]["limits"].get(profile.gpu_resource, "0") == str(asked.gpus)
    assert quantity_value(trainer["resources"]["limits"]["memory"]) >= quantity_value(asked.memory)
    mounted = {mount["name"] for mount in trainer["volumeMounts"]}
    assert mounted <= {volume["name"] for volume in pod["spec"]["volumes"]}
    pod["metadata"]["uid"] = "as the API server gives it"
    again = with_profile_of(pod_view(pod), job, administrator())
    assert again.profiles["drawn"] == profile, "one that joins it is made by the same"


@settings(max_examples=30, deadline=None)
@given(jobs())
def test_all_children_of_every_job_are_named_after_it_and_go_with_it(job) -> None:
    for child in (render_config(job, administrator(), "CA"), render_network_policy(job, administrator())):
        assert LABEL.fullmatch(child["metadata"]["name"])
        assert len(child["metadata"]["name"]) <= 63
        assert child["metadata"]["ownerReferences"][0]["uid"] == job.metadata.uid
        assert child["metadata"]["namespace"] == job.metadata.namespace
    if job.spec.storage:
        assert (
            job_prefix(job)
            == f"{job.spec.storage.uri}/{job.metadata.namespace}/{job.metadata.name}-{job.metadata.uid[:8]}"
        )


def test_the_longest_name_there_can_be_is_a_dns_label() -> None:
    job = a_job(name="a" * 40, nodes=2048)
    name = pod_name(job, 2047, 10**10)
    assert len(name) == 63
    assert LABEL.fullmatch(name)
    assert len(child_name(job)) == 46


def test_another_job_of_the_same_name_has_other_children() -> None:
    one, other = a_job(uid="11111aaa"), a_job(uid="22222aaa")
    assert pod_name(one, 0, 1) != pod_name(other, 0, 1)
    assert child_name(one) != child_name(other)
    assert job_prefix(one) != job_prefix(other)


BAD_PODS = {
    "the host's network": lambda spec: spec.update(hostNetwork=True),
    "a volume of the host": lambda spec: spec["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    "a privileged container": lambda spec: spec["containers"][0].update(securityContext={"privileged": True}),
    "a capability kept": lambda spec: spec["containers"][0].update(securityContext={"allowPrivilegeEscalation": False}),
    "root": lambda spec: spec["securityContext"].update(runAsUser=0),
    "no seccomp profile": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "a capability of root's": lambda spec: spec["containers"][0].update(securityContext={"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]}}),
    "a probe of another host": lambda spec: spec["containers"][0].update(livenessProbe={"httpGet": {"host": "198.18.0.1", "port": 80}}),
    "a hook at another host": lambda spec: spec["containers"][0].update(lifecycle={"preStop": {"tcpSocket": {"host": "198.18.0.1", "port": 80}}}),
    "the host's processes": lambda spec: spec.update(hostPID=True),
    "an unsafe sysctl": lambda spec: spec["securityContext"].update(sysctls=[{"name": "kernel.msgmax", "value": "1"}]),
    "an unmasked /proc": lambda spec: spec["containers"][0]["securityContext"].update(procMount="Unmasked"),
    "a label of SELinux": lambda spec: spec["initContainers"][0]["securityContext"].update(seLinuxOptions={"type": "spc_t"}),
    "root in one container": lambda spec: spec["initContainers"][0]["securityContext"].update(runAsUser=0),
    "a port of the host": lambda spec: spec["containers"][0].update(ports=[{"containerPort": 1, "hostPort": 1}]),
}  # fmt: skip


@pytest.mark.parametrize("spoil", BAD_PODS.values(), ids=BAD_PODS.keys())
def test_the_checker_of_the_standard_finds(spoil) -> None:
    pod = json.loads(json.dumps(render_pod(a_job(), NewPod(0, 1), administrator())))
    spoil(pod["spec"])
    assert violations(pod) != []


# Quantities.

SUMS = {
    ("1Gi", "1Gi"): "2147483648",
    ("1500M", "0"): "1500000000",
    ("0.5Gi", "64Mi"): str(2**29 + 2**26),
    ("4Gi", "1k"): str(2**32 + 1000),
    ("1000m", "1"): "2",
}


@pytest.mark.parametrize(("terms", "total"), SUMS.items(), ids=[f"{a} and {b} are {t}" for (a, b), t in SUMS.items()])
def test_sums_of_memory(terms: tuple[str, str], total: str) -> None:
    assert total_bytes(*terms) == total


@pytest.mark.parametrize("text", ["", "Gi", "1GiB", "1 Gi", "1g", "one"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        quantity_value(text)
