"""What the charts render, against what the operator and the jobs rely on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.contract import JOB_SERVER_PORT, LEADER_LABEL
from finetune_api.crd import build_crd, crd_yaml
from finetune_operator.access import NEEDED, NEEDED_AT_HOME
from finetune_operator.render.network import OPERATOR_SELECTOR
from finetune_operator.settings import CONFIG_FILE, Profile, Settings
from tests.chart.helm import CRDS, NAMESPACE, OPERATOR, RELEASE, ci_values, example, find, helm, render
from tests.operator.restricted import violations

Rights = set[tuple[str, str, str]]


@pytest.mark.parametrize(("chart", "values"), ci_values(), ids=lambda path: path.stem)
def test_helm_finds_nothing_to_say(chart: Path, values: Path) -> None:
    ran = helm("lint", "--strict", chart, "--values", values)
    assert ran.code == 0, ran.output


@pytest.mark.parametrize(("chart", "values"), ci_values(), ids=lambda path: path.stem)
def test_every_object_is_whole_and_named_once(chart: Path, values: Path) -> None:
    documents = render(chart, "--values", values)
    identities = [
        (item["apiVersion"], item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"])
        for item in documents
    ]
    assert documents
    assert len(set(identities)) == len(identities)


# The CRD


def test_the_crd_is_the_generated_one_and_is_kept() -> None:
    (crd,) = render(CRDS)
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd == build_crd()


def test_the_crd_goes_with_the_release_when_told_so() -> None:
    assert render(CRDS, "--set", "keep=false") == [build_crd()]


def test_both_charts_carry_the_generated_crd() -> None:
    for chart in (CRDS, OPERATOR):
        assert (chart / "files/finetunejobs.finetune.dev.yaml").read_text() == crd_yaml()


def test_the_operator_chart_brings_the_crd_when_told_so() -> None:
    documents = render(OPERATOR, "--values", example("minimal"), "--set", "crds.enabled=true")
    crd = find(documents, "CustomResourceDefinition", "finetunejobs.finetune.dev")
    assert crd["spec"] == build_crd()["spec"]
    assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


# The configuration


@pytest.mark.parametrize("values", OPERATOR.glob("ci/*-values.yaml"), ids=lambda path: path.stem)
def test_the_operator_reads_its_configuration(values: Path) -> None:
    """Whatever is called alike in values and settings is the same."""
    told = yaml.safe_load((OPERATOR / "values.yaml").read_text()) | yaml.safe_load(values.read_text())
    alike = told.keys() & {field.alias for field in Settings.model_fields.values()}
    assert {"watchNamespaces", "profiles", "allowedEndpoints", "storageCidrs", "dnsCidrs", "leaderElection"} <= alike
    assert _settings(render(OPERATOR, "--values", values)) == Settings.model_validate(
        {
            "namespace": NAMESPACE,
            "service": RELEASE,
            "operatorImage": told["image"]["reference"],
            "operatorImagePullPolicy": told["image"].get("pullPolicy") or None,
            **{name: told[name] for name in alike},
        }
    )


def test_the_configuration_is_mounted_where_it_is_read() -> None:
    documents = render(OPERATOR, "--values", example("minimal"))
    spec = find(documents, "Deployment", RELEASE)["spec"]["template"]["spec"]
    (mount,) = (mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "config")
    assert str(Path(CONFIG_FILE).parent) == mount["mountPath"]
    assert Path(CONFIG_FILE).name in find(documents, "ConfigMap", RELEASE)["data"]


@pytest.mark.parametrize(
    ("change", "rolls"),
    [
        ("workers=9", True),
        ("leaderElection.leaseSeconds=20", True),
        ("replicas=3", False),
        ("allowedEndpoints={http://store:9000}", True),
        ("profiles.default.sharedMemory=2Gi", True),
        ("aggregateRoles=false", False),
    ],
)
def test_a_change_of_configuration_rolls_the_pod(change: str, rolls: bool) -> None:
    before, after = (
        find(render(OPERATOR, "--values", example("minimal"), *more), "Deployment", RELEASE)["spec"]["template"]
        for more in ((), ("--set", change))
    )
    assert (before != after) == rolls


# What jobs rely on


def test_training_pods_reach_the_job_server() -> None:
    documents = render(OPERATOR, "--values", example("minimal"))
    settings = _settings(documents)
    service = find(documents, "Service", settings.service)
    pod = find(documents, "Deployment", RELEASE)["spec"]["template"]
    (port,) = service["spec"]["ports"]
    ports = {entry["name"]: entry["containerPort"] for entry in pod["spec"]["containers"][0]["ports"]}
    assert service["metadata"]["namespace"] == settings.namespace
    assert port["port"] == ports[port["targetPort"]] == settings.job_server_port == JOB_SERVER_PORT
    assert service["spec"]["selector"].items() == (pod_labels(pod) | {LEADER_LABEL: "true"}).items()
    assert OPERATOR_SELECTOR.items() <= pod["metadata"]["labels"].items()
    assert ports["health"] == settings.health_port
    assert ports["metrics"] == settings.metrics_port


def pod_labels(pod: dict[str, Any]) -> dict[str, str]:
    """The labels by which the pods of a release are known for good."""
    labels = pod["metadata"]["labels"]
    return {name: labels[name] for name in ("app.kubernetes.io/name", "app.kubernetes.io/instance")}


@pytest.mark.parametrize("values", OPERATOR.glob("ci/*-values.yaml"), ids=lambda path: path.stem)
def test_the_operators_own_pods_pass_the_restricted_standard(values: Path) -> None:
    documents = render(OPERATOR, "--values", values)
    assert violations(find(documents, "Deployment", RELEASE)["spec"]["template"]) == []


# Replicas


# What linters of manifests ask of a workload, by their names for it.
ASKED_BY_LINTERS: dict[str, Callable[[dict[str, Any], dict[str, Any]], bool]] = {
    "no-liveness-probe, no-readiness-probe": lambda _, c: (
        {"livenessProbe", "readinessProbe", "startupProbe"} <= c.keys()
    ),
    "unset-cpu-requirements": lambda _, c: "cpu" in c["resources"]["requests"],
    "unset-memory-requirements": lambda _, c: (
        "memory" in c["resources"]["requests"] and "memory" in c["resources"]["limits"]
    ),
    "no-read-only-root-fs": lambda _, c: c["securityContext"]["readOnlyRootFilesystem"] is True,
    "drop-capabilities": lambda _, c: c["securityContext"]["capabilities"] == {"drop": ["ALL"]},
    "privilege-escalation-container": lambda _, c: c["securityContext"]["allowPrivilegeEscalation"] is False,
    "latest-tag": lambda _, c: re.search(r"(@sha256:[0-9a-f]{64}|:(?!latest$)[\w.-]+)$", c["image"]) is not None,
    "env-var-secret": lambda _, c: not any("secretKeyRef" in e.get("valueFrom", {}) for e in c.get("env", ())),
    "run-as-non-root": lambda pod, _: pod["securityContext"]["runAsNonRoot"] is True,
    "default-service-account": lambda pod, _: pod["serviceAccountName"] not in ("", "default"),
    "host-network, host-pid, host-ipc": lambda pod, _: not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(),
    "hostPath": lambda pod, _: not any("hostPath" in volume for volume in pod["volumes"]),
    "dangling-ports": lambda _, c: all(port.get("name") for port in c["ports"]),
}


@pytest.mark.parametrize("values", OPERATOR.glob("ci/*-values.yaml"), ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", ASKED_BY_LINTERS)
def test_linters_of_manifests_find_nothing(values: Path, rule: str) -> None:
    pod = find(render(OPERATOR, "--values", values), "Deployment", RELEASE)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert ASKED_BY_LINTERS[rule](pod, container), container


def test_a_replica_is_ready_before_another_goes_and_knows_who_it_is() -> None:
    deployment = find(render(OPERATOR, "--values", example("minimal")), "Deployment", RELEASE)["spec"]
    assert deployment["replicas"] == 2
    assert deployment["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    environment = {
        entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"]
        for entry in deployment["template"]["spec"]["containers"][0]["env"]
    }
    assert environment == {"POD_NAME": "metadata.name", "POD_UID": "metadata.uid"}
    assert LEADER_LABEL not in deployment["template"]["metadata"]["labels"], "a new pod does not lead yet"


def test_replicas_keep_apart_where_they_can() -> None:
    deployment = find(render(OPERATOR, "--values", example("minimal")), "Deployment", RELEASE)["spec"]
    constraints = deployment["template"]["spec"]["topologySpreadConstraints"]
    assert [entry["topologyKey"] for entry in constraints] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert {entry["whenUnsatisfiable"] for entry in constraints} == {"ScheduleAnyway"}, "one node is enough for two"
    assert all(entry["labelSelector"] == deployment["selector"] for entry in constraints)


@pytest.mark.parametrize(("replicas", "budgets"), [(1, 0), (2, 1), (3, 1)])
def test_a_drain_takes_one_replica_at_a_time_and_is_never_stuck(replicas: int, budgets: int) -> None:
    documents = render(OPERATOR, "--values", example("minimal"), "--set", f"replicas={replicas}")
    found = [item for item in documents if item["kind"] == "PodDisruptionBudget"]
    assert len(found) == budgets
    for budget in found:
        assert budget["spec"]["maxUnavailable"] == 1
        assert budget["spec"]["selector"] == find(documents, "Deployment", RELEASE)["spec"]["selector"]


def test_two_releases_share_no_object() -> None:
    first, second = (
        {
            (item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"])
            for item in yaml.safe_load_all(
                helm(
                    *("template", "finetune-operator", OPERATOR, "--namespace", namespace),
                    *("--values", example("minimal"), "--kube-version", "1.34.4"),
                ).output
            )
            if item
        }
        for namespace in ("blue", "green")
    )
    assert not first & second


# Rights


def test_the_rights_are_those_that_the_operator_asks_for() -> None:
    documents = render(OPERATOR, "--values", example("minimal"))
    assert _rights(find(documents, "ClusterRole", f"{NAMESPACE}-{RELEASE}")["rules"]) == _needed()


def test_in_namespaces_of_its_own_the_operator_has_no_right_elsewhere() -> None:
    documents = render(OPERATOR, "--values", example("namespaced"))
    for namespace in ("team-a", "team-b"):
        (role,) = (item for item in documents if item["kind"] == "Role" and item["metadata"]["namespace"] == namespace)
        assert _rights(role["rules"]) == _needed()
    assert {item["kind"] for item in documents if "namespace" not in item["metadata"]} == {"CustomResourceDefinition"}


def test_outside_of_namespaces_the_operator_may_ask_about_itself_and_read_public_keys() -> None:
    documents = render(OPERATOR, "--values", example("minimal"), "--set", "watchNamespaces={team-a}")
    basic = find(documents, "ClusterRole", f"{NAMESPACE}-{RELEASE}-basic")["rules"]
    assert [rule.get("resources") or rule["nonResourceURLs"] for rule in basic] == [
        ["selfsubjectaccessreviews"],
        ["/.well-known/openid-configuration", "/openid/v1/jwks"],
    ]
    bound = [item["roleRef"]["name"] for item in documents if item["kind"] == "ClusterRoleBinding"]
    assert bound == [f"{NAMESPACE}-{RELEASE}-basic"]


def test_the_only_secret_is_its_own() -> None:
    documents = render(OPERATOR, "--values", example("minimal"))
    roles = [item for item in documents if item["kind"] in ("Role", "ClusterRole")]
    on_secrets = [
        (role["metadata"].get("namespace"), rule["verbs"], rule.get("resourceNames"))
        for role in roles
        for rule in role["rules"]
        if "secrets" in rule.get("resources", ())
    ]
    assert on_secrets == [
        (NAMESPACE, ["get", "update"], [f"{_settings(documents).service}-job-server"]),
        (NAMESPACE, ["create"], None),
    ]


@pytest.mark.parametrize("name", ["minimal", "namespaced"])
def test_at_home_the_operator_may_do_what_it_asks_for_and_no_more(name: str) -> None:
    documents = render(OPERATOR, "--values", example(name))
    (role,) = (item for item in documents if item["kind"] == "Role" and item["metadata"]["namespace"] == NAMESPACE)
    allowed = {
        (group, resource, verb, named)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for named in rule.get("resourceNames", [None])
    }
    service = _settings(documents).service
    assert allowed == {
        (resource.group_version.rpartition("/")[0], resource.plural, verb, None if suffix is None else service + suffix)
        for resource, suffix, verbs in NEEDED_AT_HOME
        for verb in verbs
    }


def test_nobody_gets_everything() -> None:
    for item in render(OPERATOR, "--values", example("everything")):
        if item["kind"] in ("Role", "ClusterRole"):
            assert "*" not in json.dumps(item["rules"])


# Values


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("imagee.reference=a", ("imagee", "not allowed")),
        ("image.tag=1", ("/image", "'tag'", "not allowed")),
        ("image.pullPolicy=Sometimes", ("/image/pullPolicy", "IfNotPresent")),
        ("image.reference=a b", ("/image/reference",)),
        ("profiles.default.gpus=8", ("/profiles/default", "'gpus'", "not allowed")),
        ("profiles.default.restricted=true", ("/profiles/default/restricted",)),
        ("profiles.Big.image=a", ("/profiles", "'Big'", "not allowed")),
        ("profiles.h100.nodeSelector.pool=h100", ("/profiles/h100", "missing property 'image'")),
        ("profiles.default.sharedMemory=1GB", ("/profiles/default/sharedMemory",)),
        ("allowedEndpoints={store:9000}", ("/allowedEndpoints/0",)),
        ("allowedEndpoints={http://store/path}", ("/allowedEndpoints/0",)),
        ("profiles.default.resources.memory=1Gi", ("/profiles/default/resources/memory",)),
        ("profiles.default.resources.rdma/hca=2", ("/profiles/default/resources", "string")),
        ("profiles.default.hostNetwork=true", ("/profiles/default", "'hostNetwork'", "not allowed")),
        ("profiles.default.tolerations[0].effects=NoSchedule", ("/tolerations/0", "'effects'", "not allowed")),
        ("profiles.default.allowedEndpoints={store}", ("/profiles/default/allowedEndpoints/0",)),
        ("dnsCidrs={169.254.20.10}", ("/dnsCidrs/0",)),
        ("networkPolicy.apiServerPorts={http}", ("/networkPolicy/apiServerPorts/0",)),
        ("networkPolicy.apiServerPorts=", ("/networkPolicy/apiServerPorts",)),
        ("affinity.podAfinity.a=1", ("/affinity", "'podAfinity'", "not allowed")),
        ("storageCidrs={10.0.0.0}", ("/storageCidrs/0",)),
        ("storageCidrs={}", ("/storageCidrs",)),
        ("watchNamespaces={Team}", ("/watchNamespaces/0",)),
        ("workers=0", ("/workers", "minimum")),
        ("progressSeconds=-1", ("/progressSeconds", "minimum")),
        ("silentSeconds=5", ("/silentSeconds", "minimum")),
        ("crds.keep=maybe", ("/crds/keep", "boolean")),
        ("resources.claims=1", ("/resources", "'claims'", "not allowed")),
        ("replicas=0", ("/replicas", "minimum")),
        ("leaderElection.leaseSeconds=1.5", ("/leaderElection/leaseSeconds", "integer")),
        ("metrics.serviceMonitor.interval=often", ("/metrics/serviceMonitor/interval",)),
        ("metrics.enabled=true", ("/metrics", "'enabled'", "not allowed")),
        ("logging.format=XML", ("/logging/format",)),
        ("logging.level=TRACE", ("/logging/level",)),
        ("leaderElection.enabled=false", ("/leaderElection", "'enabled'", "not allowed")),
        ("image.reference=", ("image.reference is not set", "registry.example.com/finetune-operator:0.1.0")),
        ("profiles.default.image=", ("profiles.default.image is not set", "trainer image")),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(values: str, says: Iterable[str]) -> None:
    ran = helm(
        "template", RELEASE, OPERATOR, "--kube-version", "1.34.4", "--values", example("minimal"), "--set", values
    )
    assert ran.code != 0
    for words in says:
        assert words in ran.output


def test_every_value_has_a_default_and_a_place_in_the_schema() -> None:
    for chart in (CRDS, OPERATOR):
        values = yaml.safe_load((chart / "values.yaml").read_text())
        schema = json.loads((chart / "values.schema.json").read_text())
        assert set(schema["properties"]) - {"global"} == set(values)


# What Kubernetes or Helm define, and what whole labels are in.
OPEN = {"global", "nodeAffinity", "podAffinity", "podAntiAffinity", "namespaceSelector", "podSelector", "ipBlock"}


@pytest.mark.parametrize("chart", [CRDS, OPERATOR], ids=lambda chart: chart.name)
def test_no_object_of_values_takes_what_it_does_not_know(chart: Path) -> None:
    def visit(schema: Any, name: str) -> None:
        if not isinstance(schema, dict):
            return
        if schema.get("type") == "object" and name not in OPEN:
            assert "additionalProperties" in schema, name
            assert not schema.get("properties") or schema["additionalProperties"] is False, name
        for part in ("properties", "patternProperties", "$defs"):
            for inner, child in schema.get(part, {}).items():
                visit(child, inner)
        for part in ("items", "additionalProperties"):
            visit(schema.get(part), f"{name}.{part}")

    visit(json.loads((chart / "values.schema.json").read_text()), chart.name)


def test_nothing_is_fetched_from_elsewhere_and_nothing_runs_beside_the_release() -> None:
    """No hook, no job, no subchart, and no image but those that are named in values."""
    for values in OPERATOR.glob("ci/*-values.yaml"):
        documents = render(OPERATOR, "--values", values)
        text = json.dumps(documents)
        assert "helm.sh/hook" not in text
        assert not {"Job", "CronJob", "Pod", "Secret"} & {item["kind"] for item in documents}
        told = yaml.safe_load(values.read_text())
        pods = [item["spec"]["template"]["spec"] for item in documents if item["kind"] == "Deployment"]
        images = {container["image"] for pod in pods for container in pod["containers"] + pod.get("initContainers", [])}
        assert images == {told["image"]["reference"]}
    assert "dependencies" not in yaml.safe_load((OPERATOR / "Chart.yaml").read_text())


def test_a_profile_may_be_all_that_the_operator_understands() -> None:
    schema = json.loads((OPERATOR / "values.schema.json").read_text())["$defs"]["profile"]
    assert set(schema["properties"]) == {field.alias for field in Profile.model_fields.values()}


def _settings(documents: list[dict[str, Any]]) -> Settings:
    config = find(documents, "ConfigMap", RELEASE)["data"]["config.yaml"]
    return Settings.model_validate(yaml.safe_load(config))


def _needed() -> Rights:
    return {
        (resource.group_version.rpartition("/")[0], f"{resource.plural}/{sub}".rstrip("/"), verb)
        for resource, sub, verbs in NEEDED
        for verb in verbs
    }


def _rights(rules: list[dict[str, Any]]) -> Rights:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
