"""Hands out micro-batches of encoded examples, and the ignored ones that fill a short deal."""

from dataclasses import dataclass

import torch

from finetune_trainer.data.encoded import Encoded
from finetune_trainer.data.order import Indices
from finetune_trainer.tasks import Batch, Task


@dataclass(frozen=True, slots=True)
class Feed:
    """Encoded examples, and how this task and model want them; ``device`` is where they are to go."""

    data: Encoded
    task: Task
    padding_id: int
    device: torch.device

    def batch(self, indices: Indices | None) -> Batch:
        """Return the micro-batch of these examples in the host's memory, or for None one without a target.

        That is made of a whole example: some models look for the end-of-text token in each.
        """
        examples = [self.data[int(index)] for index in (indices if indices is not None else (0,))]
        return self.task.collate(examples, padding_id=self.padding_id, ignored=indices is None)
