"""Where each weight of a model lies in its files, before there is a number: shapes and formats are all it takes. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from finetune_trainer.export_plan import Weight
from finetune_trainer.rounding import ITEM_BYTES
from finetune_trainer.safetensors_header import Tensor, build_header

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A safetensors file: its header, and where its tensors will lie."""

    name: str
    header: bytes
    tensors: dict[str, Tensor]

    @property
    def size_bytes(self) -> int:
        """The size of the whole file."""
        return max((tensor.end for tensor in self.tensors.values()), default=len(self.header))


def lay_out(weights: Sequence[Weight], largest_bytes: int) -> list[WeightsFile]:
    """Return files of at most ``largest_bytes`` of numbers each, but for a weight that is larger by itself."""
    groups: list[list[Weight]] = [[]]
    room = largest_bytes
    for weight in weights:
        if groups[-1] and size_bytes(weight) > room:
            groups.append([])
            room = largest_bytes
        groups[-1].append(weight)
        room -= size_bytes(weight)
    return [_file(_name(number, len(groups)), group) for number, group in enumerate(groups, start=1)]


def index_of(files: Sequence[WeightsFile], weights: Sequence[Weight]) -> bytes:
    """Return the index that transformers wants beside several files."""
    weight_map = {name: file.name for file in files for name in file.tensors}
    metadata = {
        "total_parameters": sum(prod(weight.shape) for weight in weights),
        "total_size": sum(size_bytes(weight) for weight in weights),
    }
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2).encode() + b"\n"


def size_bytes(weight: Weight) -> int:
    """Return the size of a weight's numbers."""
    return prod(weight.shape) * ITEM_BYTES[weight.dtype]


def _file(name: str, weights: Sequence[Weight]) -> WeightsFile:
    layout = [(weight.name, weight.dtype, weight.shape) for weight in weights]
    return WeightsFile(name, *build_header(layout, metadata={"format": "pt"}))


def _name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
