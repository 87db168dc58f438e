"""The README.md of a result: what it scored and what it was made of, so that it can be traced and made again."""

import json
from importlib.resources import files
from string import Template

from finetune_api.protocol import Metric
from finetune_api.recipe import TaskType
from finetune_trainer.job import Job
from finetune_trainer.sources import Pinned

PIPELINE_TAGS = {TaskType.SEQUENCE_CLASSIFICATION: "text-classification", TaskType.CAUSAL_LM: "text-generation"}


def render_model_card(
    job: Job,
    *,
    model: Pinned,
    train: Pinned,
    evaluation: Pinned | None,
    metrics: list[Metric],
    step: int,
    total_steps: int,
) -> str:
    """Return the model card in Markdown."""
    recipe = job.recipe
    template = Template((files("finetune_trainer") / "model_card.md").read_text())
    return template.substitute(
        base_model=json.dumps(model.uri),
        pipeline_tag=PIPELINE_TAGS[recipe.task.type],
        name=job.file.name,
        namespace=job.file.namespace,
        uid=job.file.uid,
        generation=job.generation,
        method=recipe.tuning.method.value,
        precision=recipe.training.precision.value,
        evaluation=_metrics_table(metrics),
        step=step,
        total_steps=total_steps,
        global_batch_size=recipe.training.global_batch_size,
        recipe_digest=job.recipe_digest,
        model_source=model.uri,
        model_version=model.version,
        train_source=train.uri,
        train_version=train.version,
        evaluation_source="none" if evaluation is None else f"`{evaluation.uri}`, version `{evaluation.version}`",
        recipe=json.dumps(recipe.to_wire(), indent=2),
    )


def _metrics_table(metrics: list[Metric]) -> str:
    if not metrics:
        return "The recipe has no evaluation data."
    return "\n".join(["| Metric | Value |", "|---|---|", *(f"| {m.name} | {m.value:.6g} |" for m in metrics)])
