"""Writes the result as a plain Hugging Face directory and uploads it.

Weights are gathered parameter by parameter onto rank 0 in the precision they were trained and evaluated in (FP32, BF16 or FP16), so that the
metrics in the model card are those of these very numbers; ZeRO-3 never holds more than one of them whole on a device. Adapters are added
into the weights they adapt. The upload puts ``config.json`` last: a directory without it is not a model, so a torn upload cannot be
mistaken for one, and a repeated upload replaces every file by the same or a newer one.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune_trainer.adapters import add_adapter
from finetune_trainer.model_files import CONFIG, GENERATION
from finetune_trainer.models import DTYPES, gathered
from finetune_trainer.object_store import ObjectStore
from finetune_trainer.tasks import Task

LAST = ("README.md", CONFIG)

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Piece:
    """A weight of the result: its plain name, the tensor that it is, and the adapted module whose adapter is added into it, if any."""

    name: str
    tensor: torch.Tensor
    adapted: Any = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What must be gathered for it under ZeRO-3."""
        if self.adapted is not None:
            return list(self.adapted.parameters())
        return [self.tensor] if isinstance(self.tensor, nn.Parameter) else []

    def whole(self) -> torch.Tensor:
        """Return the weight itself; its parameters are gathered."""
        return self.tensor if self.adapted is None else _merged(self.adapted, self.tensor)


@torch.no_grad()
def gather_weights(model: nn.Module, *, keep: bool, alive: Callable[[], None]) -> Weights:
    """Return the whole weights under their plain names, adapters added in; empty where not ``keep``. Collective under ZeRO-3."""
    weights: Weights = {}
    for piece in pieces(model):
        alive()
        with gathered(piece.parameters):
            if keep:
                weights[piece.name] = piece.whole().detach().to("cpu", copy=True).contiguous()
    return weights


def write_model(
    folder: Path, *, source: Path, weights: Weights, config: Any, task: Task, tokenizer: Any, card: str
) -> None:
    """Write weights (safetensors, sharded when large), what stands around them, and the model card into a folder."""
    dtype = next(iter(weights.values())).dtype
    assert dtype in DTYPES.values()
    save_model(skeleton(config, task, dtype), folder, source=source, tokenizer=tokenizer, weights=weights)
    (folder / "README.md").write_text(card)


def save_model(bare: Any, folder: Path, *, source: Path, tokenizer: Any, weights: Weights) -> None:
    """Save a skeleton with weights, tokenizer, and how text is to be generated as the model that was trained says it.

    A configuration knows nothing of that any more: sampling and further stop tokens stand in a file of their own.
    """
    bare.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    if bare.can_generate() and (source / GENERATION).exists():
        shutil.copyfile(source / GENERATION, folder / GENERATION)


def skeleton(config: Any, task: Task, dtype: torch.dtype) -> Any:
    """Return the model without numbers; it knows how to save them."""
    unset_hf_deepspeed_config()  # else the skeleton would be sharded over ranks that are not here
    with torch.device("meta"):
        return task.model_class.from_config(config, dtype=dtype, trust_remote_code=False)


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


def pieces(model: nn.Module) -> Iterator[Piece]:
    """Yield each weight of the result, in the same order on every rank; of tied ones the first."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        if hasattr(module, "lora_A"):  # peft's mark of an adapted module; importing peft to ask costs a second
            weight = module.get_base_layer().weight
            yield Piece(f"{plain_name(module_name)}.weight", weight, module)
            seen.add(id(weight))
    for name, parameter in model.named_parameters():
        if id(parameter) not in seen and ".lora_" not in name and ".original_module." not in name:
            yield Piece(plain_name(name), parameter)
    for name, buffer in _saved_buffers(model):
        yield Piece(plain_name(name), buffer)


def _merged(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return base weight plus adapter, added in single precision."""
    total = weight.detach().float().cpu().numpy()
    for adapter in module.active_adapters:
        factors = (module.lora_B[adapter].weight, module.lora_A[adapter].weight)
        left, right = (factor.detach().float().cpu().numpy() for factor in factors)
        if module.fan_in_fan_out:
            left, right = right.T, left.T
        total = add_adapter(total, left, right, module.scaling[adapter])
    return torch.from_numpy(total).to(weight.dtype)


def plain_name(name: str) -> str:
    """Return the name that a weight has without adapters around it."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer", "").replace(".modules_to_save.default", "")


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that belong into a checkpoint."""
    saved = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in saved and ".original_module." not in name:
            yield name, buffer
