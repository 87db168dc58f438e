"""The DeepSpeed engine, the learning rate, and one optimizer step.

The learning rate is a pure function of the step and is written into the optimizer before each step: there is no scheduler whose state could
be saved, restored or forgotten.

Gradients are accumulated as sums over targets divided by the number of targets in the whole global batch, counted beforehand. DeepSpeed
averages over ranks, hence the factor of the world size; its own division by the number of accumulation rounds is turned off. So every
target weighs the same, whichever micro-batch and rank it falls to (the usual mean of means was 44 % off on uneven text).

ZeRO stage 0 in FP32 is a plain optimizer and DeepSpeed tells no gradient norm for it, so at stage 0 we measure (and in FP32 clip) ourselves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from finetune_api.recipe import OffloadTarget, Precision, Recipe, Schedule, ScheduleName
from finetune_trainer.errors import BadConfig, NumericFailure

OVERFLOWS_LIMIT = 16
"""FP16: after so many skipped steps in a row no loss scale will help: it starts at 2**16 and is halved by each."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did. ``skipped``: FP16 overflowed, the loss scale was lowered and the weights left alone."""

    gradient_norm: float
    skipped: bool


def deepspeed_config(recipe: Recipe, *, micro_batch_size: int, rounds: int, ranks: int) -> dict[str, Any]:
    """Return the configuration of the engine."""
    training, stage = recipe.training, recipe.zero.stage
    clips_itself = stage == 0 and training.precision == Precision.FP32
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": rounds,
        "train_batch_size": micro_batch_size * rounds * ranks,
        "gradient_clipping": 0.0 if clips_itself else training.max_gradient_norm,
        "optimizer": _optimizer(recipe),
        "zero_optimization": _zero(recipe),
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": training.precision == Precision.BF16},
        "fp16": {"enabled": training.precision == Precision.FP16, "loss_scale": 0, "initial_scale_power": 16},
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


def require_precision(precision: Precision) -> None:
    """Refuse a precision that the device cannot compute in.

    Raises:
        BadConfig: use another.
    """
    if precision == Precision.FP16 and not get_accelerator().is_fp16_supported():
        raise BadConfig("recipe.training.precision: FP16 is not supported by this pod's device; use BF16 or FP32")


def is_emulated(precision: Precision, device: torch.device) -> bool:
    """Tell whether a device computes in a precision only by way of another one, twenty times as slowly or worse."""
    return (
        device.type == "cpu" and precision == Precision.BF16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001  no other way to ask
    )


def build_engine(model: nn.Module, recipe: Recipe, config: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine around the model."""
    groups = parameter_groups(model, recipe.training.optimizer.weight_decay)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    return engine


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: matrices decay; biases and normalisation weights (vectors) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if _dimensions(parameter) > 1]
    vectors = [parameter for parameter in trained if _dimensions(parameter) <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """Return the learning rate of the step that follows ``step`` finished ones."""
    schedule, peak = recipe.training.schedule, recipe.training.optimizer.learning_rate
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    match schedule.name:
        case ScheduleName.CONSTANT:
            return peak
        case ScheduleName.LINEAR:
            return peak * (1 - share)
        case ScheduleName.COSINE:
            return peak * 0.5 * (1 + math.cos(math.pi * share))


def warmup_steps(schedule: Schedule, total_steps: int) -> int:
    """Return the number of steps of warm-up."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return math.ceil((schedule.warmup_ratio or 0.0) * total_steps)


class NotFinite(Exception):
    """A number that must be finite is not; the message says which, and of what step."""


def accumulate(engine: Any, loss: torch.Tensor, *, targets: int, ranks: int) -> None:
    """Add the gradients of one micro-batch's summed loss, weighted by the targets of the whole global batch."""
    weight = ranks / targets
    if engine.fp16_enabled() and engine.zero_optimization_stage() == 0:
        # DeepSpeed 0.19.8 divides stage 0's gradients by the loss scale and multiplies the loss by it at stages 1 to 3 only.
        weight *= float(engine.optimizer.loss_scale)
    engine.backward(loss * weight, scale_wrt_gas=False)


def update(engine: Any, recipe: Recipe, rate: float, step: int) -> Update:
    """Take the optimizer step number ``step`` (from 1) at learning rate ``rate``. Collective.

    Raises:
        NotFinite: the gradients are not finite, on all ranks alike. The weights in memory may then be spoilt, so nothing may be
            saved from them any more.
        NumericFailure: FP16 overflows at any loss scale.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    skipped_before = engine.skipped_steps
    norm = _measure_at_stage_0(engine, recipe, step) if recipe.zero.stage == 0 else None
    _step(engine, step)
    skipped = engine.skipped_steps > skipped_before
    if skipped and recipe.training.precision != Precision.FP16:  # with nothing to scale, DeepSpeed is silent about why
        raise NotFinite(f"the gradient of step {step} is not finite")
    norm = float(engine.get_global_grad_norm()) if norm is None else norm
    if not skipped:
        require_finite("gradient norm", norm, step)
    return Update(norm, skipped)


def require_finite(what: str, value: float, step: int) -> None:
    """Refuse to go on with a number that is not one.

    Raises:
        NotFinite: it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise NotFinite(f"the {what} of step {step} is {value}")


def _measure_at_stage_0(engine: Any, recipe: Recipe, step: int) -> float:
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    if recipe.training.precision != Precision.FP32:
        scale = float(engine.optimizer.loss_scale) if recipe.training.precision == Precision.FP16 else 1.0
        gradients = [parameter.grad.float() for parameter in parameters]
        return float(torch.nn.utils.get_total_norm(gradients)) / scale
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.training.max_gradient_norm or math.inf))
    require_finite("gradient norm", norm, step)
    return norm


def _step(engine: Any, step: int) -> None:
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise NumericFailure(f"FP16 overflows at step {step} at any loss scale; use training.precision BF16") from None


def _optimizer(recipe: Recipe) -> dict[str, Any]:
    chosen = recipe.training.optimizer
    return {
        "type": "AdamW",
        "params": {
            "lr": chosen.learning_rate,
            "betas": [chosen.beta1, chosen.beta2],
            "eps": chosen.epsilon,
            "weight_decay": chosen.weight_decay,
            "torch_adam": True,  # DeepSpeed's own would be compiled at first use, in the pod, for minutes
            "adam_w_mode": True,
        },
    }


def _zero(recipe: Recipe) -> dict[str, Any]:
    zero = recipe.zero
    config: dict[str, Any] = {"stage": zero.stage}
    if zero.offload.optimizer == OffloadTarget.CPU:
        config["offload_optimizer"] = {"device": "cpu"}
    if zero.offload.parameters == OffloadTarget.CPU:
        config["offload_param"] = {"device": "cpu"}
    return config


def _dimensions(parameter: nn.Parameter) -> int:
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)  # sharded ones look empty
    return len(shape)
