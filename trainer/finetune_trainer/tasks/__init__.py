"""What models can learn to do. A task says which model class, how text becomes examples and batches, which loss, which metrics."""

from finetune_api.recipe import Recipe, TaskType
from finetune_trainer.tasks.causal_lm import CausalLanguageModelling
from finetune_trainer.tasks.sequence_classification import SequenceClassification
from finetune_trainer.tasks.task import Batch, Task

__all__ = ["Batch", "Task", "task_of"]


def task_of(recipe: Recipe) -> Task:
    """Return the task that a recipe names."""
    if recipe.task.type == TaskType.SEQUENCE_CLASSIFICATION:
        return SequenceClassification(labels=tuple(recipe.task.labels or ()), max_tokens=recipe.data.max_tokens)
    return CausalLanguageModelling(max_tokens=recipe.data.max_tokens)
