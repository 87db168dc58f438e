"""From a user's file to examples: pinned, fetched once, encoded once, with labels and lengths that are right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, Gemma3Config, GenerationConfig

from finetune_api.recipe import Columns, Recipe
from finetune_trainer.data.encoded import Encoded, Example, open_encoded
from finetune_trainer.data.encoding import encode_data
from finetune_trainer.errors import BadConfig, BadData, NoPermission
from finetune_trainer.export import save_model, skeleton
from finetune_trainer.feed import Feed
from finetune_trainer.model_files import GENERATION
from finetune_trainer.models import load_config, load_tokenizer
from finetune_trainer.object_store import MemoryObjectStore
from finetune_trainer.preparation import Sources
from finetune_trainer.ranks import _pick_device
from finetune_trainer.scratch import UNFINISHED, discard_unfinished, unfinished
from finetune_trainer.sources import Pinned, PinnedFile, fetch, pin_data
from finetune_trainer.tasks import Task, task_of
from finetune_trainer.tasks.task import IGNORED
from tests.trainer.recipes import classification, language_modelling
from tests.trainer.tiny_models import WORDS, llama_config, save_llama

DATA = "s3://datasets/d.jsonl"


def encode(rows: bytes, task: Task, tokenizer: Any, scratch: Path) -> Encoded:
    store = MemoryObjectStore()
    store.put(DATA, rows)
    data = pin_data(DATA, store, scratch)
    folder = encode_data(
        data=data,
        model=Pinned("s3://models/m", (PinnedFile("config.json", "s3://models/m/config.json", "1", 1),)),
        folder=fetch(data, store, scratch),
        columns=Columns(),
        task=task,
        tokenizer=tokenizer,
        scratch=scratch,
        alive=lambda: None,
    )
    return open_encoded(folder)


@pytest.fixture
def classify(files: Path, tmp_path: Path) -> Callable[[bytes], Encoded]:
    task = task_of(Recipe.model_validate(classification(files, data={"maxTokens": 8})))
    return lambda rows: encode(rows, task, AutoTokenizer.from_pretrained(files / "bert"), tmp_path)


@pytest.fixture
def model_language(files: Path, tmp_path: Path) -> Callable[[bytes], Encoded]:
    task = task_of(Recipe.model_validate(language_modelling(files, data={"maxTokens": 8})))
    return lambda rows: encode(rows, task, AutoTokenizer.from_pretrained(files / "llama"), tmp_path)


def words(example: Example) -> str:
    return " ".join(WORDS[token] for token in example.tokens)


def test_texts_get_special_tokens_and_are_truncated(classify: Callable[[bytes], Encoded]) -> None:
    data = classify(
        b'{"text": "a good film", "label": "positive"}\n{"text": "the film was so very very very dull", "label": "negative"}\n'
    )
    assert [words(data[0]), words(data[1])] == ["[CLS] a good film [SEP]", "[CLS] the film was so very very [SEP]"]
    assert [data[0].label, data[1].label] == [2, 0]
    assert list(data.lengths(np.array([1, 0]))) == [8, 5]


def test_a_label_outside_the_list_is_named_with_its_line(classify: Callable[[bytes], Encoded]) -> None:
    with pytest.raises(BadData) as refused:
        classify(b'{"text": "fine", "label": "positive"}\n{"text": "fine", "label": "Positive"}\n')
    assert str(refused.value) == (
        f'{DATA} line 2: label "Positive" is not one of task.labels: "negative", "neutral", "positive"'
    )


def test_texts_are_joined_and_cut_into_blocks(model_language: Callable[[bytes], Encoded]) -> None:
    data = model_language(b'{"text": "w1 w2 w3 w4 w5"}\n{"text": "w6 w7 w8 w9"}\n')
    assert [words(data[i]) for i in range(len(data))] == ["w1 w2 w3 w4 w5 <eos> w6 w7", "w8 w9 <eos>"]
    assert data.labels is None


def test_each_text_begins_as_the_tokenizer_has_it_begin(files: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files / "llama")
    tokenizer.bos_token = "[CLS]"
    rows = b'{"text": "w1 w2"}\n{"text": "w3"}\n'
    task = task_of(Recipe.model_validate(language_modelling(files, data={"maxTokens": 8})))
    data = encode(rows, task, tokenizer, tmp_path / "without")
    assert words(data[0]) == "w1 w2 <eos> w3 <eos>", "it has one and does not use it, as GPT-2's"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", WORDS.index("[CLS]"))]
    )
    data = encode(rows, task, tokenizer, tmp_path / "with")
    assert words(data[0]) == "[CLS] w1 w2 <eos> [CLS] w3 <eos>"


def test_a_last_block_without_a_target_is_dropped(model_language: Callable[[bytes], Encoded]) -> None:
    assert len(model_language(b'{"text": "w1 w2 w3 w4 w5 w6 w7 w8"}\n')) == 1


@pytest.mark.parametrize(
    ("uri", "version", "lasting"),
    [
        pytest.param("s3://d/t.jsonl", "9b2-3", "9b2-3", id="an ETag"),
        pytest.param("pvc://c/t.jsonl", "17-1700000000", "17-1700000000", id="size and time on a volume"),
        pytest.param(
            "file:///t.jsonl", "17-1700000000", "17", id="the size in an image, whose files are as old as it is"
        ),
        pytest.param(
            "hf://o/m@main/config.json", "abc:f00", "f00", id="on the Hub that of the file, not of the last commit"
        ),
    ],
)
def test_a_version_that_lasts_is_that_of_the_file_alone(uri: str, version: str, lasting: str) -> None:
    assert PinnedFile("t", uri, version, 17).lasting_version == lasting


def test_checkpoints_tell_frozen_weights_from_what_is_only_read(files: Path) -> None:
    model = [PinnedFile(name, f"s3://m/{name}", name[0], 1) for name in ("config.json", "model.safetensors")]
    data = Pinned("s3://d/t.jsonl", (PinnedFile("t.jsonl", "s3://d/t.jsonl", "t", 1),))
    sources = Sources(model=Pinned("s3://m", tuple(model)), train=data, evaluation=data)
    lora = {"method": "LoRA", "rank": 4}
    assert sources.versions(Recipe.model_validate(classification(files))) == {
        "model": {"s3://m/config.json": "c", "s3://m/model.safetensors": "m"},
        "train": {"s3://d/t.jsonl": "t"},
    }
    assert sources.versions(Recipe.model_validate(classification(files, tuning=lora))) == {
        "model": {"s3://m/config.json": "c"},
        "base": {"s3://m/model.safetensors": "m"},
        "train": {"s3://d/t.jsonl": "t"},
    }


def test_failed_work_leaves_nothing_behind(classify: Callable[[bytes], Encoded], tmp_path: Path) -> None:
    with pytest.raises(BadData):
        classify(b'{"text": "fine", "label": "odd"}\n')
    assert [path.name for path in tmp_path.rglob("*") if path.name != "d.jsonl" and path.is_file()] == []


def test_what_a_killed_worker_did_not_finish_is_removed_and_what_it_has_stays(
    classify: Callable[[bytes], Encoded], tmp_path: Path
) -> None:
    classify(b'{"text": "fine", "label": "positive"}\n')
    whole = sorted(tmp_path.rglob("*"))
    unfinished(tmp_path).write_bytes(b"half a model")
    (unfinished(tmp_path) / "tokens").mkdir(parents=True)
    discard_unfinished(tmp_path)
    discard_unfinished(tmp_path)
    assert sorted(tmp_path.rglob("*")) == [path for path in whole if path.name != UNFINISHED]


def test_whatever_arrives_lies_where_it_can_be_discarded(tmp_path: Path) -> None:
    class Killed(MemoryObjectStore):
        def download_file(self, uri: str, path: Path) -> None:
            super().download_file(uri, path)
            places.append(path)
            raise KeyboardInterrupt

    places: list[Path] = []
    store = Killed()
    store.put(DATA, b"new")
    with pytest.raises(KeyboardInterrupt):
        fetch(pin_data(DATA, store, tmp_path), store, tmp_path)
    assert places[0].parent == tmp_path / UNFINISHED


def test_a_batch_is_made_on_the_host_and_goes_to_the_device_when_it_is_told(
    files: Path, classify: Callable[[bytes], Encoded]
) -> None:
    """Copying to a GPU waits for what it computes, and so for peers: it must not count as loading."""
    task = task_of(Recipe.model_validate(classification(files)))
    feed = Feed(classify(b'{"text": "fine", "label": "neutral"}\n'), task, 0, torch.device("meta"))
    assert feed.batch(np.array([0])).labels.device == torch.device("cpu")


def test_what_is_encoded_is_found_again(classify: Callable[[bytes], Encoded], tmp_path: Path) -> None:
    rows = b'{"text": "fine", "label": "positive"}\n'
    classify(rows)
    classify(rows)
    assert len(list((tmp_path / "encoded").iterdir())) == 1


def test_padding_depends_on_the_micro_batch_alone(files: Path, classify: Callable[[bytes], Encoded]) -> None:
    data = classify(b'{"text": "a film", "label": "positive"}\n{"text": "a fine film", "label": "neutral"}\n')
    task = task_of(Recipe.model_validate(classification(files)))
    batch = Feed(data, task, 0, torch.device("cpu")).batch(np.array([1, 0]))
    assert batch.inputs["input_ids"].shape == (2, 8)
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [5, 4]
    assert batch.labels.tolist() == [1, 2]
    assert task.count_targets(data, np.array([1, 0])) == 2


def test_every_token_but_the_first_is_a_target(files: Path, model_language: Callable[[bytes], Encoded]) -> None:
    data = model_language(b'{"text": "w1 w2 w3 w4 w5"}\n{"text": "w6 w7 w8 w9"}\n')
    task = task_of(Recipe.model_validate(language_modelling(files)))
    batch = Feed(data, task, 4, torch.device("cpu")).batch(np.array([0, 1]))
    targets = batch.labels != IGNORED
    assert targets.sum(dim=1).tolist() == [7, 2]
    assert int(targets.sum()) == task.count_targets(data, np.array([0, 1]))
    assert batch.labels[1, :2].tolist() == batch.inputs["input_ids"][1, 1:3].tolist()


@pytest.mark.parametrize("recipe", [classification, language_modelling])
def test_an_ignored_micro_batch_weighs_nothing(
    recipe: Callable[[Path], dict[str, Any]],
    files: Path,
    classify: Callable[[bytes], Encoded],
    model_language: Callable[[bytes], Encoded],
) -> None:
    task = task_of(Recipe.model_validate(recipe(files)))
    data = (
        classify(b'{"text": "fine", "label": "neutral"}\n')
        if task.needs_labels
        else model_language(b'{"text": "w1 w2"}\n')
    )
    feed = Feed(data, task, 0, torch.device("cpu"))
    batch = feed.batch(None)
    assert torch.equal(batch.inputs["input_ids"], feed.batch(np.array([0])).inputs["input_ids"]), "whole, with its end"
    assert set(batch.labels.flatten().tolist()) == {IGNORED}
    shape = (1, 3) if task.needs_labels else (1, 8, len(WORDS))
    logits = torch.randn(shape, requires_grad=True)
    task.loss(logits, batch.labels).backward()
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad) == 0


def test_a_missing_object_is_named() -> None:
    with pytest.raises(BadData, match=r"^s3://datasets/d\.jsonl: there is no such object$"):
        pin_data(DATA, MemoryObjectStore(), Path("/claims"))


def test_a_missing_file_of_a_claim_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        BadData, match=r"^pvc://data/d\.csv: cannot be read \(.*/data/d\.csv: No such file or directory\)$"
    ):
        pin_data("pvc://data/d.csv", MemoryObjectStore(), tmp_path)


def test_a_file_that_may_not_be_read_is_a_matter_of_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read anything
    with pytest.raises(NoPermission, match=r"^file:///data/d\.csv: may not be read as user \d+ in the pod"):
        pin_data("file:///data/d.csv", MemoryObjectStore(), tmp_path)


def test_data_that_changes_while_it_is_fetched_is_refused(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    store.put(DATA, b"old")
    pinned = pin_data(DATA, store, tmp_path)
    store.put(DATA, b"new")
    with pytest.raises(BadData, match=r"^s3://datasets/d\.jsonl: changed while it was read"):
        fetch(pinned, store, tmp_path)
    assert list((tmp_path / "sources").glob("*/*")) == []


def test_a_model_for_more_than_text_is_refused(files: Path, tmp_path: Path) -> None:
    Gemma3Config().save_pretrained(tmp_path)
    recipe = Recipe.model_validate(language_modelling(files))
    tokenizer = load_tokenizer(files / "llama", "s3://m")
    with pytest.raises(
        BadConfig, match=r"^s3://m: a gemma3 model is made of several, .*: take the one for text alone$"
    ):
        load_config(tmp_path, "s3://m", recipe=recipe, task=task_of(recipe), tokenizer=tokenizer)


def test_how_text_is_to_be_generated_is_handed_on(files: Path, tmp_path: Path) -> None:
    source, made = save_llama(tmp_path / "source"), tmp_path / "made"
    (source / GENERATION).write_text('{"temperature": 0.7, "do_sample": true, "eos_token_id": [4, 3]}')
    recipe = Recipe.model_validate(language_modelling(files))
    bare = skeleton(llama_config(), task_of(recipe), torch.float32)
    save_model(bare, made, source=source, tokenizer=AutoTokenizer.from_pretrained(source), weights={})
    handed_on = GenerationConfig.from_pretrained(made)
    assert (handed_on.temperature, handed_on.eos_token_id) == (0.7, [4, 3])


def test_a_gpu_that_was_asked_for_and_does_not_work_is_told_and_not_replaced_by_a_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch.cuda, "init", broken)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(RuntimeError, match="No CUDA GPUs are available"):
        _pick_device(0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert _pick_device(0) == torch.device("cpu")


def test_a_recipe_that_asks_for_more_tokens_than_the_model_takes(files: Path) -> None:
    recipe = Recipe.model_validate(classification(files, data={"maxTokens": 65}))
    tokenizer = load_tokenizer(files / "bert", "s3://m")
    with pytest.raises(BadConfig, match=r"^recipe\.data\.maxTokens is 65, but s3://m takes at most 64 tokens$"):
        load_config(files / "bert", "s3://m", recipe=recipe, task=task_of(recipe), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "vit"}', "s3://m: a vit model cannot do SequenceClassification"),
        ('{"model_type": "nosuch"}', "s3://m: its config.json cannot be used: ValueError: "),
        (
            '{"model_type": "bert", "vocab_size": 100}',
            "s3://m: the tokenizer has 197 tokens, the model's vocabulary only 100",
        ),
    ],
)
def test_a_configuration_that_does_not_fit(config: str, message: str, files: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(classification(files))
    (tmp_path / "config.json").write_text(config)
    tokenizer = load_tokenizer(files / "bert", "s3://m")
    with pytest.raises(BadConfig) as refused:
        load_config(tmp_path, "s3://m", recipe=recipe, task=task_of(recipe), tokenizer=tokenizer)
    assert str(refused.value).startswith(message)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadConfig, match=r"^s3://m: its tokenizer cannot be loaded: "):
        load_tokenizer(tmp_path, "s3://m")
