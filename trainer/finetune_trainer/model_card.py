"""The README.md of a result: what it scored and what it was made of, so that it can be traced and made again."""

import json
from dataclasses import dataclass
from importlib.resources import files
from string import Template

from finetune_api.protocol import Metric
from finetune_api.recipe import Recipe, TaskType
from finetune_trainer.job import Job
from finetune_trainer.sources import Pinned

PIPELINE_TAGS = {TaskType.SEQUENCE_CLASSIFICATION: "text-classification", TaskType.CAUSAL_LM: "text-generation"}


@dataclass(frozen=True, slots=True)
class Source:
    """Where something came from, and in which version."""

    uri: str
    version: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """What a model was made of and by which job: all that is known of it before the first step."""

    namespace: str
    name: str
    uid: str
    recipe: Recipe
    recipe_digest: str
    total_steps: int
    model: Source
    train: Source
    evaluation: Source | None


def lineage_of(job: Job, *, model: Pinned, train: Pinned, evaluation: Pinned | None, total_steps: int) -> Lineage:
    """Return the lineage of what a job makes of pinned sources."""
    return Lineage(
        namespace=job.file.namespace,
        name=job.file.name,
        uid=job.file.uid,
        recipe=job.recipe,
        recipe_digest=job.recipe_digest,
        total_steps=total_steps,
        model=Source(model.uri, model.version),
        train=Source(train.uri, train.version),
        evaluation=None if evaluation is None else Source(evaluation.uri, evaluation.version),
    )


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
    """Return the model card of a job's result in Markdown."""
    lineage = lineage_of(job, model=model, train=train, evaluation=evaluation, total_steps=total_steps)
    return render_card(lineage, generation=job.generation, step=step, scores=_metrics_table(metrics))


def render_card(lineage: Lineage, *, generation: int, step: int, scores: str) -> str:
    """Return a model card in Markdown; ``scores`` is what stands under Evaluation."""
    recipe, evaluation = lineage.recipe, lineage.evaluation
    template = Template((files("finetune_trainer") / "model_card.md").read_text())
    return template.substitute(
        base_model=json.dumps(lineage.model.uri),
        pipeline_tag=PIPELINE_TAGS[recipe.task.type],
        name=lineage.name,
        namespace=lineage.namespace,
        uid=lineage.uid,
        generation=generation,
        method=recipe.tuning.method.value,
        precision=recipe.training.precision.value,
        evaluation=scores,
        step=step,
        total_steps=lineage.total_steps,
        global_batch_size=recipe.training.global_batch_size,
        recipe_digest=lineage.recipe_digest,
        model_source=lineage.model.uri,
        model_version=lineage.model.version,
        train_source=lineage.train.uri,
        train_version=lineage.train.version,
        evaluation_source="none" if evaluation is None else f"`{evaluation.uri}`, version `{evaluation.version}`",
        recipe=json.dumps(recipe.to_wire(), indent=2),
    )


def _metrics_table(metrics: list[Metric]) -> str:
    if not metrics:
        return "The recipe has no evaluation data."
    return "\n".join(["| Metric | Value |", "|---|---|", *(f"| {m.name} | {m.value:.6g} |" for m in metrics)])
