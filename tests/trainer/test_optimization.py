"""The learning rate is a pure function of the step; decay spares vectors; the engine's settings follow from the recipe."""

from pathlib import Path

import pytest
import torch
from torch import nn

from finetune_api.recipe import Precision, Recipe
from finetune_trainer.optimization import (
    NotFinite,
    deepspeed_config,
    is_emulated,
    learning_rate,
    parameter_groups,
    require_finite,
)
from tests.trainer.recipes import classification

SCHEDULES = {
    "constant": ({"name": "Constant"}, [1.0, 1.0, 1.0, 1.0]),
    "constant after warm-up": ({"name": "Constant", "warmupSteps": 2}, [0.5, 1.0, 1.0, 1.0]),
    "linear": ({"name": "Linear"}, [1.0, 0.75, 0.5, 0.25]),
    "linear after warm-up by ratio": ({"name": "Linear", "warmupRatio": 0.5}, [0.5, 1.0, 1.0, 0.5]),
    "cosine": ({"name": "Cosine"}, [1.0, 0.853553, 0.5, 0.146447]),
    "warm-up alone": ({"name": "Cosine", "warmupSteps": 4}, [0.25, 0.5, 0.75, 1.0]),
    "warm-up longer than the run": ({"name": "Linear", "warmupSteps": 8}, [0.125, 0.25, 0.375, 0.5]),
}


@pytest.mark.parametrize(("schedule", "rates"), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_learning_rates_of_four_steps(schedule: dict[str, object], rates: list[float]) -> None:
    recipe = Recipe.model_validate(
        classification(Path("/d"), training={"optimizer": {"learningRate": 1.0}, "schedule": schedule})
    )
    assert [learning_rate(recipe, step, 4) for step in range(4)] == pytest.approx(rates, abs=1e-6)


def test_matrices_decay_and_vectors_and_frozen_weights_do_not() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model[0].weight.requires_grad_(False)
    matrices, vectors = parameter_groups(model, 0.1)
    assert (matrices["weight_decay"], [tuple(p.shape) for p in matrices["params"]]) == (0.1, [(4, 4)])
    assert (vectors["weight_decay"], [tuple(p.shape) for p in vectors["params"]]) == (0.0, [(4,)] * 3)


def test_a_group_without_parameters_is_left_out() -> None:
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


@pytest.mark.parametrize(
    ("zero", "precision", "expected"),
    [
        ({"stage": 0}, "FP32", {"gradient_clipping": 0.0, "zero_optimization": {"stage": 0}}),
        ({"stage": 0}, "BF16", {"gradient_clipping": 1.0, "zero_optimization": {"stage": 0}}),
        (
            {"stage": 3, "offload": {"optimizer": "CPU", "parameters": "CPU"}},
            "FP16",
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu"},
                    "offload_param": {"device": "cpu"},
                },
                "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
            },
        ),
    ],
)
def test_engine_settings(zero: dict[str, object], precision: str, expected: dict[str, object]) -> None:
    recipe = Recipe.model_validate(classification(Path("/d"), zero=zero, training={"precision": precision}))
    settings = deepspeed_config(recipe, micro_batch_size=2, rounds=3, ranks=2)
    assert {name: settings[name] for name in expected} == expected
    assert settings["train_batch_size"] == 12
    assert settings["optimizer"]["params"]["torch_adam"] is True


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_end_training(value: float) -> None:
    with pytest.raises(NotFinite, match=f"^the loss of step 7 is {value}$"):
        require_finite("loss", value, 7)
    require_finite("loss", float(torch.tensor(1.0)), 7)


@pytest.mark.parametrize(
    ("precision", "device", "native", "emulated"),
    [
        (Precision.BF16, "cpu", False, True),
        (Precision.BF16, "cpu", True, False),
        (Precision.FP32, "cpu", False, False),
        (Precision.BF16, "cuda", False, False),
    ],
)
def test_a_precision_that_the_processor_does_not_compute_is_known(
    precision: Precision, device: str, native: bool, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    assert is_emulated(precision, torch.device(device)) == emulated
