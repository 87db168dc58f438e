"""Makes the plan by which checkpoints of this job can be exported (see export_plan), once, before its first step.

A frozen weight is looked for in the model's source under its own name, with and without the prefix of the base model, and taken from
there only if its numbers are equal: names in files need not be names in memory (transformers renames, splits and joins as it loads), and
a guess would be a wrong model. Every rank compares the part of it that it holds anyway, so nothing is gathered and each byte of the
source is read once in all. What is not found there (weights that were drawn because the source has none, buffers) is written beside the
plan.

Costs a job one request at each later start, and at the first one a few small objects, and for LoRA a look at the whole source.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from finetune_trainer.checkpoint.commit import create
from finetune_trainer.checkpoint.deepspeed_state import share
from finetune_trainer.checkpoint.lost_bucket import gone_is_lost
from finetune_trainer.errors import Stale
from finetune_trainer.export import Piece, pieces, plain_name, save_model, skeleton
from finetune_trainer.export_plan import (
    PLAN_KEY,
    Adapted,
    Constant,
    ExportPlan,
    Factor,
    File,
    Frozen,
    Origin,
    SourceFile,
    Stem,
    Trained,
    Weight,
    encode,
)
from finetune_trainer.job import Job
from finetune_trainer.model_card import lineage_of
from finetune_trainer.models import DTYPES, gathered
from finetune_trainer.preparation import Prepared
from finetune_trainer.ranks import Ranks
from finetune_trainer.rounding import FLOATS, ITEM_BYTES, converted
from finetune_trainer.safetensors_header import LENGTH_BYTES, Tensor, build_header, header_end, parse_header
from finetune_trainer.scratch import unfinished_folder

CONSTANTS = "constants.safetensors"
COMPARED_AT_ONCE = 2**22
HASHED_AT_ONCE = 2**24

FORMATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_export_plan(job: Job, ranks: Ranks, prepared: Prepared, alive: Callable[[], None]) -> None:
    """Write the plan unless there is one. Collective; the weights are those before the first step, or later ones."""
    uri = f"{job.storage.prefix}/{PLAN_KEY}"
    with gone_is_lost(job.storage.prefix, has_checkpoint=job.has_checkpoint):
        is_written = ranks.once(lambda: prepared.store.head(uri) is not None)
    if is_written:
        return
    model = prepared.engine.module
    parts = list(pieces(model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = _found_in_source(_source(prepared), model, parts, ranks, alive)
    stems = {part.name: _stem(part, names, found) for part in parts}
    with unfinished_folder(job.scratch) as folder:
        constants = folder / CONSTANTS
        _write_constants(constants, [part for part in parts if isinstance(stems[part.name], Constant)], ranks, alive)
        weights = tuple(_weight(part, stems[part.name], names) for part in parts)
        ranks.once(lambda: _write(job, prepared, weights, _tied(model), constants))


def _stem(part: Piece, names: Mapping[int, str], found: Mapping[str, Frozen]) -> Stem:
    if part.tensor.requires_grad:
        return Trained(names[id(part.tensor)])
    return found.get(part.name) or Constant(part.name)


def _weight(part: Piece, stem: Stem, names: Mapping[int, str]) -> Weight:
    origin: Origin = stem
    if part.adapted is not None:
        (adapter,) = part.adapted.active_adapters
        a, b = (factors[adapter].weight for factors in (part.adapted.lora_A, part.adapted.lora_B))
        origin = Adapted(
            base=stem,
            a=Factor(names[id(a)], FORMATS[a.dtype]),
            b=Factor(names[id(b)], FORMATS[b.dtype]),
            rank=int(part.adapted.r[adapter]),
            scaling=float(part.adapted.scaling[adapter]),
            transposed=bool(part.adapted.fan_in_fan_out),
        )
    return Weight(part.name, FORMATS[part.tensor.dtype], _shape(part.tensor), origin)


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the whole shape: under ZeRO-3 the tensor itself may be empty."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _tied(model: nn.Module) -> tuple[tuple[str, str], ...]:
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return tuple(
        (plain_name(name), plain_name(first[id(parameter)]))
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name != first[id(parameter)]
    )


@dataclass(frozen=True)
class _SourceFile:
    """A safetensors file of the source on this node."""

    path: Path

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        with self.path.open("rb") as file:
            start = file.read(LENGTH_BYTES)
            return parse_header(start + file.read(header_end(start) - LENGTH_BYTES))

    @cached_property
    def bytes(self) -> Any:
        return np.memmap(self.path, np.uint8, mode="r")


def _source(prepared: Prepared) -> dict[str, _SourceFile]:
    names = [file.name for file in prepared.sources.model.files if file.name.endswith(".safetensors")]
    return {name: _SourceFile(prepared.model_folder / name) for name in names}


def _found_in_source(
    source: Mapping[str, _SourceFile], model: nn.Module, parts: Sequence[Piece], ranks: Ranks, alive: Callable[[], None]
) -> dict[str, Frozen]:
    """Return where the source has each frozen weight with these very numbers."""
    candidates = {
        part.name: (part.tensor, candidate)
        for part in parts
        if isinstance(part.tensor, nn.Parameter) and not part.tensor.requires_grad
        if (candidate := _candidate(part, source, _base_prefix(model))) is not None
    }
    differing = [
        float(_differs(parameter, source[candidate.file], candidate.tensor, ranks, alive))
        for parameter, candidate in candidates.values()
    ]
    verdicts = ranks.sum(differing) if differing else []
    pairs = zip(candidates.items(), verdicts, strict=True)
    return {name: candidate for (name, (_, candidate)), ranks_that_differ in pairs if not ranks_that_differ}


def _base_prefix(model: nn.Module) -> str:
    """Return the name of the module that pretrained files often hold alone; peft's wrapper passes the question on."""
    return str(getattr(model, "base_model_prefix", ""))


def _candidate(part: Piece, source: Mapping[str, _SourceFile], prefix: str) -> Frozen | None:
    for name in (part.name, part.name.removeprefix(f"{prefix}."), f"{prefix}.{part.name}"):
        for file_name, file in source.items():
            tensor = file.tensors.get(name)
            if tensor is not None and tensor.shape == _shape(part.tensor):
                return Frozen(file_name, name)
    return None


def _differs(parameter: torch.Tensor, file: _SourceFile, name: str, ranks: Ranks, alive: Callable[[], None]) -> bool:
    """Whether this rank's share of a parameter has other numbers than the file's tensor, in the parameter's format."""
    tensor, wanted = file.tensors[name], FORMATS[parameter.dtype]
    if tensor.dtype != wanted and not {tensor.dtype, wanted} <= set(FLOATS):
        return True
    first, values = share(parameter, ranks.rank, ranks.size)
    item = ITEM_BYTES[tensor.dtype]
    for start in range(0, values.numel(), COMPARED_AT_ONCE):
        alive()
        piece = values[start : start + COMPARED_AT_ONCE].detach().cpu()
        begin = tensor.begin + (first + start) * item
        stored = file.bytes[begin : begin + piece.numel() * item].tobytes()
        if bytes(converted(stored, tensor.dtype, wanted)) != piece.view(torch.uint8).numpy().tobytes():
            return True
    return False


@torch.no_grad()
def _write_constants(path: Path, parts: Sequence[Piece], ranks: Ranks, alive: Callable[[], None]) -> None:
    """Write these weights, without adapters, on rank 0. Collective under ZeRO-3."""
    layout = [(part.name, FORMATS[part.tensor.dtype], _shape(part.tensor)) for part in parts]
    header, _ = build_header(layout, metadata={"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        for part in parts:
            alive()
            with gathered([part.tensor] if isinstance(part.tensor, nn.Parameter) else []):
                if ranks.rank == 0:
                    file.write(part.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write(
    job: Job, prepared: Prepared, weights: tuple[Weight, ...], tied: tuple[tuple[str, str], ...], constants: Path
) -> None:
    """Upload the files around the weights, then create the plan that names them."""
    config = copy.deepcopy(prepared.config)  # saving writes into it
    bare = skeleton(config, prepared.task, DTYPES[job.recipe.training.precision])
    saved = _as_saved(bare, weights)
    around = constants.parent / "files"
    save_model(bare, around, source=prepared.model_folder, tokenizer=prepared.tokenizer, weights={})
    used = any(isinstance(stem, Constant) for weight in weights for stem in _stems(weight))
    plan = ExportPlan(
        lineage=lineage_of(
            job,
            model=prepared.sources.model,
            train=prepared.sources.train,
            evaluation=prepared.sources.evaluation,
            total_steps=prepared.total_steps,
        ),
        source_files=tuple(SourceFile(file.name, file.version, file.size) for file in prepared.sources.model.files),
        files=tuple(_upload(path, job, prepared) for path in sorted(around.iterdir()) if path.suffix != ".safetensors"),
        constants=_upload(constants, job, prepared) if used else None,
        weights=saved or (),
        tied=tied,
        refusal=None
        if saved is not None
        else f"{type(bare).__name__} stores its weights otherwise than it computes with them, which an export cannot undo",
    )
    try:
        create(prepared.store, f"{job.storage.prefix}/{PLAN_KEY}", encode(plan))
    except Stale:
        return  # another generation was faster, and what it wrote stands


def _as_saved(bare: Any, weights: Sequence[Weight]) -> tuple[Weight, ...] | None:
    """Return the weights under the names that transformers saves them under; None if it would split or join them."""
    dtypes = {name: dtype for dtype, name in FORMATS.items()}
    ignored = set(bare._keys_to_ignore_on_save or ())  # noqa: SLF001  save_pretrained's own rule
    kept = {weight.name: weight for weight in weights if weight.name not in ignored}
    sketch = {
        name: torch.empty(weight.shape, dtype=dtypes[weight.dtype], device="meta") for name, weight in kept.items()
    }
    name_of = {id(tensor): name for name, tensor in sketch.items()}
    try:
        saved = revert_weight_conversion(bare, dict(sketch))
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    names = {name_of[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in name_of}
    if names.keys() != kept.keys():
        return None
    return tuple(Weight(names[weight.name], weight.dtype, weight.shape, weight.origin) for weight in kept.values())


def _stems(weight: Weight) -> Iterator[Origin]:
    yield weight.origin.base if isinstance(weight.origin, Adapted) else weight.origin


def _upload(path: Path, job: Job, prepared: Prepared) -> File:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(HASHED_AT_ONCE):
            digest.update(data)
    entry = File(path.name, digest.hexdigest(), path.stat().st_size)
    prepared.store.upload_file(path, f"{job.storage.prefix}/{entry.key}")
    return entry
