"""Which models are refused, by name and before anything is loaded, and what is fetched of the others."""

from pathlib import Path

import pytest
from safetensors.numpy import save

from finetune_trainer.errors import BadConfig
from finetune_trainer.model_files import fetch_model, pin_model, split_hub_uri
from finetune_trainer.object_store import MemoryObjectStore

URI = "s3://models/mine"
CONVERT = "convert with AutoModel.from_pretrained(…).save_pretrained(…, safe_serialization=True)"
CONFIG = b'{"model_type": "bert"}'
WEIGHTS = save({})

# id: (the folder's files, the message)
REFUSED = {
    "nothing there": ({}, f"{URI}: there is no config.json; a model is a directory in Hugging Face layout"),
    "no tokenizer": (
        {"config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer_config.json": b"{}"},
        f"{URI}: there is no tokenizer.json, nor any other file of a tokenizer",
    ),
    "no weights": (
        {"vocab.txt": b"", "config.json": CONFIG},
        f"{URI}: there is no model.safetensors and no model.safetensors.index.json",
    ),
    "pickled weights": (
        {"vocab.txt": b"", "config.json": CONFIG, "pytorch_model.bin": b"\x80\x04"},
        f"{URI}: pytorch_model.bin is refused, because loading it may run code; only safetensors; {CONVERT}",
    ),
    "a training checkpoint": (
        {"vocab.txt": b"", "config.json": CONFIG, "model.pt": b""},
        f"{URI}: model.pt is refused, because loading it may run code; only safetensors; {CONVERT}",
    ),
    "a configuration with code": (
        {
            "vocab.txt": b"",
            "config.json": b'{"auto_map": {"AutoModel": "modeling.Mine"}}',
            "model.safetensors": WEIGHTS,
        },
        f"{URI}/config.json: auto_map names classes of the model's own code, which is never run here",
    ),
    "a tokenizer with code": (
        {
            "vocab.txt": b"",
            "config.json": CONFIG,
            "tokenizer_config.json": b'{"auto_map": {}}',
            "model.safetensors": WEIGHTS,
        },
        f"{URI}/tokenizer_config.json: auto_map names classes of the model's own code, which is never run here",
    ),
    "a configuration that is no JSON": (
        {"vocab.txt": b"", "config.json": b"{", "model.safetensors": WEIGHTS},
        f"{URI}/config.json: not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "a configuration that is no object": (
        {"vocab.txt": b"", "config.json": b"[]", "model.safetensors": WEIGHTS},
        f"{URI}/config.json: must be a JSON object",
    ),
    "weights under a false name": (
        {"vocab.txt": b"", "config.json": CONFIG, "model.safetensors": b"\x80\x04 a pickle"},
        f"{URI}/model.safetensors: not a readable safetensors file: Error while deserializing header: header too large",
    ),
    "a shard that is missing": (
        {
            "vocab.txt": b"",
            "config.json": CONFIG,
            "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
        },
        f"{URI}: model.safetensors.index.json names model-00001-of-00002.safetensors, which is not there",
    ),
    "a shard outside the folder": (
        {
            "vocab.txt": b"",
            "config.json": CONFIG,
            "model.safetensors.index.json": b'{"weight_map": {"a": "../../etc/passwd"}}',
        },
        f"{URI}: model.safetensors.index.json names ../../etc/passwd, which is not there",
    ),
    "an index of nothing": (
        {"vocab.txt": b"", "config.json": CONFIG, "model.safetensors.index.json": b"{}"},
        f"{URI}/model.safetensors.index.json: has no weight_map",
    ),
}


@pytest.mark.parametrize(("files", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    store = stored(files)
    with pytest.raises(BadConfig) as refused:
        fetch_model(pin_model(URI, store, tmp_path, with_weights=True), store, tmp_path)
    assert str(refused.value) == message


def test_a_mounted_model_is_read_where_it_lies(tmp_path: Path) -> None:
    folder = tmp_path / "team-models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "vocab.txt").touch()
    store = MemoryObjectStore()
    pinned = pin_model("pvc://team-models/mine", store, tmp_path, with_weights=True)
    assert fetch_model(pinned, store, tmp_path / "scratch") == folder


def test_a_claim_without_the_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"^pvc://team-models/mine: cannot be read \(.*: No such file or directory\)$"):
        pin_model("pvc://team-models/mine", MemoryObjectStore(), tmp_path, with_weights=True)


def test_only_what_is_needed_is_fetched_and_only_once(tmp_path: Path) -> None:
    wanted = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer.json": b"{}", "vocab.txt": b""}
    more = {"pytorch_model.bin": b"", "modeling.py": b"", "onnx/model.onnx": b"", "README.md": b""}
    store = stored(wanted | more)
    pinned = pin_model(URI, store, tmp_path, with_weights=True)
    folder = fetch_model(pinned, store, tmp_path)
    assert {path.name for path in folder.iterdir()} == set(wanted)
    store.objects.clear()
    assert fetch_model(pinned, store, tmp_path) == folder


def test_a_model_from_scratch_needs_no_weights_and_fetches_none(tmp_path: Path) -> None:
    store = stored({"config.json": CONFIG, "vocab.txt": b"", "model.safetensors": b"not looked at"})
    folder = fetch_model(pin_model(URI, store, tmp_path, with_weights=False), store, tmp_path)
    assert {path.name for path in folder.iterdir()} == {"config.json", "vocab.txt"}


def test_hub_uris() -> None:
    assert split_hub_uri("hf://organisation/name@v1.0") == ("organisation/name", "v1.0")
    assert split_hub_uri("hf://organisation/name") == ("organisation/name", None)


def stored(files: dict[str, bytes]) -> MemoryObjectStore:
    store = MemoryObjectStore()
    for name, body in files.items():
        store.put(f"{URI}/{name}", body)
    return store


def test_versions_name_the_copy(tmp_path: Path) -> None:
    stores = [stored({"config.json": config, "vocab.txt": b""}) for config in (CONFIG, b'{"model_type": "llama"}')]
    folders = {fetch_model(pin_model(URI, store, tmp_path, with_weights=False), store, tmp_path) for store in stores}
    assert len(folders) == 2
