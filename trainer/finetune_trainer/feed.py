"""Hands out micro-batches of encoded examples on the device, and the ignored ones that fill a short deal."""

from dataclasses import dataclass

import torch

from finetune_trainer.data.encoded import Encoded, Example
from finetune_trainer.data.order import Indices
from finetune_trainer.tasks import Batch, Task


@dataclass(frozen=True, slots=True)
class Feed:
    """Encoded examples, and how this task and model want them."""

    data: Encoded
    task: Task
    padding_id: int
    device: torch.device

    def batch(self, indices: Indices | None) -> Batch:
        """Return the micro-batch of these examples, or for None the smallest one without a target."""
        if indices is None:
            first = self.data[0]
            stub = Example(first.tokens[:2], first.label)
            return self.task.collate([stub], padding_id=self.padding_id, ignored=True).to(self.device)
        examples = [self.data[int(index)] for index in indices]
        return self.task.collate(examples, padding_id=self.padding_id).to(self.device)
