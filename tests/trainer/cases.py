"""The jobs that tests look at, by number of ranks. Their folders' names give the order in which they train."""

from pathlib import Path
from typing import Any

from finetune_trainer.train import ROLLBACKS_LIMIT
from tests.trainer.launch import Case
from tests.trainer.recipes import classification, language_modelling

LORA = {"method": "LoRA", "rank": 4, "alpha": 8, "dropout": 0.1}
BUCKET = "s3://jobs"
"""The bucket of the launches of conftest.py."""
EVERY_SIX = {"metrics": ["Accuracy", "MacroF1"], "everySteps": 6}


def zero(stage: int, **offload: str) -> dict[str, Any]:
    return {"stage": stage, "offload": offload} if offload else {"stage": stage}


def stages(files: Path) -> dict[str, Case]:
    """The same job, with dropout, on each ZeRO stage."""
    return {f"zero-{stage}": Case(classification(files, zero=zero(stage))) for stage in range(4)}


def cases_of_one_rank(files: Path) -> dict[str, Case]:
    return {
        **stages(files),
        "uninterrupted": Case(classification(files, evaluation=EVERY_SIX), checkpoint={"intervalSteps": 4}),
        "long": Case(classification(files, training={"steps": 300, "optimizer": {"learningRate": 2.0e-3}})),
        "gradient-checkpointing": Case(classification(files, training={"gradientCheckpointing": True})),
        "micro-batches-of-6": Case(classification(files, training={"microBatchSize": 6})),
        "bf16": Case(classification(files, training={"precision": "BF16"})),
        "bf16-zero-0": Case(classification(files, training={"precision": "BF16"}, zero=zero(0))),
        "fp16": Case(classification(files, training={"precision": "FP16"})),
        "fp16-zero-0": Case(classification(files, training={"precision": "FP16"}, zero=zero(0))),
        **{
            f"not-a-number-{generation}": Case(
                classification(files, model="bert-overflowing"), prefix="not-a-number", generation=generation
            )
            for generation in range(1, ROLLBACKS_LIMIT + 2)
        },
        **poisoned(files, "poisoned"),
        **spiked(files, "spiked", generations=2),
        **spiked(files, "spiked-ignored", generations=1, onLossSpike="Ignore"),
        "not-a-number-fp16": Case(
            classification(files, model="bert-overflowing", training={"precision": "FP16", "steps": 40})
        ),
        "lora": Case(classification(files, tuning=LORA)),
        "pretraining": Case(
            language_modelling(files, model="llama-config", training={"steps": 60}) | from_scratch(files)
        ),
        "language-model": Case(language_modelling(files)),
        "language-model-lora": Case(language_modelling(files, tuning=LORA)),
        "emptied": Case(classification(files), generation=2, has_checkpoint=True),
        **gone(files),
        **changed_data(files),
        **changed_base(files),
        "one-epoch": Case(
            classification(files, training={"epochs": 1, "steps": None, "microBatchSize": None}, evaluation=None)
        ),
    }


def poisoned(files: Path, prefix: str) -> dict[str, Case]:
    """Two generations of a job, one sample of which makes no finite number."""
    recipe = classification(
        files, model="bert-poisoned", data={"train": {"source": f"file://{files}/train-poisoned.jsonl"}}
    )
    return {
        f"{prefix}-{generation}": Case(recipe, prefix=prefix, generation=generation, checkpoint={"intervalSteps": 3})
        for generation in (1, 2)
    }


def gone(files: Path) -> dict[str, Case]:
    """Two jobs that were stopped after three steps: of one the whole bucket is deleted then, of the other all below HEAD."""
    recipe, later = classification(files), {"generation": 2, "has_checkpoint": True}
    return {
        "gone-bucket-1": Case(
            recipe, bucket="s3://gone", prefix="job", stop_at_look=4, before=(("makes_bucket", "gone"),)
        ),
        "gone-bucket-2": Case(recipe, bucket="s3://gone", prefix="job", before=(("deletes_bucket", "gone"),), **later),
        "gone-objects-1": Case(recipe, prefix="gone-objects", stop_at_look=4),
        "gone-objects-2": Case(
            recipe,
            prefix="gone-objects",
            before=(("replaces_pod",), ("empties", f"{BUCKET}/gone-objects/checkpoints/")),
            **later,
        ),
    }


def changed_data(files: Path) -> dict[str, Case]:
    """A job whose data is written anew before each generation: the same twice, then other."""
    uri = f"{BUCKET}/sources/train.jsonl"
    recipe = classification(files, data={"train": {"source": uri}})
    texts = ["train.jsonl", "train.jsonl", "evaluation.jsonl"]
    return {
        f"changed-data-{number}": Case(
            recipe,
            prefix="changed-data",
            generation=number,
            stop_at_look=3,
            before=(("puts", f"{files}/{text}", uri),),
        )
        for number, text in enumerate(texts, start=1)
    }


def changed_base(files: Path) -> dict[str, Case]:
    """A job of adapters, in another pod each time, whose frozen weights are others in the end."""
    uri = f"{BUCKET}/sources/bert"
    recipe = classification(files, tuning=LORA, model="bert") | {"model": {"source": uri}}
    return {
        f"changed-base-{number}": Case(
            recipe,
            prefix="changed-base",
            generation=number,
            stop_at_look=3,
            before=(("replaces_pod",), ("puts", f"{files}/{model}", uri)),
        )
        for number, model in enumerate(["bert", "bert", "bert-poisoned"], start=1)
    }


def spiked(files: Path, prefix: str, *, generations: int, **training: Any) -> dict[str, Case]:
    """Generations of a job whose labels are all the same, but for one step's samples."""
    data = {"train": {"source": f"file://{files}/train-spiked.jsonl"}}
    recipe = classification(files, data=data, training={"steps": 24, **training})
    return {
        f"{prefix}-{generation}": Case(recipe, prefix=prefix, generation=generation, checkpoint={"intervalSteps": 3})
        for generation in range(1, generations + 1)
    }


def from_scratch(files: Path) -> dict[str, Any]:
    return {"model": {"source": f"file://{files}/llama-config", "initialization": "Random"}}


def cases_of_two_ranks(files: Path) -> dict[str, Case]:
    interrupted = classification(files, evaluation=EVERY_SIX)
    return {
        **stages(files),
        "interrupted-1": Case(interrupted, prefix="interrupted", stop_at_look=6),
        "interrupted-0-at-start": Case(interrupted, prefix="interrupted-0-at-start", stop_at_look=1),
        "interrupted-2": Case(interrupted, prefix="interrupted", generation=2),
        "interrupted-3-is-finished": Case(interrupted, prefix="interrupted", generation=3),
        "interrupted-4-is-stale": Case(interrupted, prefix="interrupted", generation=2),
        **poisoned(files, "poisoned-on-two"),
        "resized-1": Case(classification(files), prefix="resized", stop_at_look=8),
        "lora-zero-3": Case(classification(files, tuning=LORA, zero=zero(3))),
        "bf16-zero-3": Case(classification(files, training={"precision": "BF16"}, zero=zero(3))),
        "offload-zero-2": Case(classification(files, zero=zero(2, optimizer="CPU"))),
        "offload-zero-3": Case(classification(files, zero=zero(3, optimizer="CPU", parameters="CPU"))),
        "pretraining-zero-3": Case(
            language_modelling(files, training={"steps": 60}, zero=zero(3)) | from_scratch(files)
        ),
        "bad-data": Case(classification(files, data={"columns": {"text": "sentence"}})),
    }


def cases_of_three_ranks(files: Path) -> dict[str, Case]:
    return {
        "zero-2": Case(classification(files)),
        "zero-3": Case(classification(files, zero=zero(3))),
        "resized-2": Case(classification(files), prefix="resized", generation=2),
        "micro-batches-of-6": Case(classification(files, training={"microBatchSize": 6})),
    }
