"""Sequence classification: one of the recipe's labels for each text. One target per example."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from finetune_api.recipe import MetricName
from finetune_trainer.data.encoded import Encoded, Example
from finetune_trainer.data.order import Indices
from finetune_trainer.data.records import Record, quote
from finetune_trainer.errors import BadData
from finetune_trainer.tasks.task import IGNORED, Batch, pad

ENCODED_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class SequenceClassification:
    """Texts are truncated to ``max_tokens``; ``labels`` are in the order of their ids."""

    labels: tuple[str, ...]
    max_tokens: int

    @property
    def model_class(self) -> Any:
        """The model: an encoder or decoder with a classification head."""
        return AutoModelForSequenceClassification

    @property
    def needs_labels(self) -> bool:
        """Every record has a label."""
        return True

    @property
    def identity(self) -> str:
        """Labels and length decide how a record is encoded."""
        return f"SequenceClassification {list(self.labels)} {self.max_tokens}"

    def configure(self, config: Any, tokenizer: Any) -> None:
        """Tell the model its classes, and where a padded text ends (decoders classify its last token)."""
        config.num_labels = len(self.labels)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: index for index, label in enumerate(self.labels)}
        config.problem_type = "single_label_classification"
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id

    def encode(self, records: Iterator[Record], tokenizer: Any) -> Iterator[Example]:
        """Encode each text with the tokenizer's special tokens, and its label as a number."""
        ids = {label: index for index, label in enumerate(self.labels)}
        while batch := list(islice(records, ENCODED_AT_ONCE)):
            labels = [self._label_id(record, ids) for record in batch]
            texts = [record.text for record in batch]
            rows = tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
            for row, label, record in zip(rows, labels, batch, strict=True):
                if not row:
                    raise BadData(f"{record.where}: the tokenizer makes no token of this text: {quote(record.text)}")
                yield Example(np.asarray(row, dtype=np.int32), label)

    def _label_id(self, record: Record, ids: dict[str, int]) -> int:
        assert record.label is not None
        if record.label not in ids:
            allowed = ", ".join(quote(label) for label in self.labels[:20]) + (", …" if len(self.labels) > 20 else "")
            raise BadData(f"{record.where}: label {quote(record.label)} is not one of task.labels: {allowed}")
        return ids[record.label]

    def collate(self, examples: Sequence[Example], *, padding_id: int, ignored: bool = False) -> Batch:
        """Pad the texts of a micro-batch to its longest."""
        tokens, mask = pad([example.tokens for example in examples], padding_id)
        labels = torch.tensor([IGNORED if ignored else example.label for example in examples], dtype=torch.int64)
        return Batch({"input_ids": tokens, "attention_mask": mask}, labels)

    def count_targets(self, data: Encoded, indices: Indices) -> int:  # noqa: ARG002  of other tasks the data decides
        """One target per example."""
        return len(indices)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in single precision; logits are (examples, classes)."""
        return cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")

    def predict(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest class of each example."""
        return logits.argmax(dim=-1), labels

    def metric(self, name: MetricName, *, vocabulary: int) -> Any | None:  # noqa: ARG002
        """Accuracy over all examples, or F1 averaged over the classes that occur."""
        from torchmetrics.classification import (  # 3 s of imports that only an evaluation needs
            MulticlassAccuracy,
            MulticlassF1Score,
        )

        classes = len(self.labels)
        if name == MetricName.MACRO_F1:
            return MulticlassF1Score(num_classes=classes, average="macro", ignore_index=IGNORED, validate_args=False)
        return MulticlassAccuracy(num_classes=classes, average="micro", ignore_index=IGNORED, validate_args=False)
