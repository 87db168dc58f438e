"""Brings what a checkpoint does not hold to its place: frozen weights, constants, and weights that adapters are added into.

All of it in blocks, several at a time. An adapter's two matrices are whole while the weight that they belong to is written; until then
they wait in a file, rounded to the format that the job used them in.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

from finetune_cli.checkpoints.chunks import side_by_side
from finetune_cli.checkpoints.frozen import TensorFile
from finetune_cli.checkpoints.trained import Slot, write_at
from finetune_trainer.adapters import add_adapter
from finetune_trainer.export_plan import Adapted, Constant, Factor, Frozen, Stem, Trained, Weight
from finetune_trainer.rounding import ITEM_BYTES, Floats, rounded, widen

BLOCK_NUMBERS = 2**21
"""How many numbers of a weight one block has."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """The matrices of all adapters in one file."""

    path: Path
    slots: dict[str, Slot]

    @classmethod
    def create(cls, path: Path, weights: Sequence[Weight], open_files: ExitStack) -> "Adapters":
        """Create the file, which stays open as long as ``open_files``."""
        stream, slots, end = open_files.enter_context(path.open("wb")), {}, 0
        for weight in weights:
            for factor, (rows, columns) in factors(weight):
                slots[factor.parameter] = Slot(stream.fileno(), end, factor.dtype)
                end += rows * columns * ITEM_BYTES[factor.dtype]
        stream.truncate(end)
        return cls(path, slots)

    def read(self, factor: Factor, shape: tuple[int, int]) -> Floats:
        """Return one of the matrices."""
        with self.path.open("rb") as stream:
            stream.seek(self.slots[factor.parameter].begin)
            return widen(stream.read(prod(shape) * ITEM_BYTES[factor.dtype]), factor.dtype).reshape(shape)


def factors(weight: Weight) -> Iterator[tuple[Factor, tuple[int, int]]]:
    """Yield A, then B, of the adapter of a weight that has one, with their shapes: (rank, inputs), (outputs, rank)."""
    if isinstance(weight.origin, Adapted):
        adapted = weight.origin
        rows, columns = weight.shape
        outputs, inputs = (columns, rows) if adapted.transposed else (rows, columns)
        yield adapted.a, (adapted.rank, inputs)
        yield adapted.b, (outputs, adapted.rank)


@dataclass(frozen=True, slots=True)
class Untrained:
    """Where the numbers come from: files of the model's source, and the plan's constants."""

    source: Mapping[str, TensorFile]
    constants: TensorFile | None
    adapters: Adapters

    def write(self, weight: Weight, place: Slot) -> None:
        """Write a weight, or nothing for one that was trained whole."""
        match weight.origin:
            case Adapted() as adapted:
                self._write_adapted(weight, adapted, place)
            case Frozen() | Constant() as stem:
                self._copy(weight, stem, place)

    def _copy(self, weight: Weight, stem: Stem, place: Slot) -> None:
        count, item = prod(weight.shape), ITEM_BYTES[weight.dtype]

        def copy(first: int) -> None:
            numbers = self._numbers(weight, stem, first, min(BLOCK_NUMBERS, count - first))
            write_at(place.descriptor, numbers, place.begin + first * item)

        side_by_side(copy, range(0, count, BLOCK_NUMBERS))

    def _write_adapted(self, weight: Weight, adapted: Adapted, place: Slot) -> None:
        a, b = (self.adapters.read(factor, shape) for factor, shape in factors(weight))
        left, right = (a.T, b.T) if adapted.transposed else (b, a)
        rows, columns = weight.shape
        step, item = max(1, BLOCK_NUMBERS // columns), ITEM_BYTES[weight.dtype]

        def add(first: int) -> None:
            count = min(step, rows - first)
            numbers = self._numbers(weight, adapted.base, first * columns, count * columns)
            base = widen(numbers, weight.dtype).reshape(count, columns)
            total = add_adapter(base, left[first : first + count], right, adapted.scaling, threads=1)
            write_at(
                place.descriptor, rounded(total, weight.dtype).data.cast("B"), place.begin + first * columns * item
            )

        side_by_side(add, range(0, rows, step))

    def _numbers(self, weight: Weight, stem: Stem, first: int, count: int) -> bytes | memoryview:
        match stem:
            case Frozen(file, tensor):
                return self.source[file].numbers(tensor, weight, first, count)
            case Constant(tensor):
                assert self.constants is not None
                return self.constants.numbers(tensor, weight, first, count)
            case Trained():
                raise AssertionError(f"{weight.name}: an adapter on a trained weight")
