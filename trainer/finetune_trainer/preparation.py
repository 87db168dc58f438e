"""Everything that must be there before the first step: files, tokenizer, encoded data, model, engine.

What may fail on one rank alone is done under ``ranks``, so that all end together and say why (see ranks).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import HfDeepSpeedConfig

from finetune_api.recipe import Initialization, Recipe, TuningMethod
from finetune_trainer.checkpoint import trained_on
from finetune_trainer.checkpoint.lost_bucket import gone_is_lost
from finetune_trainer.checkpoint.trained_on import Group
from finetune_trainer.data.batches import BatchPlan, default_micro_batch_size
from finetune_trainer.data.encoded import open_encoded
from finetune_trainer.data.encoding import encode_data
from finetune_trainer.feed import Feed
from finetune_trainer.job import Job
from finetune_trainer.model_files import fetch_model, pin_model
from finetune_trainer.models import build_model, count_parameters, load_config, load_tokenizer
from finetune_trainer.object_store import ObjectStore, S3ObjectStore
from finetune_trainer.optimization import build_engine, deepspeed_config, require_precision
from finetune_trainer.ranks import Ranks
from finetune_trainer.scratch import discard_unfinished
from finetune_trainer.sources import Pinned, PinnedFile, fetch, pin_data
from finetune_trainer.tasks import Task, task_of
from finetune_trainer.tuning import tune


@dataclass(frozen=True, slots=True)
class Sources:
    """What the job reads, pinned."""

    model: Pinned
    train: Pinned
    evaluation: Pinned | None

    def versions(self, recipe: Recipe) -> trained_on.Sources:
        """Return what checkpoints say of it: whatever decides about samples and numbers, which an evaluation does not."""
        files: dict[str, list[PinnedFile]] = {Group.MODEL: [], Group.BASE: [], Group.TRAIN: [*self.train.files]}
        for file in self.model.files:
            is_frozen = recipe.tuning.method == TuningMethod.LORA and ".safetensors" in file.name  # or their index
            files[Group.BASE if is_frozen else Group.MODEL].append(file)
        return {group: {file.uri: file.lasting_version for file in found} for group, found in files.items() if found}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the loop works with. ``total_steps`` is of the whole run, whatever was done in earlier generations."""

    store: ObjectStore
    sources: Sources
    model_folder: Path
    task: Task
    tokenizer: Any
    config: Any
    train: Feed
    evaluation: Feed | None
    plan: BatchPlan
    total_steps: int
    engine: Any


def prepare(job: Job, ranks: Ranks, alive: Callable[[], None]) -> Prepared:
    """Prepare a run. Collective.

    Raises:
        TrainingError: what the user gave cannot be trained on; the same on all ranks.
    """
    recipe, task = job.recipe, task_of(job.recipe)
    ranks.together(lambda: require_precision(recipe.training.precision))
    ranks.once_per_node(lambda: discard_unfinished(job.scratch))
    store = S3ObjectStore(endpoint=job.storage.endpoint)
    with gone_is_lost(job.storage.prefix, has_checkpoint=job.has_checkpoint):  # data may lie in the same bucket
        sources = ranks.once(lambda: _pin(job, store))
    folder = ranks.once_per_node(lambda: fetch_model(sources.model, store, job.scratch))
    tokenizer = ranks.together(lambda: load_tokenizer(folder, sources.model.uri))
    config = ranks.together(
        lambda: load_config(folder, sources.model.uri, recipe=recipe, task=task, tokenizer=tokenizer)
    )

    def feed(data: Pinned) -> Feed:
        encoded = ranks.once_per_node(
            lambda: encode_data(
                data=data,
                model=sources.model,
                folder=fetch(data, store, job.scratch),
                columns=recipe.data.columns,
                task=task,
                tokenizer=tokenizer,
                scratch=job.scratch,
                alive=alive,
            )
        )
        return Feed(open_encoded(encoded), task, tokenizer.pad_token_id, ranks.device)

    train = feed(sources.train)
    evaluation = feed(sources.evaluation) if sources.evaluation is not None else None
    plan = _plan_batches(recipe, config, task, samples=len(train.data))
    engine = _build(job, ranks, folder=folder, uri=sources.model.uri, config=config, task=task, plan=plan)
    return Prepared(
        store=store,
        sources=sources,
        model_folder=folder,
        task=task,
        tokenizer=tokenizer,
        config=config,
        train=train,
        evaluation=evaluation,
        plan=plan,
        total_steps=plan.total_steps(recipe.training),
        engine=engine,
    )


def _pin(job: Job, store: ObjectStore) -> Sources:
    recipe = job.recipe
    with_weights = recipe.model.initialization == Initialization.PRETRAINED
    evaluation = recipe.data.evaluation
    return Sources(
        model=pin_model(recipe.model.source, store, job.claims, with_weights=with_weights),
        train=pin_data(recipe.data.train.source, store, job.claims),
        evaluation=None if evaluation is None else pin_data(evaluation.source, store, job.claims),
    )


def _plan_batches(recipe: Recipe, config: Any, task: Task, *, samples: int) -> BatchPlan:
    training = recipe.training
    size = training.micro_batch_size or default_micro_batch_size(
        count_parameters(config, task), training.global_batch_size
    )
    return BatchPlan(samples, training.global_batch_size, size, training.seed)


def _build(job: Job, ranks: Ranks, *, folder: Any, uri: str, config: Any, task: Task, plan: BatchPlan) -> Any:
    recipe = job.recipe
    settings = deepspeed_config(
        recipe, micro_batch_size=plan.micro_batch_size, rounds=plan.rounds(ranks.size), ranks=ranks.size
    )
    # transformers holds this by a weak reference: while it lives, from_pretrained shards as it loads.
    shards_as_it_loads = HfDeepSpeedConfig(settings) if recipe.zero.stage == 3 else None
    model = ranks.together(lambda: build_model(folder, uri, config=config, recipe=recipe, task=task))
    tuned = ranks.together(lambda: tune(model, recipe))
    del shards_as_it_loads
    with torch.random.fork_rng(devices=[]):
        return build_engine(tuned, recipe, settings)
