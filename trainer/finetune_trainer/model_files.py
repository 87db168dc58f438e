"""The files of a model: which are needed, which are refused before anything is loaded, and where they lie on the node.

A model is a directory in Hugging Face layout. Weights are safetensors or nothing: every other format is a pickle or may hold
one, and loading it would run its author's code. For the same reason a configuration that names classes of its own
(``auto_map``) is refused: it only works with its author's code.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

from finetune_trainer.errors import BadConfig, NoPermission, StorageUnavailable
from finetune_trainer.object_store import ObjectStore
from finetune_trainer.sources import Pinned, PinnedFile, fetch, pin_folder

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", "model-*.safetensors", INDEX)
DESCRIPTIONS = (
    CONFIG,
    GENERATION,
    "tokenizer*.json",
    "tokenizer.model",
    "*.spm",
    "*sentencepiece*.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "*.spm", "*sentencepiece*.model", "spiece.model", "vocab.*")
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".npz", ".gguf", ".onnx")
CONVERT = "convert with AutoModel.from_pretrained(…).save_pretrained(…, safe_serialization=True)"


def pin_model(uri: str, store: ObjectStore, claims: Path, *, with_weights: bool) -> Pinned:
    """Pin the files of a model.

    Raises:
        BadConfig: files are missing, or there are only weights that may run code.
    """
    pinned = _pin_hub(uri) if uri.startswith("hf://") else pin_folder(uri, store, claims, wanted=_is_of_model)
    names = {file.name for file in pinned.files}
    if CONFIG not in names:
        raise BadConfig(f"{uri}: there is no {CONFIG}; a model is a directory in Hugging Face layout")
    if with_weights:
        _require_weights(uri, names)
    if not any(_matches(name, TOKENIZERS) for name in names):  # transformers would make up an empty one
        raise BadConfig(f"{uri}: there is no tokenizer.json, nor any other file of a tokenizer")
    wanted = (*DESCRIPTIONS, *(WEIGHTS if with_weights else ()))
    return replace(pinned, files=tuple(file for file in pinned.files if _matches(file.name, wanted)))


def fetch_model(pinned: Pinned, store: ObjectStore, scratch: Path) -> Path:
    """Return the folder of a pinned model on this node, with every file checked that can be checked without loading it.

    Raises:
        BadConfig: a file is damaged, or the model needs code of its author's.
    """
    folder = _fetch_hub(pinned, scratch) if pinned.uri.startswith("hf://") else fetch(pinned, store, scratch)
    names = {file.name for file in pinned.files}
    _refuse_code(folder, pinned.uri, names)
    for name in sorted(names):
        if name.endswith(".safetensors"):
            _open_weights(folder / name, f"{pinned.uri}/{name}")
    if INDEX in names and "model.safetensors" not in names:
        _require_shards(folder, pinned.uri, names)
    return folder


def _is_of_model(name: str) -> bool:
    return _matches(name, (*DESCRIPTIONS, *WEIGHTS)) or name.endswith(OTHER_WEIGHTS)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _require_weights(uri: str, names: set[str]) -> None:
    if "model.safetensors" in names or INDEX in names:
        return
    others = sorted(name for name in names if name.endswith(OTHER_WEIGHTS))
    if others:
        raise BadConfig(f"{uri}: {others[0]} is refused, because loading it may run code; only safetensors; {CONVERT}")
    raise BadConfig(f"{uri}: there is no model.safetensors and no {INDEX}")


def _refuse_code(folder: Path, uri: str, names: set[str]) -> None:
    for name in (CONFIG, TOKENIZER_CONFIG):
        if name in names and "auto_map" in _read_object(folder / name, f"{uri}/{name}"):
            raise BadConfig(f"{uri}/{name}: auto_map names classes of the model's own code, which is never run here")


def _open_weights(path: Path, uri: str) -> None:
    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        raise BadConfig(f"{uri}: not a readable safetensors file: {error}") from None


def _require_shards(folder: Path, uri: str, names: set[str]) -> None:
    index = _read_object(folder / INDEX, f"{uri}/{INDEX}").get("weight_map")
    if not isinstance(index, dict) or not index:
        raise BadConfig(f"{uri}/{INDEX}: has no weight_map")
    for shard in sorted({str(name) for name in index.values()}):
        if shard not in names:
            raise BadConfig(f"{uri}: {INDEX} names {shard}, which is not there")


def _read_object(path: Path, uri: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{uri}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadConfig(f"{uri}: must be a JSON object")
    return value


def split_hub_uri(uri: str) -> tuple[str, str | None]:
    """Return repository and revision (None for the default branch) of ``hf://organisation/name@revision``."""
    repository, _, revision = uri.removeprefix("hf://").partition("@")
    return repository, revision or None


def _pin_hub(uri: str) -> Pinned:
    repository, revision = split_hub_uri(uri)
    info = _ask_hub(uri, lambda: HfApi().model_info(repository, revision=revision, files_metadata=True))
    files = (
        PinnedFile(sibling.rfilename, f"{uri}/{sibling.rfilename}", f"{info.sha}:{sibling.blob_id}", sibling.size or 0)
        for sibling in info.siblings or ()
        if "/" not in sibling.rfilename and _is_of_model(sibling.rfilename)
    )
    return Pinned(uri, tuple(files))


def _fetch_hub(pinned: Pinned, scratch: Path) -> Path:
    repository, _ = split_hub_uri(pinned.uri)
    commit = pinned.files[0].version.partition(":")[0]
    folder = scratch / "sources" / pinned.digest[:32]
    names = [file.name for file in pinned.files]
    _ask_hub(
        pinned.uri,
        lambda: snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=names),
    )
    return folder


def _ask_hub(uri: str, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except GatedRepoError:
        raise NoPermission(f"{uri}: the Hugging Face Hub wants its terms accepted and a token (HF_TOKEN)") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise BadConfig(
            f"{uri}: there is no such repository or revision on the Hugging Face Hub, or it is private"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise StorageUnavailable(
            f"{uri}: the Hugging Face Hub cannot be reached: {str(error).splitlines()[0]}"
        ) from None
