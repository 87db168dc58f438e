"""A gradient that is not finite is told at every stage, also where DeepSpeed would only step over it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from finetune_api.recipe import Recipe
from finetune_trainer.optimization import NotFinite, accumulate, build_engine, deepspeed_config, update
from tests.trainer.recipes import classification


@pytest.mark.parametrize("precision", ["FP32", "BF16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_finite_loss_with_a_gradient_that_is_not(stage: int, precision: str, alone: None) -> None:
    changes = {"training": {"precision": precision}, "zero": {"stage": stage}}
    recipe = Recipe.model_validate(classification(Path("/d"), **changes))
    config = deepspeed_config(recipe, micro_batch_size=12, rounds=1, ranks=1)
    engine = build_engine(nn.Linear(4, 4), recipe, config)
    inputs = torch.ones(12, 4, dtype=next(engine.module.parameters()).dtype)

    accumulate(engine, engine(inputs).float().square().sum(), targets=12, ranks=1)
    assert update(engine, recipe, 1e-3, 1).gradient_norm > 0

    loss = (engine(inputs).float() * 0).sum().sqrt()
    assert float(loss) == 0.0
    accumulate(engine, loss, targets=12, ranks=1)
    with pytest.raises(NotFinite, match=r"^the gradient .*of step 2 is "):
        update(engine, recipe, 1e-3, 2)
