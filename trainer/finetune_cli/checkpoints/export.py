"""``finetune checkpoints export``: a checkpoint becomes a Hugging Face directory, streamed, without torch and without a GPU.

The job has written what the weights are made of (finetune_trainer.export_plan). So the headers of the result's files are written
first, then numbers go to their places as they arrive: what was trained from the checkpoint's chunks, what was frozen from the model's
source, an adapter by blocks of rows of the weight it is added into. Adapters themselves, whole but small, wait in a file of their own.

The result appears under its name when it is whole.
"""

import hashlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from finetune_cli.checkpoints.frozen import LocalBytes, TensorFile, local_source, require_unchanged, stored_source
from finetune_cli.checkpoints.kept import read_manifest
from finetune_cli.checkpoints.layout import layout_faults
from finetune_cli.checkpoints.result import INDEX, WeightsFile, index_of, lay_out
from finetune_cli.checkpoints.trained import Slot, fetch_trained
from finetune_cli.checkpoints.untrained import Adapters, Untrained, factors
from finetune_cli.errors import CannotTell, Damaged
from finetune_trainer import export_plan
from finetune_trainer.checkpoint.head import Kept, Unreadable
from finetune_trainer.checkpoint.manifest import Manifest
from finetune_trainer.export_plan import Adapted, ExportPlan, File, Frozen, Stem, Trained, Weight
from finetune_trainer.model_card import render_card
from finetune_trainer.object_store import ObjectMissing, ObjectStore

SCORES = "Unknown: this model was exported from a checkpoint, which holds no scores."


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    folder: Path
    step: int
    files: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Wish:
    """What to export: a checkpoint of a job; a copy of the model that it started from, where that is not in S3."""

    prefix: str
    kept: Kept
    model: Path | None
    largest_file_bytes: int


def export(store: ObjectStore, wish: Wish, folder: Path) -> Exported:
    """Write a checkpoint as a model into a new folder.

    Raises:
        Damaged: the checkpoint or what belongs to it is not as it was written.
        CannotTell: the job has left no plan, the folder is in use, a copy of the model is needed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CannotTell(f"{folder} is in use: give a new folder")
    plan = _read_plan(store, wish.prefix)
    manifest = _read_checkpoint(store, wish, plan)
    with _arriving(folder) as arriving:
        _write_around(store, wish.prefix, plan, manifest, arriving)
        _write_weights(store, wish, plan, manifest, arriving)
        files = sorted(path for path in arriving.iterdir())
        return Exported(
            folder, manifest.position.step, tuple(p.name for p in files), sum(p.stat().st_size for p in files)
        )


def _read_plan(store: ObjectStore, prefix: str) -> ExportPlan:
    uri = f"{prefix}/{export_plan.PLAN_KEY}"
    try:
        plan = export_plan.decode(store.get(uri))
    except ObjectMissing:
        raise CannotTell(
            f"{uri} is missing: the job has not come to its first step, or an older version trained it, whose checkpoints "
            "only a resumed job can turn into a model"
        ) from None
    except Unreadable as error:
        raise CannotTell(f"{uri} cannot be read ({error}): update this program, or restore the object") from None
    if plan.refusal is not None:
        raise CannotTell(
            f"checkpoints below {prefix} cannot be exported: {plan.refusal}; the job's own model/ can be used"
        )
    return plan


def _read_checkpoint(store: ObjectStore, wish: Wish, plan: ExportPlan) -> Manifest:
    manifest = read_manifest(store, wish.prefix, wish.kept)
    if manifest.recipe_digest != plan.lineage.recipe_digest:
        raise Damaged(f"{wish.prefix}/{wish.kept.manifest} is of another recipe than {export_plan.PLAN_KEY} beside it")
    for fault in layout_faults(manifest, f"{wish.prefix}/{wish.kept.manifest}"):
        raise Damaged(f"{fault.uri} {fault.problem}: export another checkpoint")
    sizes = {parameter.name: parameter.numel for parameter in manifest.parameters}
    for name, numel in _trained_sizes(plan).items():
        if sizes.get(name) != numel:
            raise Damaged(
                f"{wish.prefix}/{wish.kept.manifest} has {sizes.get(name, 'none')} of the {numel} numbers of {name} that "
                f"{export_plan.PLAN_KEY} tells of"
            )
    return manifest


def _trained_sizes(plan: ExportPlan) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for weight in plan.weights:
        match weight.origin:
            case Trained(parameter):
                sizes[parameter] = prod(weight.shape)
            case Adapted():
                sizes |= {factor.parameter: prod(shape) for factor, shape in factors(weight)}
    return sizes


@contextmanager
def _arriving(folder: Path) -> Iterator[Path]:
    """Give a folder beside the final one, which takes its name if all goes well and is gone otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    arriving = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    arriving.mkdir()
    try:
        yield arriving
        arriving.rename(folder)
    finally:
        shutil.rmtree(arriving, ignore_errors=True)


def _write_around(store: ObjectStore, prefix: str, plan: ExportPlan, manifest: Manifest, folder: Path) -> None:
    """Write configuration, tokenizer and model card."""
    for file in plan.files:
        _fetch(store, prefix, file, folder)
    card = render_card(plan.lineage, generation=manifest.generation, step=manifest.position.step, scores=SCORES)
    (folder / "README.md").write_text(card)


def _fetch(store: ObjectStore, prefix: str, file: File, folder: Path) -> Path:
    uri, path = f"{prefix}/{file.key}", folder / file.name
    try:
        store.download_file(uri, path)
    except ObjectMissing:
        raise Damaged(f"{uri} is missing, which {export_plan.PLAN_KEY} names: restore it") from None
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
            raise Damaged(f"{uri} has other bytes than were written: restore it")
    return path


def _write_weights(store: ObjectStore, wish: Wish, plan: ExportPlan, manifest: Manifest, folder: Path) -> None:
    layout = lay_out(plan.weights, wish.largest_file_bytes)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, ExitStack() as open_files:
        places = _open_places(layout, folder, open_files)
        adapters = Adapters.create(Path(scratch) / "adapters", plan.weights, open_files)
        slots = {
            weight.origin.parameter: places[weight.name]
            for weight in plan.weights
            if isinstance(weight.origin, Trained)
        }
        with _untrained(store, wish, plan, Path(scratch), adapters) as untrained:
            fetch_trained(store, f"{wish.prefix}/{wish.kept.folder}", manifest, slots | adapters.slots)
            for weight in plan.weights:
                untrained.write(weight, places[weight.name])
    if len(layout) > 1:
        (folder / INDEX).write_bytes(index_of(layout, plan.weights))


@contextmanager
def _untrained(
    store: ObjectStore, wish: Wish, plan: ExportPlan, scratch: Path, adapters: Adapters
) -> Iterator[Untrained]:
    """Give what is not in the checkpoint, and afterwards see that the source is still the same."""
    uri = plan.lineage.model.uri
    names = {stem.file for weight in plan.weights if isinstance(stem := _stem(weight), Frozen)}
    files = {file.name: file for file in plan.source_files if file.name in names}
    constants = None if plan.constants is None else _fetch(store, wish.prefix, plan.constants, scratch)
    from_store = bool(files) and wish.model is None
    if from_store and not uri.startswith("s3://"):
        raise CannotTell(
            f"the result contains frozen weights of {uri}, which is not in S3: give a copy with --model FOLDER"
        )
    if from_store:
        source = stored_source(store, uri, files)
    else:
        source = local_source(wish.model, uri, files) if wish.model is not None else {}
    yield Untrained(source, None if constants is None else TensorFile(LocalBytes(constants)), adapters)
    if from_store:
        require_unchanged(store, uri, files)


def _stem(weight: Weight) -> Stem:
    return weight.origin.base if isinstance(weight.origin, Adapted) else weight.origin


def _open_places(layout: Sequence[WeightsFile], folder: Path, open_files: ExitStack) -> dict[str, Slot]:
    """Create the files with their headers, at their full size, and return where each weight goes."""
    places: dict[str, Slot] = {}
    for file in layout:
        stream = open_files.enter_context((folder / file.name).open("wb"))
        stream.write(file.header)
        stream.flush()
        stream.truncate(file.size_bytes)
        places |= {name: Slot(stream.fileno(), tensor.begin, tensor.dtype) for name, tensor in file.tensors.items()}
    return places
