"""Everything that touches DeepSpeed's private names: what a rank owns of the training state, and putting it back.

DeepSpeed 0.19.8, ZeRO stages 0 to 3; the version is pinned and ``tests/trainer/checkpoint/test_deepspeed_names.py``
fails when a name here has moved. Collecting is local: no collective, no copy. Which optimizer class DeepSpeed wraps
around ours decides where the FP32 masters lie: flat and partitioned (stages 1 to 3), flat and replicated (stage 0 in
16 bits), or the parameters themselves.

What its own helpers get wrong, found by running it:

- with several parameter groups, stages 1 and 2 link only the first group's moments: ``optimizer.state`` is read;
- ``_hp_mapping`` is wrong under ``round_robin_gradients``: the intervals are computed from the groups' offsets;
- moments do not exist before the first real step in ZeRO, but the 16-bit wrappers of stage 0 step once when made;
- DeepSpeedCPUAdam keeps beta**t as a running product in C++: it is replayed, or resuming is not exact to the bit;
- the state may only be read or restored between steps: gradients under way would survive a restore.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from finetune_trainer.checkpoint.manifest import Json, Parameter
from finetune_trainer.checkpoint.shard import Owned
from finetune_trainer.errors import BadConfig

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_REPLICATED = (FP16_Optimizer, FP16_UnfusedOptimizer, torch.optim.Optimizer)


@dataclass(frozen=True, slots=True)
class _Fragment:
    """``count`` numbers of a flattened parameter from ``start``; their masters are in ``flat`` from ``offset``."""

    name: str
    start: int
    count: int
    flat: torch.Tensor
    offset: int


def zero_stage(engine: Any) -> int:
    """Return the ZeRO stage that the engine runs."""
    return int(engine.zero_optimization_stage())


def is_replicated(engine: Any) -> bool:
    """Tell whether every rank holds the whole state; it then saves a share of it."""
    return isinstance(engine.optimizer, _REPLICATED)


def trainable_parameters(engine: Any) -> tuple[Parameter, ...]:
    """Return every trainable parameter, whole, the same on every rank."""
    return tuple(
        Parameter(name, int(getattr(parameter, "ds_numel", parameter.numel())))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    )


def held(engine: Any) -> list[Owned]:
    """Return what this rank must have restored: replicated state whole, partitioned state its partition."""
    return [
        Owned(fragment.name, fragment.start, _views(engine, fragment))
        for fragment in _fragments(engine)
        if fragment.count
    ]


def owned(engine: Any) -> list[Owned]:
    """Return what this rank has to save: together the ranks save every number once."""
    parts = held(engine)
    if not is_replicated(engine):
        return parts
    rank, size = dist.get_rank(group=engine.data_parallel_group), engine.dp_world_size
    return [part for part in (_share(part, rank, size) for part in parts) if part.count]


def share(parameter: Any, rank: int, size: int) -> tuple[int, torch.Tensor]:
    """Return a rank's share of any parameter, flattened, and the number of its first: together the ranks hold it once.

    Under ZeRO-3 it is the partition that lies there, otherwise an equal part.
    """
    if hasattr(parameter, "ds_tensor"):
        start = parameter.partition_numel() * dist.get_rank(group=parameter.ds_process_group)
        return start, parameter.ds_tensor.data.view(-1)[: max(0, parameter.ds_numel - start)]
    flat, numel = parameter.data.reshape(-1), parameter.numel()
    return numel * rank // size, flat[numel * rank // size : numel * (rank + 1) // size]


def adam_step(engine: Any) -> int:
    """Return how many steps the moments have seen; 0 where they do not exist yet."""
    steps = (_existing_step(engine, fragment.flat) for fragment in _fragments(engine))
    return max(steps, default=0)


def steps_ahead(engine: Any) -> int:
    """Return by how many steps the moments are ahead of the engine's counters.

    A constant of the engine (see above, stage 0) unless something was raised in the middle of its ``step``: then
    masters and counters do not belong together, and the state must not be saved.
    """
    return adam_step(engine) - (int(engine.global_steps) - int(engine.skipped_steps))


def before_each_update(engine: Any, call: Callable[[], None]) -> list[Any]:
    """Have ``call`` made before anything that :func:`owned` returns is changed by a step. Returns handles, with ``remove()``."""
    optimizers = {id(one): one for one in (_optimizer_of(engine, fragment.flat) for fragment in _fragments(engine))}
    return [one.register_step_pre_hook(lambda *_: call()) for one in optimizers.values()]


def scalars(engine: Any) -> Json:
    """Return everything that is not a tensor, as JSON, equal on every rank."""
    scaler, autocast_scaler = _scalers(engine)
    document: Json = {
        "adamStep": adam_step(engine),
        "parameterGroups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in _base_optimizer(engine).param_groups
        ],
        "schedule": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        "lossScale": {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)},
        "autocastLossScale": autocast_scaler.state_dict() if autocast_scaler is not None else None,
    }
    copy: Json = json.loads(json.dumps(document))
    return copy


def begin_restore(engine: Any) -> None:
    """Prepare the engine for new values in ``held`` views. Local."""
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.checkpoint_event_prologue()  # releases all gathered parameters, persistent ones too


@torch.no_grad()
def finish_restore(engine: Any, saved: Json, *, own: bool = True) -> None:
    """Make everything else agree with the values that ``held`` views now have. Collective.

    ``own``: the numbers are of a job with the same recipe. Of another one's, what its optimizer was told (decay, betas) is left out: this
    job's says otherwise, perhaps.
    """
    _restore_adam_step(engine, int(saved["adamStep"]))
    _restore_working_copies(engine)
    if own:
        for group, values in zip(_base_optimizer(engine).param_groups, saved["parameterGroups"], strict=True):
            known = {key: value for key, value in values.items() if key in group}
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})
    if saved["schedule"] is not None and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(saved["schedule"])
    scaler, autocast_scaler = _scalers(engine)
    _set_known(engine, saved["counters"])
    if own or (_is_dynamic(scaler) and _was_dynamic(saved["lossScale"])):
        _set_known(scaler, saved["lossScale"])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if saved["autocastLossScale"] and autocast_scaler is not None:
        autocast_scaler.load_state_dict(saved["autocastLossScale"])


def _fragments(engine: Any) -> Iterator[_Fragment]:
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _fragments_of_stage_3(optimizer, names)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _fragments_of_stages_1_and_2(optimizer, names)
    if isinstance(optimizer, BF16_Optimizer):
        return _fragments_of_bf16(optimizer, names)
    if isinstance(optimizer, FP16_Optimizer):
        return _fragments_of_flat_16_bit(optimizer, names)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return _fragments_of_16_bit(optimizer, names)
    if isinstance(optimizer, torch.optim.Optimizer):
        return _fragments_of_plain(optimizer, names)
    raise BadConfig(
        f"checkpoints of DeepSpeed's {type(optimizer).__name__} are not implemented: choose another ZeRO stage"
    )


def _fragments_of_stage_3(optimizer: Any, names: dict[Any, str]) -> Iterator[_Fragment]:
    if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
        raise BadConfig("checkpoints of state offloaded to NVMe are not implemented: offload to CPU instead")
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()  # padded, equal on every rank
            start = size * dist.get_rank(group=parameter.ds_process_group)
            yield _Fragment(names[parameter], start, max(0, min(size, parameter.ds_numel - start)), flat, offset)
            offset += size


def _fragments_of_stages_1_and_2(optimizer: Any, names: dict[Any, str]) -> Iterator[_Fragment]:
    for number, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        low = dist.get_rank(group=optimizer.real_dp_process_group[number]) * flat.numel()
        group, offsets = optimizer.round_robin_bit16_groups[number], optimizer.round_robin_bit16_offsets[number]
        for parameter, at in zip(group, offsets, strict=True):
            first, end = max(at, low), min(at + parameter.numel(), low + flat.numel())
            if first < end:
                yield _Fragment(names[parameter], first - at, end - first, flat, first - low)
            else:  # no number of it, but its group has moments all the same
                yield _Fragment(names[parameter], 0, 0, flat, 0)


def _fragments_of_bf16(optimizer: Any, names: dict[Any, str]) -> Iterator[_Fragment]:
    for group, flat in zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping  # noqa: SLF001
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield _Fragment(names[parameter], low.start, low.numel, flat, high.start)


def _fragments_of_flat_16_bit(optimizer: Any, names: dict[Any, str]) -> Iterator[_Fragment]:
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            yield _Fragment(names[parameter], 0, parameter.numel(), flat, offset)
            offset += parameter.numel()


def _fragments_of_16_bit(optimizer: Any, names: dict[Any, str]) -> Iterator[_Fragment]:
    for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(group, masters, strict=True):
            yield _Fragment(names[parameter], 0, parameter.numel(), master, 0)


def _fragments_of_plain(optimizer: Any, names: dict[Any, str]) -> Iterator[_Fragment]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                yield _Fragment(names[parameter], 0, parameter.numel(), parameter, 0)


def _views(engine: Any, fragment: _Fragment) -> tuple[torch.Tensor, ...]:
    state = _moments(engine, fragment.flat)
    tensors = (fragment.flat.detach(), state["exp_avg"], state["exp_avg_sq"])
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors), fragment.name
    return tuple(tensor.view(-1).narrow(0, fragment.offset, fragment.count) for tensor in tensors)


def _share(part: Owned, rank: int, size: int) -> Owned:
    first, end = part.count * rank // size, part.count * (rank + 1) // size
    return Owned(part.name, part.start + first, tuple(view[first:end] for view in part.views))


def _base_optimizer(engine: Any) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _optimizer_of(engine: Any, flat: torch.Tensor) -> Any:
    backup = getattr(engine.optimizer, "backup_optimizer", None)  # stage 3 that offloads in part: untested
    return backup if backup is not None and flat.device.type != "cpu" else _base_optimizer(engine)


def _moments(engine: Any, flat: torch.Tensor) -> Any:
    """Return the Adam state of one flat tensor, created as the first step would create it."""
    optimizer = _optimizer_of(engine, flat)
    state = optimizer.state[flat]
    if "exp_avg" not in state:
        state["step"] = _first_step(optimizer, flat)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
    return state


def _first_step(optimizer: Any, flat: torch.Tensor) -> torch.Tensor | int:
    if not isinstance(optimizer, torch.optim.Adam):
        return 0
    on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
    return torch.zeros((), device=flat.device if on_device else "cpu")


def _existing_step(engine: Any, flat: torch.Tensor) -> int:
    state = _optimizer_of(engine, flat).state
    return int(state[flat].get("step", 0)) if flat in state else 0


def _restore_adam_step(engine: Any, step: int) -> None:
    for flat in {id(fragment.flat): fragment.flat for fragment in _fragments(engine)}.values():
        state = _moments(engine, flat)
        state["step"] = state["step"].fill_(step) if torch.is_tensor(state["step"]) else step
    optimizer = _base_optimizer(engine)
    if hasattr(optimizer, "ds_opt_adam"):  # DeepSpeedCPUAdam: replay the running product of betas on four idle numbers
        group, idle = optimizer.param_groups[0], [torch.zeros(1) for _ in range(4)]
        constants = (*group["betas"], group["eps"], 0.0, group["bias_correction"])
        for number in range(1, step + 1):
            optimizer.ds_opt_adam.adam_update(optimizer.opt_id, number, 0.0, *constants, *idle)


def _restore_working_copies(engine: Any) -> None:
    """Copy the masters into the parameters that the forward pass uses."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)  # noqa: SLF001
        optimizer.checkpoint_event_epilogue()  # drops hpZ copies, gathers persistent parameters again
    elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer._hp_optimizer_states_linked = False  # noqa: SLF001
        optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001  only deepspeed.utils.safe_get_* needs it
        optimizer.update_lp_params()
    elif not isinstance(optimizer, torch.optim.Optimizer):
        parameters = dict(engine.module.named_parameters())
        for fragment in _fragments(engine):
            master = fragment.flat.data.view(-1).narrow(0, fragment.offset, fragment.count)
            parameter = parameters[fragment.name]
            parameter.data.copy_(master.view_as(parameter))


def _scalers(engine: Any) -> tuple[Any, Any]:
    optimizer = engine.optimizer
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    return scaler, getattr(optimizer, "torch_autocast_gradscaler", None) or engine.torch_autocast_z0_gradscaler


def _is_dynamic(scaler: Any) -> bool:
    """Tell whether a scaler finds its scale itself, as that of FP16 does; BF16 has one too, which stays 1."""
    return getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)


def _was_dynamic(saved: Json) -> bool:
    return saved.get("last_overflow_iter") is not None


def _set_known(target: Any, values: Json) -> None:
    for name, value in values.items():
        if hasattr(target, name):
            setattr(target, name, value)
