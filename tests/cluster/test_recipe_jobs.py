"""Recipe jobs on the real cluster: from ``kubectl create`` to a model in S3, and what becomes of bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.status import ConditionType
from tests.cluster.cluster import Cluster
from tests.cluster.jobs import submit
from tests.cluster.training_inputs import BUCKET, make_namespace, make_secret, put_data, recipe_spec

CONDITIONS = [kind.value for kind in ConditionType]


def test_a_job_trains_on_two_nodes_and_leaves_a_model_that_loads(
    operator: Cluster, namespace: str, tmp_path: Path
) -> None:
    spec = recipe_spec(operator, steps=150)
    spec["checkpoint"]["interval"]["steps"] = 50
    job = submit(operator, namespace, "sentiment", spec)
    running = job.wait_for_phase("Running")
    assert running["gang"]["ready"] == 2
    pods = {pod["metadata"]["uid"]: pod for pod in job.pods()}
    assert {member["uid"] for member in running["gang"]["members"]} == set(pods)
    assert len({pod["spec"]["nodeName"] for pod in pods.values()}) == 2

    done = job.wait_for_phase("Succeeded")
    assert [condition["type"] for condition in done["conditions"]] == CONDITIONS
    assert {c["type"] for c in done["conditions"] if c["status"] == "True"} == {"Ready", "Complete"}
    assert all(c["reason"] and c["message"] for c in done["conditions"])
    assert (done["progress"]["step"], done["progress"]["totalSteps"], done["progress"]["percent"]) == (150, 150, 100)
    assert done["gang"]["generation"] == 1
    assert "restarts" not in done
    metrics = {metric["name"]: float(metric["value"]) for metric in done["evaluation"]["metrics"]}
    assert metrics["accuracy"] > 0.6, "the sentences are easy"
    assert done["checkpoint"]["step"] == 150

    prefix = done["model"]["uri"]
    uid = operator.get("ftj", "sentiment", namespace)["metadata"]["uid"]
    assert prefix.rstrip("/") == f"s3://{BUCKET}/jobs/{namespace}/sentiment-{uid[:8]}/model"
    folder = _download(operator, prefix, tmp_path)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = model(**tokenizer("the plot was superb and witty", return_tensors="pt")).logits
    assert model.config.id2label[int(logits.argmax())] == "positive"
    assert f"| accuracy | {metrics['accuracy']:.3g}" in (folder / "README.md").read_text()

    columns = operator.kubectl("get", "ftj", "sentiment", "-n", namespace).splitlines()
    assert columns[0].split() == ["NAME", "PHASE", "PROGRESS", "STEP", "LOSS", "NODES", "RESTARTS", "AGE"]
    operator.kubectl(
        *("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod", "-n", namespace, "--timeout=60s"),
        *("-l", "finetune.dev/job=sentiment"),
    )
    for pod in job.pods():
        assert "finetune-agent" in job.logs(pod["metadata"]["name"]), "finished pods stay readable"
        assert "serviceAccountToken" not in json.dumps(pod["spec"]["containers"])
    job.delete()
    assert job.pods() == []
    belongings = ("configmap,networkpolicy", "-n", namespace, "-l", "finetune.dev/job=sentiment")
    operator.kubectl("wait", "--for=delete", *belongings, "--timeout=60s")  # by the garbage collector, after the pods
    assert operator.kubectl("get", *belongings, "-o", "name").strip() == ""


@pytest.mark.parametrize(
    ("name", "body", "told"),
    [
        pytest.param("bad-json", b'{"text": "a", "label": "neutral"}\n' * 16 + b"{oops\n", "line 17", id="bad JSON"),
        pytest.param(
            "no-column",
            b'{"sentence": "a", "label": "neutral"}\n',
            "text",
            id="a missing column",
            marks=pytest.mark.long,
        ),
        pytest.param("strange", b'{"text": "a", "label": "angry"}\n', "angry", id="a label outside the list"),
        pytest.param("empty", b"", "empty", id="an empty file", marks=pytest.mark.long),
        pytest.param(
            "latin",
            '{"text": "é", "label": "neutral"}\n'.encode("latin-1"),
            "UTF-8",
            id="not UTF-8",
            marks=pytest.mark.long,
        ),
    ],
)
def test_broken_data_ends_the_job_without_a_restart(
    operator: Cluster, namespace: str, name: str, body: bytes, told: str
) -> None:
    uri = put_data(operator, f"{name}.jsonl", body)
    job = submit(operator, namespace, name, recipe_spec(operator, nodes=1, train=f"{name}.jsonl"))
    job.wait_for_phase("Failed")
    failed = job.condition("Failed")
    assert failed["reason"] == "BadData"
    assert uri in failed["message"]
    assert told in failed["message"]
    assert "restarts" not in job.status()
    job.delete()


def test_a_pickled_model_is_refused_by_name(operator: Cluster, namespace: str) -> None:
    client = operator.s3.client()
    client.put_object(Bucket=BUCKET, Key="models/pickle/pytorch_model.bin", Body=b"\x80\x04N.")
    config = client.get_object(Bucket=BUCKET, Key="models/bert/config.json")["Body"].read()
    client.put_object(Bucket=BUCKET, Key="models/pickle/config.json", Body=config)
    spec = recipe_spec(operator, nodes=1)
    spec["recipe"]["model"]["source"] = f"s3://{BUCKET}/models/pickle"
    job = submit(operator, namespace, "pickle", spec)
    job.wait_for_phase("Failed")
    failed = job.condition("Failed")
    assert failed["reason"] == "BadConfig"
    assert "pytorch_model.bin" in failed["message"]
    assert "restarts" not in job.status()
    job.delete()


def test_a_missing_secret_is_told_costs_no_restart_and_heals(operator: Cluster, tmp_path: Path) -> None:
    namespace = "no-secret"
    make_namespace(operator, namespace, secret=False)
    job = submit(operator, namespace, "waiting", recipe_spec(operator, nodes=1))
    job.wait("the secret is missed", lambda status: _reason(status, "Stalled") == "SecretMissing")
    assert "s3-credentials" in job.condition("Stalled")["message"]
    make_secret(operator, namespace)
    done = job.wait_for_phase("Succeeded")
    assert "restarts" not in done
    assert done["gang"]["generation"] == 1
    job.delete()


def test_what_only_the_operator_sees_stalls_without_a_pod_and_heals(operator: Cluster, namespace: str) -> None:
    spec = recipe_spec(operator, nodes=1)
    spec["workers"]["profile"] = "huge"
    job = submit(operator, namespace, "profile", spec)
    job.wait("the profile is unknown", lambda status: _reason(status, "Stalled") == "UnknownProfile")
    assert job.pods() == []
    job.patch({"workers": {"profile": "default"}})
    job.wait_for_phase("Succeeded")
    job.delete()

    spec = recipe_spec(operator, nodes=1)
    spec["storage"]["endpoint"] = "http://198.18.0.1:1"
    job = submit(operator, namespace, "endpoint", spec)
    job.wait("the endpoint is refused", lambda status: _reason(status, "Stalled") == "EndpointNotAllowed")
    assert operator.s3.endpoint in job.condition("Stalled")["message"]
    assert job.pods() == []
    job.delete()


def _reason(status: dict[str, Any], kind: str) -> str:
    return next((c["reason"] for c in status.get("conditions", []) if c["type"] == kind and c["status"] == "True"), "")


def _download(cluster: Cluster, prefix: str, folder: Path) -> Path:
    client = cluster.s3.client()
    bucket, key = prefix.removeprefix("s3://").split("/", 1)
    for item in client.list_objects_v2(Bucket=bucket, Prefix=key)["Contents"]:
        client.download_file(bucket, item["Key"], str(folder / Path(item["Key"]).name))
    return folder
