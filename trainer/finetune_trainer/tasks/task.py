"""What the loop asks of a task, and what tasks share: padding to a length that depends on the micro-batch alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from finetune_api.recipe import MetricName
from finetune_trainer.data.encoded import Encoded, Example
from finetune_trainer.data.order import Indices
from finetune_trainer.data.records import Record

IGNORED = -100
"""The label that counts neither in a loss nor in a metric (PyTorch's own default)."""

PAD_TO_MULTIPLE = 8
"""Lengths are rounded up to this: tensor cores and vector units want it, and it bounds the number of different shapes."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: what the model is called with, and the labels its logits are held against."""

    inputs: Mapping[str, Any]
    labels: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        inputs = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in self.inputs.items()}
        return Batch(inputs, self.labels.to(device))


class Task(Protocol):
    """One thing to learn."""

    @property
    def model_class(self) -> Any:
        """The ``Auto`` class of transformers that builds the model."""

    @property
    def needs_labels(self) -> bool:
        """Whether a record has a label column."""

    @property
    def identity(self) -> str:
        """Everything that changes how a record is encoded, as text: part of the name under which the encoded data is kept."""

    def configure(self, config: Any, tokenizer: Any) -> None:
        """Set on the model's configuration what the task decides."""

    def encode(self, records: Iterator[Record], tokenizer: Any) -> Iterator[Example]:
        """Turn records into examples, or raise BadData."""

    def collate(self, examples: Sequence[Example], *, padding_id: int, ignored: bool = False) -> Batch:
        """Make a micro-batch; ``ignored`` ones have no target."""

    def count_targets(self, data: Encoded, indices: Indices) -> int:
        """Return how many targets these examples have, without reading them."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss summed over the targets of a micro-batch."""

    def predict(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the model predicts and the targets it is held against, as metrics take them."""

    def metric(self, name: MetricName, *, vocabulary: int) -> Any | None:
        """Return the torchmetrics metric over predictions and targets; None for one that follows from the loss."""


def pad(rows: Sequence[np.ndarray[Any, np.dtype[np.int32]]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as one int64 matrix filled up with ``value``, and the matrix of ones where the rows are."""
    longest = max(len(row) for row in rows)
    width = -(-longest // PAD_TO_MULTIPLE) * PAD_TO_MULTIPLE
    tokens = torch.full((len(rows), width), value, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for at, row in enumerate(rows):
        tokens[at, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[at, : len(row)] = 1
    return tokens, mask
