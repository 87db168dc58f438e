"""Which weights are trained: all, or low-rank adapters (LoRA) beside frozen ones.

LoRA adapts every linear module but the head unless the recipe names others. A classification head is new and is trained in full;
a language-modelling head stays as it is. At the end adapters are added into the weights (see export), so the result needs no peft.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune_api.recipe import Recipe, TaskType, Tuning, TuningMethod
from finetune_trainer.data.batches import random_seed
from finetune_trainer.errors import BadConfig
from finetune_trainer.models import head_names


def tune(model: PreTrainedModel, recipe: Recipe) -> nn.Module:
    """Return the model with the weights to train left trainable.

    Raises:
        BadConfig: ``tuning.targets`` names no linear module.
    """
    if recipe.tuning.method == TuningMethod.FULL:
        return model  # type: ignore[no-any-return]
    heads = head_names(model)
    trained_in_full = heads if recipe.task.type == TaskType.SEQUENCE_CLASSIFICATION else []
    torch.manual_seed(random_seed("adapters", recipe.training.seed))
    from peft import get_peft_model  # a second of imports that only LoRA needs

    config = _lora_config(recipe.tuning, _targets(model, recipe.tuning, heads), trained_in_full)
    # Adapters in the model's own precision: peft would make them FP32, and ZeRO-3 refuses to train two precisions at once.
    return get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[no-any-return]


def _lora_config(tuning: Tuning, targets: list[str], trained_in_full: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha if tuning.alpha is not None else tuning.rank,
        lora_dropout=tuning.dropout or 0.0,
        target_modules=targets,
        modules_to_save=trained_in_full or None,
    )


def _targets(model: PreTrainedModel, tuning: Tuning, heads: list[str]) -> list[str]:
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.split(".")[0] not in heads
    ]
    if tuning.targets is None:
        return linear
    for target in tuning.targets:
        if not any(_is_named(name, target) for name in linear):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise BadConfig(f"recipe.tuning.targets: no linear module is named {target!r}; the model has {known}")
    return [name for name in linear if any(_is_named(name, target) for target in tuning.targets)]


def _is_named(name: str, target: str) -> bool:
    """Whether a module's full name is, or ends with, the name in the recipe."""
    return name == target or name.endswith(f".{target}")
