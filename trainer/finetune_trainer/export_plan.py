"""What the weights of a job's result are made of, so that any of its checkpoints can be turned into a model. Pure.

A checkpoint holds what is trained, flattened, in FP32, under the names of the training process. What is missing for a model (shapes,
formats, frozen weights, which adapter belongs to which weight, the files around the weights) does not change while a job trains. So the
job writes it once, before its first step: ``export/plan.json``, which names each weight of the result and its origin, and the files
around the weights, each under a key made of its own hash. ``export_planning`` makes the plan; ``finetune checkpoints export`` follows
it. Neither needs the other's machine: the plan is read without torch.

The plan is created once and never replaced. Whatever it names lies under a key that only this content can have, so two incarnations
that both write it cannot mix.
"""

import json
from dataclasses import dataclass
from typing import Any, TypeAlias

from finetune_api.recipe import Recipe
from finetune_trainer.checkpoint.head import Unreadable
from finetune_trainer.model_card import Lineage, Source

VERSION = 1
EXPORT_KEY = "export/"
PLAN_KEY = EXPORT_KEY + "plan.json"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trained:
    """A trainable parameter, under its name in the checkpoints' manifests."""

    parameter: str


@dataclass(frozen=True, slots=True)
class Frozen:
    """A tensor of a file of the model's source."""

    file: str
    tensor: str


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor of the plan's own file of constants: neither trained nor in the source as it is needed."""

    tensor: str


@dataclass(frozen=True, slots=True)
class Factor:
    """One of an adapter's two matrices: a trainable parameter, and the format it is used in."""

    parameter: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Adapted:
    """``base + scaling * (b @ a)``; ``transposed`` where the weight is stored as (inputs, outputs): peft's fan_in_fan_out."""

    base: "Trained | Frozen | Constant"
    a: Factor
    b: Factor
    rank: int
    scaling: float
    transposed: bool


Stem: TypeAlias = Trained | Frozen | Constant
Origin: TypeAlias = Stem | Adapted


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the result. ``dtype`` is a format of safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class File:
    """A file around the weights."""

    name: str
    sha256: str
    size_bytes: int

    @property
    def key(self) -> str:
        """Where it lies below the job's prefix: no other content has this key."""
        return f"{EXPORT_KEY}{self.sha256}/{self.name}"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the model's source, pinned. ``version`` is an ETag, a commit of the Hub, or size and time of a mounted file."""

    name: str
    version: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """How a checkpoint of the job becomes a model.

    ``tied`` are pairs of a name that is not stored and the weight it shares. ``refusal`` says why no checkpoint of this job can be
    exported; there are then no weights.
    """

    lineage: Lineage
    source_files: tuple[SourceFile, ...]
    files: tuple[File, ...]
    constants: File | None
    weights: tuple[Weight, ...]
    tied: tuple[tuple[str, str], ...] = ()
    refusal: str | None = None


def encode(plan: ExportPlan) -> bytes:
    """Return the bytes of ``plan.json``."""
    lineage = plan.lineage
    document = {
        "version": VERSION,
        "job": {"namespace": lineage.namespace, "name": lineage.name, "uid": lineage.uid},
        "recipe": lineage.recipe.to_wire(),
        "recipeDigest": lineage.recipe_digest,
        "totalSteps": lineage.total_steps,
        "model": {
            **_source_to_json(lineage.model),
            "files": [_source_file_to_json(file) for file in plan.source_files],
        },
        "data": {
            "train": _source_to_json(lineage.train),
            "evaluation": None if lineage.evaluation is None else _source_to_json(lineage.evaluation),
        },
        "files": [_file_to_json(file) for file in plan.files],
        "constants": None if plan.constants is None else _file_to_json(plan.constants),
        "weights": [_weight_to_json(weight) for weight in plan.weights],
        "tied": [list(pair) for pair in plan.tied],
        "refusal": plan.refusal,
    }
    return json.dumps(document, separators=(",", ":")).encode()


def decode(body: bytes) -> ExportPlan:
    """Return the plan that bytes say.

    Raises:
        Unreadable: they are none, or one of a version to come.
    """
    try:
        document: Json = json.loads(body)
        if document["version"] != VERSION:
            raise Unreadable(f"version {document['version']!r}, this program reads {VERSION}")
        return ExportPlan(
            lineage=_lineage(document),
            source_files=tuple(
                SourceFile(_plain_name(file["name"]), file["version"], file["sizeBytes"])
                for file in document["model"]["files"]
            ),
            files=tuple(_file(file) for file in document["files"]),
            constants=None if document["constants"] is None else _file(document["constants"]),
            weights=tuple(_weight(weight) for weight in document["weights"]),
            tied=tuple((alias, name) for alias, name in document["tied"]),
            refusal=document["refusal"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def _lineage(document: Json) -> Lineage:
    evaluation = document["data"]["evaluation"]
    return Lineage(
        namespace=document["job"]["namespace"],
        name=document["job"]["name"],
        uid=document["job"]["uid"],
        recipe=Recipe.model_validate(document["recipe"]),
        recipe_digest=document["recipeDigest"],
        total_steps=document["totalSteps"],
        model=_source(document["model"]),
        train=_source(document["data"]["train"]),
        evaluation=None if evaluation is None else _source(evaluation),
    )


def _source(document: Json) -> Source:
    return Source(document["uri"], document["version"])


def _source_to_json(source: Source) -> Json:
    return {"uri": source.uri, "version": source.version}


def _source_file_to_json(file: SourceFile) -> Json:
    return {"name": file.name, "version": file.version, "sizeBytes": file.size_bytes}


def _plain_name(name: str) -> str:
    """Return a file's name, which must not lead out of the folder that it is written to."""
    if "/" in name or "\\" in name or name in {"", ".", ".."}:
        raise Unreadable(f"{name!r} is no file name")
    return name


def _file(document: Json) -> File:
    return File(_plain_name(document["name"]), document["sha256"], document["sizeBytes"])


def _file_to_json(file: File) -> Json:
    return {"name": file.name, "sha256": file.sha256, "sizeBytes": file.size_bytes}


def _weight(document: Json) -> Weight:
    return Weight(document["name"], document["dtype"], tuple(document["shape"]), _origin(document["from"]))


def _weight_to_json(weight: Weight) -> Json:
    return {
        "name": weight.name,
        "dtype": weight.dtype,
        "shape": list(weight.shape),
        "from": _origin_to_json(weight.origin),
    }


def _origin(document: Json) -> Origin:
    match document:
        case {"adapted": adapted}:
            return Adapted(
                base=_stem(adapted["base"]),
                a=Factor(**adapted["a"]),
                b=Factor(**adapted["b"]),
                rank=adapted["rank"],
                scaling=adapted["scaling"],
                transposed=adapted["transposed"],
            )
    return _stem(document)


def _stem(document: Json) -> Stem:
    match document:
        case {"trained": parameter}:
            return Trained(parameter)
        case {"frozen": {"file": file, "tensor": tensor}}:
            return Frozen(file, tensor)
        case {"constant": tensor}:
            return Constant(tensor)
    raise Unreadable(f"{document!r} is no origin of a weight that this program knows")


def _origin_to_json(origin: Origin) -> Json:
    match origin:
        case Trained(parameter):
            return {"trained": parameter}
        case Frozen(file, tensor):
            return {"frozen": {"file": file, "tensor": tensor}}
        case Constant(tensor):
            return {"constant": tensor}
        case Adapted():
            return {
                "adapted": {
                    "base": _origin_to_json(origin.base),
                    "a": {"parameter": origin.a.parameter, "dtype": origin.a.dtype},
                    "b": {"parameter": origin.b.parameter, "dtype": origin.b.dtype},
                    "rank": origin.rank,
                    "scaling": origin.scaling,
                    "transposed": origin.transposed,
                }
            }
