"""The private names of DeepSpeed that ``deepspeed_state`` touches are where it expects them. Red here: read that module, not this.

The round trips would fail too, but far from the cause. Each name is looked up on a real engine, on the object that is asked for it.
"""

from importlib.metadata import version

import pytest
import torch

from finetune_trainer.checkpoint import deepspeed_state as state
from tests.trainer.checkpoint.rounds import CASES
from tests.trainer.checkpoint.trainee import Case, new_engine, train

COMMON = (
    "global_steps",
    "global_samples",
    "skipped_steps",
    "micro_steps",
    "data_parallel_group",
    "dp_world_size",
    "torch_autocast_z0_gradscaler",
    "zero_optimization_stage",
    "gradient_accumulation_steps",
    "lr_scheduler",
    "module",
)
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter")
EXPECTED = [
    (Case("fp32", 0), "AdamW", ()),
    (Case("autocast", 0, autocast=True), "AdamW", ()),
    (
        Case("bf16", 0, "BF16"),
        "FP16_UnfusedOptimizer",
        ("optimizer", "fp16_groups", "fp32_groups", "loss_scale_config.cur_scale"),
    ),
    (
        Case("fp16", 0, "FP16"),
        "FP16_UnfusedOptimizer",
        ("fp16_groups", "fp32_groups", *(f"loss_scale_config.{name}" for name in SCALER)),
    ),
    *(
        (
            Case("zero", stage, "FP16"),
            "DeepSpeedZeroOptimizer",
            (
                "optimizer",
                "single_partition_of_fp32_groups",
                "real_dp_process_group",
                "round_robin_bit16_groups",
                "round_robin_bit16_offsets",
                "_hp_optimizer_states_linked",
                "_lazy_init_hp_params_optimizer_state",
                "update_lp_params",
                *(f"loss_scaler.{name}" for name in (*SCALER, "cur_hysteresis")),
            ),
        )
        for stage in (1, 2)
    ),
    (
        Case("zero", 3, "FP16"),
        "DeepSpeedZeroOptimizer_Stage3",
        (
            "optimizer",
            "fp16_groups",
            "fp32_partitioned_groups_flat",
            "swap_optimizer",
            "params_in_nvme_and_cpu",
            "checkpoint_event_prologue",
            "checkpoint_event_epilogue",
            "_reassign_or_swap_out_partitioned_parameters",
            *(f"loss_scaler.{name}" for name in (*SCALER, "cur_hysteresis")),
        ),
    ),
]


def has(target, path):
    for name in path.split("."):
        if not hasattr(target, name):
            return False
        target = getattr(target, name)
    return True


def test_this_is_the_deepspeed_that_the_names_were_read_from():
    assert version("deepspeed") == "0.19.8", "read deepspeed_state.py against the new version, then change this line"


@pytest.mark.parametrize(
    ("case", "optimizer", "names"), EXPECTED, ids=[f"{case.name} on stage {case.stage}" for case, *_ in EXPECTED]
)
def test_every_name_is_where_it_was(alone, case, optimizer, names):
    engine = new_engine(case)
    train(engine, range(1))
    assert type(engine.optimizer).__name__ == optimizer
    assert [name for name in COMMON if not has(engine, name)] == []
    assert [name for name in names if not has(engine.optimizer, name)] == []


@pytest.mark.parametrize("stage", range(4))
def test_the_masters_are_found_whole_before_and_after_the_first_step(alone, stage):
    engine = new_engine(Case("bf16", stage, "BF16"))
    sizes = {parameter.name: parameter.numel for parameter in state.trainable_parameters(engine)}
    for steps in (range(0), range(1)):
        train(engine, steps)
        found = dict.fromkeys(sizes, 0)
        for part in state.held(engine):
            found[part.name] += part.count
        assert found == sizes
        assert state.steps_ahead(engine) == (1 if stage == 0 else 0)
    moments = [view for part in state.held(engine) for view in part.views[1:]]
    assert any(view.abs().sum() > 0 for view in moments), "they are live, not copies made by asking"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_saved_changes_in_an_update_and_nowhere_else(alone, case):
    """Saves are copied beside the passes of the next step."""
    engine, seen = new_engine(case), []
    for _ in range(4):  # some are skipped: the first scales of FP16 overflow
        before, updates = copies(engine), len(seen)
        hooks = state.before_each_update(engine, lambda: seen.append(copies(engine)))
        train(engine, range(1))
        for hook in hooks:
            hook.remove()
        after = seen[updates] if len(seen) > updates else copies(engine)
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    train(engine, range(1))
    assert seen, "nothing was told of any update"
    assert not torch.equal(torch.cat(copies(engine)), torch.cat(seen[-1]))


def copies(engine):
    return [view.clone() for part in state.held(engine) for view in part.views]


def test_the_parameters_of_stage_3_that_are_partitioned_have_their_names(alone):
    engine = new_engine(Case("bf16", 3, "BF16"))
    parameter = next(engine.module.parameters())
    for name in ("ds_numel", "ds_process_group", "partition_numel"):
        assert hasattr(parameter, name)


def test_an_optimizer_that_is_not_known_is_refused(alone):
    class Unknown:
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])

    engine = new_engine(Case("fp32", 0))
    engine.optimizer = Unknown()
    with pytest.raises(Exception, match="Unknown are not implemented: choose another ZeRO stage"):
        state.held(engine)
