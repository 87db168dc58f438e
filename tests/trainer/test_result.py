"""The result is a plain Hugging Face directory that scores outside what was told inside."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.trainer.launch import Case, Launcher
from tests.trainer.sentences import LABELS, rated_sentences

CLASSIFIER_FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def download(launcher: Launcher, prefix: str, folder: Path) -> Path:
    client, bucket = launcher.server.client(), launcher.bucket.removeprefix("s3://")
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/model/")["Contents"]:
        name = entry["Key"].removeprefix(f"{prefix}/model/")
        (folder / name).write_bytes(client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read())
    return folder


@torch.no_grad()
def classify(folder: Path, texts: list[str]) -> list[str]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    logits = model.eval()(**tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")).logits
    return [model.config.id2label[int(index)] for index in logits.argmax(dim=-1)]


@pytest.mark.parametrize(
    "name", ["2/zero-2", "2/zero-3", "2/lora-zero-3", "1/lora", "1/bf16", "2/interrupted-3-is-finished"]
)
def test_a_classifier_scores_what_was_told(
    name: str, launcher: Launcher, tmp_path: Path, one_rank: dict[str, Case], two_ranks: dict[str, Case]
) -> None:
    ranks, case_name = name.split("/")
    case = (one_rank if ranks == "1" else two_ranks)[case_name]
    folder = download(launcher, case.prefix or name, tmp_path)
    assert {path.name for path in folder.iterdir()} == CLASSIFIER_FILES
    rows = rated_sentences(41, seed=2)
    expected, predicted = [row["label"] for row in rows], classify(folder, [row["text"] for row in rows])
    assert case.beats.metrics["accuracy"] == pytest.approx(accuracy_score(expected, predicted))
    assert case.beats.metrics["macroF1"] == pytest.approx(
        f1_score(expected, predicted, average="macro", zero_division=0)
    )


def test_the_task_learnt_is_learnable(one_rank: dict[str, Case]) -> None:
    assert one_rank["long"].beats.metrics["accuracy"] > 0.9


def test_every_stage_hands_over_the_same_weights(
    launcher: Launcher, tmp_path: Path, two_ranks: dict[str, Case]
) -> None:
    weights: list[dict[str, Any]] = []
    for name in ("zero-0", "zero-3"):
        (tmp_path / name).mkdir()
        weights.append(load_file(download(launcher, f"2/{name}", tmp_path / name) / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], atol=1e-3, rtol=0)


def test_a_language_model_writes_text(launcher: Launcher, tmp_path: Path, one_rank: dict[str, Case]) -> None:
    folder = download(launcher, "1/pretraining", tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    written = model.generate(**tokenizer("w5 w6", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4)
    assert written.shape == (1, 6)
    assert model.config.use_cache is True


def test_the_configuration_names_the_classes(launcher: Launcher, tmp_path: Path, two_ranks: dict[str, Case]) -> None:
    config = AutoModelForSequenceClassification.from_pretrained(download(launcher, "2/zero-2", tmp_path)).config
    assert config.id2label == dict(enumerate(LABELS))
    assert config.label2id == {label: index for index, label in enumerate(LABELS)}


def test_the_model_card_tells_scores_and_origin(
    launcher: Launcher, tmp_path: Path, two_ranks: dict[str, Case], files: Path
) -> None:
    card = (download(launcher, "interrupted", tmp_path) / "README.md").read_text()
    for line in (
        f'base_model: "file://{files}/bert"',
        "pipeline_tag: text-classification",
        "Trained by FineTuneJob `team-a/interrupted-3-is-finished` (Full, FP32 weights).",
        "| Steps | 12 of 12, 12 sequences each |",
        "uid `0b2a1f6e-0000-4000-8000-000000000000`, generation 3 |",
    ):
        assert line in card
    assert f"| accuracy | {two_ranks['interrupted-3-is-finished'].beats.metrics['accuracy']:.6g} |" in card
    size = (files / "train.jsonl").stat().st_size
    assert f"| Training data | `file://{files}/train.jsonl`, version `{size}-" in card
