"""Writes the result as a plain Hugging Face directory and uploads it.

Weights are gathered parameter by parameter onto rank 0 in the precision they were trained and evaluated in (FP32, BF16 or FP16), so that the
metrics in the model card are those of these very numbers; ZeRO-3 never holds more than one of them whole on a device. Adapters are added
into the weights they adapt. The upload puts ``config.json`` last: a directory without it is not a model, so a torn upload cannot be
mistaken for one, and a repeated upload replaces every file by the same or a newer one.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune_trainer.model_files import CONFIG
from finetune_trainer.models import DTYPES, gathered
from finetune_trainer.object_store import ObjectStore
from finetune_trainer.tasks import Task

LAST = ("README.md", CONFIG)

Weights = dict[str, torch.Tensor]


@torch.no_grad()
def gather_weights(model: nn.Module, *, keep: bool, alive: Callable[[], None]) -> Weights:
    """Return the whole weights under their plain names, adapters added in; empty where not ``keep``. Collective under ZeRO-3."""
    weights: Weights = {}
    for name, parameters, whole in _pieces(model):
        alive()
        with gathered(parameters):
            if keep:
                weights[name] = whole().detach().to("cpu", copy=True).contiguous()
    return weights


def write_model(folder: Path, *, weights: Weights, config: Any, task: Task, tokenizer: Any, card: str) -> None:
    """Write weights (safetensors, sharded when large), configuration, tokenizer and model card into a folder."""
    unset_hf_deepspeed_config()  # else the skeleton would be sharded over ranks that are not here
    dtype = next(iter(weights.values())).dtype
    assert dtype in DTYPES.values()
    with torch.device("meta"):
        skeleton = task.model_class.from_config(config, dtype=dtype, trust_remote_code=False)
    skeleton.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def upload_model(folder: Path, uri: str, store: ObjectStore, alive: Callable[[], None]) -> None:
    """Upload a folder, ``config.json`` last, and delete what an earlier upload left there beside it."""
    files = sorted((path for path in folder.iterdir() if path.is_file()), key=_upload_order)
    stale = {info.uri for info in store.list(f"{uri}/")} - {f"{uri}/{path.name}" for path in files}
    store.delete(sorted(stale))
    for path in files:
        alive()
        store.upload_file(path, f"{uri}/{path.name}")


def _upload_order(path: Path) -> tuple[int, str]:
    return (LAST.index(path.name) + 1 if path.name in LAST else 0, path.name)


def _pieces(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter], Callable[[], torch.Tensor]]]:
    """Yield each weight of the result: its name, the parameters it is made of, and how, once they are gathered."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        if hasattr(module, "lora_A"):  # peft's mark of an adapted module; importing peft to ask costs a second
            weight = module.get_base_layer().weight
            yield f"{_plain(module_name)}.weight", list(module.parameters()), partial(_merged, module, weight)
            seen.add(id(weight))
    for name, parameter in model.named_parameters():
        if id(parameter) not in seen and ".lora_" not in name and ".original_module." not in name:
            yield _plain(name), [parameter], partial(_itself, parameter)
    for name, buffer in _saved_buffers(model):
        yield _plain(name), [], partial(_itself, buffer)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _merged(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return base weight plus adapter, added in single precision."""
    total = weight.float()
    for adapter in module.active_adapters:
        total = total + module.get_delta_weight(adapter).float()
    return total.to(weight.dtype)


def _plain(name: str) -> str:
    """Return the name that a weight has without adapters around it."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer", "").replace(".modules_to_save.default", "")


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that belong into a checkpoint."""
    saved = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in saved and ".original_module." not in name:
            yield name, buffer
