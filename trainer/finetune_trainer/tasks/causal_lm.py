"""Causal language modelling: predict each next token, for fine-tuning on text and for pretraining from scratch.

Texts are tokenised, an end-of-text token follows each, and a beginning-of-text token comes before it if the tokenizer puts one before every
text. The stream is cut into blocks of ``max_tokens``, so that no position is padding but in the last block. The first token of a block
predicts and is not predicted: a block of n tokens has n - 1 targets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from finetune_api.recipe import MetricName
from finetune_trainer.data.encoded import Encoded, Example
from finetune_trainer.data.order import Indices
from finetune_trainer.data.records import Record
from finetune_trainer.errors import BadConfig
from finetune_trainer.tasks.task import IGNORED, Batch, pad

ENCODED_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class CausalLanguageModelling:
    """Blocks of ``max_tokens`` out of all texts joined."""

    max_tokens: int

    @property
    def model_class(self) -> Any:
        """The model: a decoder with a language-modelling head."""
        return AutoModelForCausalLM

    @property
    def needs_labels(self) -> bool:
        """The text is its own label."""
        return False

    @property
    def identity(self) -> str:
        """The block length decides how text is encoded."""
        return f"CausalLM {self.max_tokens}"

    def configure(self, config: Any, tokenizer: Any) -> None:
        """Nothing to decide: the configuration is the model's own."""

    def encode(self, records: Iterator[Record], tokenizer: Any) -> Iterator[Example]:
        """Join all texts and yield them block by block; a last block of one token has no target and is dropped."""
        if tokenizer.eos_token_id is None:
            raise BadConfig(
                "the model's tokenizer has no end-of-text token (eos_token), which CausalLM puts between texts"
            )
        begins, stream = _beginning(tokenizer), list[int]()
        while batch := list(islice(records, ENCODED_AT_ONCE)):
            for row in tokenizer([record.text for record in batch], add_special_tokens=False)["input_ids"]:
                stream += [*begins, *row, tokenizer.eos_token_id]
            whole = len(stream) - len(stream) % self.max_tokens
            for start in range(0, whole, self.max_tokens):
                yield _block(stream[start : start + self.max_tokens])
            del stream[:whole]
        if len(stream) >= 2:
            yield _block(stream)

    def collate(self, examples: Sequence[Example], *, padding_id: int, ignored: bool = False) -> Batch:
        """Stack blocks; the last one of a file may need padding, which is no target."""
        tokens, mask = pad([example.tokens for example in examples], padding_id)
        labels = tokens.masked_fill(mask == 0, IGNORED)
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
        inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        return Batch(inputs, labels.fill_(IGNORED) if ignored else labels)

    def count_targets(self, data: Encoded, indices: Indices) -> int:
        """Every token but the first of its block."""
        return int((data.lengths(indices) - 1).sum())

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in single precision; logits are (blocks, positions, vocabulary), labels already shifted."""
        return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def predict(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest token at each position."""
        return logits.argmax(dim=-1).flatten(), labels.flatten()

    def metric(self, name: MetricName, *, vocabulary: int) -> Any | None:
        """Accuracy of the next token; perplexity follows from the loss."""
        if name == MetricName.PERPLEXITY:
            return None
        from torchmetrics.classification import MulticlassAccuracy  # 3 s of imports that only an evaluation needs

        return MulticlassAccuracy(num_classes=vocabulary, average="micro", ignore_index=IGNORED, validate_args=False)


def _beginning(tokenizer: Any) -> list[int]:
    """Return the beginning-of-text token if the tokenizer puts it before every text: the model will be used with it."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _block(tokens: list[int]) -> Example:
    return Example(np.asarray(tokens, dtype=np.int32))
