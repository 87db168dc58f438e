"""What a job writes before its first step, by which its checkpoints become models: once, and of nothing but what it needs."""

import json
from typing import Any

import pytest

from finetune_trainer import export_plan
from finetune_trainer.checkpoint.head import Unreadable
from tests.storage.seaweedfs import S3Server
from tests.trainer.launch import Case


def plan_of(server: S3Server, name: str) -> Any:
    return json.loads(server.client().get_object(Bucket="jobs", Key=f"{name}/export/plan.json")["Body"].read())


def origins(plan: Any) -> dict[str, Any]:
    return {weight["name"]: weight["from"] for weight in plan["weights"]}


def test_of_a_full_tuning_every_weight_is_trained(server: S3Server, jobs: dict[str, Case]) -> None:
    plan = plan_of(server, "full-fp32-zero-3")
    assert {name: list(origin) for name, origin in origins(plan).items()} == {
        name: ["trained"] for name in origins(plan)
    }
    assert plan["constants"] is None
    assert {
        "name": "classifier.weight",
        "dtype": "F32",
        "shape": [3, 32],
        "from": {"trained": "classifier.weight"},
    } in plan["weights"]


@pytest.mark.parametrize("name", ["lora-bf16-zero-2", "lora-fp32-zero-3"])
def test_frozen_weights_are_found_in_the_source_under_its_own_names(
    name: str, server: S3Server, jobs: dict[str, Case]
) -> None:
    found = origins(plan_of(server, name))
    assert found["bert.embeddings.word_embeddings.weight"] == {
        "frozen": {"file": "model.safetensors", "tensor": "embeddings.word_embeddings.weight"}
    }
    assert plan_of(server, name)["constants"] is None
    query = found["bert.encoder.layer.0.attention.self.query.weight"]["adapted"]
    prefix = "base_model.model.bert.encoder.layer.0.attention.self.query"
    dtype = "BF16" if "bf16" in name else "F32"
    assert query == {
        "base": {"frozen": {"file": "model.safetensors", "tensor": "encoder.layer.0.attention.self.query.weight"}},
        "a": {"parameter": f"{prefix}.lora_A.default.weight", "dtype": dtype},
        "b": {"parameter": f"{prefix}.lora_B.default.weight", "dtype": dtype},
        "rank": 4,
        "scaling": 2.0,
        "transposed": False,
    }
    assert found["classifier.weight"] == {"trained": "base_model.model.classifier.modules_to_save.default.weight"}


def test_what_the_source_lacks_is_written_beside_the_plan(server: S3Server, jobs: dict[str, Case]) -> None:
    plan = plan_of(server, "lora-bf16-zero-3-drawn-pooler")
    found = origins(plan)
    assert found["bert.pooler.dense.weight"]["adapted"]["base"] == {"constant": "bert.pooler.dense.weight"}
    constants = {name for name, origin in found.items() if "constant" in origin}
    assert constants == {"bert.pooler.dense.bias"}


def test_weights_stored_the_other_way_round_are_marked(server: S3Server, jobs: dict[str, Case]) -> None:
    plan = plan_of(server, "lora-conv1d-fp32-zero-2")
    found = origins(plan)["transformer.h.0.attn.c_attn.weight"]["adapted"]
    assert found["transposed"] is True
    assert found["base"]["frozen"]["file"].startswith("model-0000")
    assert plan["tied"] == [["lm_head.weight", "transformer.wte.weight"]]


def test_files_lie_under_their_hash(server: S3Server, jobs: dict[str, Case]) -> None:
    plan = plan_of(server, "full-bf16-zero-2")
    entries = server.client().list_objects_v2(Bucket="jobs", Prefix="full-bf16-zero-2/export/")["Contents"]
    assert {entry["Key"].removeprefix("full-bf16-zero-2/export/") for entry in entries} == {
        "plan.json",
        *(f"{file['sha256']}/{file['name']}" for file in plan["files"]),
    }
    assert {file["name"] for file in plan["files"]} == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_plan_says_the_same_after_a_round_trip(server: S3Server, jobs: dict[str, Case]) -> None:
    for name in jobs:
        body = json.dumps(plan_of(server, name), separators=(",", ":")).encode()
        assert export_plan.encode(export_plan.decode(body)) == body


@pytest.mark.parametrize("name", ["", "..", "a/b", "../../.bashrc", "a\\b"])
def test_a_file_that_would_leave_its_folder_is_refused(name: str, server: S3Server, jobs: dict[str, Case]) -> None:
    plan = plan_of(server, "full-bf16-zero-2")
    plan["files"][0]["name"] = name
    with pytest.raises(Unreadable, match="is no file name"):
        export_plan.decode(json.dumps(plan).encode())
