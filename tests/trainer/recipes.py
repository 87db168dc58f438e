"""Recipes for tiny models: a base, and what a case changes of it."""

from pathlib import Path
from typing import Any

from tests.trainer.sentences import LABELS

STEPS = 12


def classification(files: Path, *, model: str = "bert", **changes: Any) -> dict[str, Any]:
    """A recipe as YAML would say it; ``training={…}`` and the like are laid over the base, one level deep."""
    recipe = {
        "model": {"source": f"file://{files}/{model}"},
        "task": {"type": "SequenceClassification", "labels": list(LABELS)},
        "data": {
            "train": {"source": f"file://{files}/train.jsonl"},
            "evaluation": {"source": f"file://{files}/evaluation.jsonl"},
            "maxTokens": 32,
        },
        "training": {
            "steps": STEPS,
            "globalBatchSize": 12,
            "microBatchSize": 2,
            "precision": "FP32",
            "optimizer": {"learningRate": 5.0e-3, "weightDecay": 0.01},
            "schedule": {"name": "Linear", "warmupSteps": 2},
        },
        "evaluation": {"metrics": ["Accuracy", "MacroF1"]},
        "zero": {"stage": 2},
    }
    return _changed(recipe, changes)


def language_modelling(files: Path, *, model: str = "llama", **changes: Any) -> dict[str, Any]:
    recipe = {
        "model": {"source": f"file://{files}/{model}"},
        "task": {"type": "CausalLM"},
        "data": {
            "train": {"source": f"file://{files}/texts.jsonl"},
            "evaluation": {"source": f"file://{files}/other-texts.jsonl"},
            "maxTokens": 16,
        },
        "training": {
            "steps": STEPS,
            "globalBatchSize": 8,
            "microBatchSize": 4,
            "precision": "FP32",
            "optimizer": {"learningRate": 1.0e-2},
        },
        "evaluation": {"metrics": ["Accuracy", "Perplexity"]},
        "zero": {"stage": 2},
    }
    return _changed(recipe, changes)


def _changed(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    if "evaluation" in changes and changes["evaluation"] is None:
        del recipe["data"]["evaluation"]
    for section, change in changes.items():
        if change is None:
            del recipe[section]
        elif section in recipe:
            merged = recipe[section] | change
            recipe[section] = {name: value for name, value in merged.items() if value is not None}
        else:
            recipe[section] = change
    return recipe
