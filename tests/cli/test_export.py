"""An export of the last checkpoint is the job's own result, bit for bit; any other one is a model as well."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.cli.command import finetune
from tests.cli.jobs import cases
from tests.storage.seaweedfs import S3Server
from tests.trainer.launch import Case

NAMES = list(cases(Path("/files"), "s3://models"))
MOUNTED = "lora-tied-bf16-zero-2-mounted"


def options(name: str, files: Path) -> tuple[str, ...]:
    return ("--model", str(files / "llama-tied")) if name == MOUNTED else ()


def own_result(server: S3Server, name: str, folder: Path) -> Path:
    client = server.client()
    folder.mkdir()
    for entry in client.list_objects_v2(Bucket="jobs", Prefix=f"{name}/model/")["Contents"]:
        file = folder / entry["Key"].rpartition("/")[2]
        file.write_bytes(client.get_object(Bucket="jobs", Key=entry["Key"])["Body"].read())
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_last_checkpoint_is_the_jobs_own_result(
    name: str, server: S3Server, jobs: dict[str, Case], files: Path, tmp_path: Path
) -> None:
    expected = own_result(server, name, tmp_path / "own")
    ran = finetune(server, "export", f"s3://jobs/{name}", str(tmp_path / "exported"), *options(name, files))
    assert (ran.code, ran.stderr) == (0, "")
    exported = tmp_path / "exported"
    assert {path.name for path in exported.iterdir()} == {path.name for path in expected.iterdir()}
    weights, own = (load_file(folder / "model.safetensors") for folder in (exported, expected))
    assert weights.keys() == own.keys()
    for key, value in own.items():
        assert weights[key].dtype == value.dtype
        assert torch.equal(weights[key].view(torch.uint8), value.view(torch.uint8)), key
    for path in expected.iterdir():
        if path.name not in {"README.md", "model.safetensors"}:
            assert (exported / path.name).read_text() == path.read_text(), path.name


@torch.no_grad()
@pytest.mark.parametrize("name", ["full-bf16-zero-2", "lora-bf16-zero-3-drawn-pooler", "full-tied-bf16-zero-3"])
def test_any_step_is_a_model_of_its_own(name: str, server: S3Server, jobs: dict[str, Case], tmp_path: Path) -> None:
    auto = AutoModelForCausalLM if "tied" in name else AutoModelForSequenceClassification
    answers = []
    for step in (4, 8):
        folder = tmp_path / str(step)
        ran = finetune(server, "export", f"s3://jobs/{name}@{step}", str(folder), "-o", "json")
        assert ran.json["step"] == step
        assert sorted(path.name for path in folder.iterdir()) == ran.json["files"]
        tokenizer, (model, told) = (
            AutoTokenizer.from_pretrained(folder),
            auto.from_pretrained(folder, output_loading_info=True),
        )
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        inputs = tokenizer("the film was good", return_tensors="pt", return_token_type_ids=False)
        answers.append(model.eval()(**inputs).logits)
    assert not torch.equal(*answers)


def test_the_model_card_tells_the_step_and_that_scores_are_unknown(
    server: S3Server, jobs: dict[str, Case], tmp_path: Path
) -> None:
    finetune(server, "export", "s3://jobs/full-bf16-zero-2@8", str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    for line in (
        'base_model: "s3://models/bert"',
        "| Steps | 8 of 12, 12 sequences each |",
        "Unknown: this model was exported from a checkpoint, which holds no scores.",
        "uid `0b2a1f6e-0000-4000-8000-000000000000`, generation 1 |",
    ):
        assert line in card


def test_weights_are_split_into_files_of_the_wanted_size(
    server: S3Server, jobs: dict[str, Case], tmp_path: Path
) -> None:
    for folder, more in (("whole", ()), ("split", ("--max-file-size", "20KB"))):
        assert finetune(server, "export", "s3://jobs/lora-bf16-zero-2", str(tmp_path / folder), *more).code == 0
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"] == {
        "total_parameters": sum(value.numel() for value in whole.values()),
        "total_size": sum(value.nbytes for value in whole.values()),
    }
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "split" / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), whole[name])
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "split")


def change_source(server: S3Server, files: Path) -> None:
    server.client().put_object(Bucket="models", Key="bert/model.safetensors", Body=b"another model")


def restore_source(server: S3Server, files: Path) -> None:
    body = (files / "bert" / "model.safetensors").read_bytes()
    server.client().put_object(Bucket="models", Key="bert/model.safetensors", Body=body)


def test_a_source_that_has_changed_is_refused_and_a_copy_will_do(
    server: S3Server, jobs: dict[str, Case], files: Path, tmp_path: Path
) -> None:
    change_source(server, files)
    try:
        refused = finetune(server, "export", "s3://jobs/lora-bf16-zero-2", str(tmp_path / "refused"))
        copied = finetune(
            server, "export", "s3://jobs/lora-bf16-zero-2", str(tmp_path / "copied"), "--model", str(files / "bert")
        )
    finally:
        restore_source(server, files)
    assert refused.code == 1
    assert refused.stderr.startswith("error: s3://models/bert/model.safetensors has ETag ")
    assert refused.stderr.endswith("restore it, or give a copy of the model as it was with --model FOLDER\n")
    assert list(tmp_path.glob("*refused*")) == []
    assert copied.code == 0, copied.stderr


REFUSED = {
    "a mounted source needs a copy": (
        (f"s3://jobs/{MOUNTED}", "{new}"),
        "the result contains frozen weights of file://{files}/llama-tied, which is not in S3: give a copy with --model FOLDER",
    ),
    "a copy of another model": (
        (f"s3://jobs/{MOUNTED}", "{new}", "--model", "{files}/bert"),
        "{files}/bert/model.safetensors has ",
    ),
    "a copy that is none": (
        (f"s3://jobs/{MOUNTED}", "{new}", "--model", "{new}"),
        "{new}/model.safetensors is missing: --model needs a copy of file://{files}/llama-tied",
    ),
    "a folder in use": (("s3://jobs/full-bf16-zero-2", "{files}"), "{files} is in use: give a new folder"),
    "a step that is not kept": (
        ("s3://jobs/full-bf16-zero-2@5", "{new}"),
        "s3://jobs/full-bf16-zero-2/HEAD lists no checkpoint of step 5: it lists 12, 8, 4",
    ),
    "files of no size": (
        ("s3://jobs/full-bf16-zero-2", "{new}", "--max-file-size", "0GB"),
        "--max-file-size '0GB': write a number and a unit: 500MB, 5GB",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(
    arguments: tuple[str, ...], message: str, server: S3Server, jobs: dict[str, Case], files: Path, tmp_path: Path
) -> None:
    names = {"new": tmp_path / "new", "files": files}
    ran = finetune(server, "export", *(argument.format(**names) for argument in arguments))
    assert ran.stderr.startswith("error: " + message.format(**names))
    assert ran.stderr.count("\n") == 1
    assert ran.code in {1, 2}
    assert list(tmp_path.iterdir()) == [], "nothing half-written stays"
