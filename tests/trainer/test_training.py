"""What becomes of whole jobs: they learn, save, stop, resume, measure and hand over a model."""

import json
import math
import re
from pathlib import Path

import pytest

from finetune_api.contract import ExitCode
from finetune_api.protocol import BeatKind, Phase, Resumed, ResumeSource
from finetune_trainer.train import ROLLBACKS_LIMIT
from tests.trainer.launch import Case
from tests.trainer.recipes import STEPS
from tests.trainer.sentences import POISONED_NUMBER, SPIKED_STEP


def code(case: Case) -> int:
    """The exit code, which must be one for all ranks."""
    codes = {outcome["code"] for outcome in case.outcomes}
    assert len(codes) == 1, case.outcomes
    return codes.pop()


def learns(case: Case) -> bool:
    """Whether the last third of the steps is better than the first; single batches of twelve differ more than that."""
    third = len(case.beats.losses) // 3
    return sum(case.beats.losses[-third:]) < sum(case.beats.losses[:third])


@pytest.mark.parametrize(
    "name", ["bf16", "bf16-zero-0", "fp16", "fp16-zero-0", "lora", "language-model", "language-model-lora"]
)
def test_learns_on_one_rank(name: str, one_rank: dict[str, Case]) -> None:
    case = one_rank[name]
    assert code(case) == ExitCode.OK, case.outcomes
    assert learns(case)


@pytest.mark.parametrize("name", ["lora-zero-3", "bf16-zero-3", "offload-zero-2", "offload-zero-3"])
def test_learns_on_two_ranks(name: str, two_ranks: dict[str, Case]) -> None:
    case = two_ranks[name]
    assert code(case) == ExitCode.OK, case.outcomes
    assert learns(case)


def test_pretraining_from_scratch_lowers_loss_and_measures_perplexity(one_rank: dict[str, Case]) -> None:
    beats = one_rank["pretraining"].beats
    assert beats.losses[0] == pytest.approx(math.log(200), abs=0.3)  # knows nothing of 197 words
    assert beats.losses[-1] < 0.7 * beats.losses[0]
    assert beats.metrics["perplexity"] == pytest.approx(math.exp(beats.metrics["loss"]))


def test_pretraining_starts_and_goes_on_the_same_under_zero_3(
    one_rank: dict[str, Case], two_ranks: dict[str, Case]
) -> None:
    assert two_ranks["pretraining-zero-3"].beats.losses == pytest.approx(one_rank["pretraining"].beats.losses, abs=1e-3)


def test_lora_trains_the_same_under_zero_3(one_rank: dict[str, Case], two_ranks: dict[str, Case]) -> None:
    assert two_ranks["lora-zero-3"].beats.losses == pytest.approx(one_rank["lora"].beats.losses, abs=1e-3)


def test_a_job_that_never_makes_a_number_goes_back_so_often_and_then_fails(one_rank: dict[str, Case]) -> None:
    cases = [one_rank[f"not-a-number-{generation}"] for generation in range(1, ROLLBACKS_LIMIT + 2)]
    assert [code(case) for case in cases] == [ExitCode.ROLLED_BACK] * ROLLBACKS_LIMIT + [ExitCode.NUMERIC]
    assert [case.beats.of(BeatKind.RESUMED)[0].rollbacks for case in cases] == list(range(ROLLBACKS_LIMIT + 1))
    assert cases[0].outcomes[0]["message"] == (
        "the loss of step 1 is nan; going back to step 0 and leaving out samples 0 to 11 (time 1 of 5)"
    )
    assert cases[1].outcomes[0]["message"].endswith("leaving out samples 12 to 23 (time 2 of 5)")
    assert (
        cases[-1]
        .outcomes[0]["message"]
        .startswith(
            "the loss of step 1 is nan; going back and leaving out the samples was tried 5 times: lower training.optimizer"
        )
    )
    assert all(case.beats.progress == [] for case in cases), "no step was taken"


def test_a_job_whose_checkpoints_somebody_deleted_does_not_start_again(one_rank: dict[str, Case]) -> None:
    assert code(one_rank["emptied"]) == ExitCode.CHECKPOINTS_LOST
    assert "HEAD: everything is gone. Somebody deleted it" in one_rank["emptied"].outcomes[0]["message"]
    assert one_rank["emptied"].beats.of(BeatKind.RESUMED) == one_rank["emptied"].beats.progress == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone-bucket", "s3://gone/job: the bucket 'gone' is gone, and this job has committed checkpoints there"),
        (
            "gone-objects",
            "none of the 1 checkpoints below s3://jobs/gone-objects can be loaded (step 3: s3://jobs/gone-ob",
        ),
    ],
)
def test_a_job_waits_for_whatever_of_its_checkpoints_somebody_deleted(
    name: str, says: str, one_rank: dict[str, Case]
) -> None:
    first, second = one_rank[f"{name}-1"], one_rank[f"{name}-2"]
    assert code(first) == ExitCode.SAVED, first.outcomes
    assert code(second) == ExitCode.CHECKPOINTS_LOST, second.outcomes
    assert second.outcomes[0]["message"].startswith(says)
    assert "omebody deleted" in second.outcomes[0]["message"]
    assert second.beats.progress == []


@pytest.mark.parametrize(
    ("name", "source", "changed"),
    [
        ("changed-data", ResumeSource.MEMORY, "s3://jobs/sources/train.jsonl"),
        ("changed-base", ResumeSource.STORAGE, "s3://jobs/sources/bert/model.safetensors"),
    ],
)
def test_a_job_is_continued_on_what_it_was_trained_on_and_on_nothing_else(
    name: str, source: ResumeSource, changed: str, one_rank: dict[str, Case]
) -> None:
    first, same, other = (one_rank[f"{name}-{generation}"] for generation in (1, 2, 3))
    assert (code(first), code(same)) == (ExitCode.SAVED, ExitCode.SAVED), (first.outcomes, same.outcomes)
    (resumed,) = same.beats.of(BeatKind.RESUMED)
    assert (resumed.step, resumed.source) == (2, source), "written anew, but the same bytes"
    assert code(other) == ExitCode.BAD_DATA, other.outcomes
    assert other.outcomes[0]["message"].startswith(f"{changed} has changed: it was version ")
    assert other.beats.progress == []


@pytest.mark.parametrize("name", ["poisoned", "poisoned-on-two"])
def test_a_sample_that_makes_no_number_is_left_out_and_the_job_ends_well(
    name: str, one_rank: dict[str, Case], two_ranks: dict[str, Case]
) -> None:
    cases = one_rank | two_ranks
    first, second = cases[f"{name}-1"], cases[f"{name}-2"]
    step = POISONED_NUMBER // 12
    assert code(first) == ExitCode.ROLLED_BACK
    assert first.outcomes[0]["message"] == (
        f"the loss of step {step + 1} is nan; going back to step 6 and leaving out samples "
        f"{12 * step} to {12 * step + 11} (time 1 of 5)"
    )
    assert code(second) == ExitCode.OK
    (resumed,) = second.beats.of(BeatKind.RESUMED)
    assert resumed == Resumed(6, ResumeSource.STORAGE, rollbacks=1, skipped_samples=12)
    assert [progress.step for progress in second.beats.progress] == list(range(7, STEPS + 1))


def test_a_loss_that_jumps_is_gone_back_from_and_the_samples_that_led_to_it_are_left_out(
    one_rank: dict[str, Case],
) -> None:
    first, second = one_rank["spiked-1"], one_rank["spiked-2"]
    assert code(first) == ExitCode.ROLLED_BACK
    assert [progress.step for progress in first.beats.progress] == list(range(1, SPIKED_STEP + 1)), (
        "no step was taken on it"
    )
    assert re.fullmatch(
        rf"the loss of step {SPIKED_STEP + 1} is \S+, after at most \S+ in the {SPIKED_STEP} steps before; "
        r"going back to step 15 and leaving out samples 180 to 251 \(time 1 of 5\)",
        first.outcomes[0]["message"],
    )
    assert code(second) == ExitCode.OK
    assert second.beats.of(BeatKind.RESUMED) == [Resumed(15, ResumeSource.STORAGE, rollbacks=1, skipped_samples=72)]
    assert max(second.beats.losses) < 1.0
    assert [progress.step for progress in second.beats.progress] == list(range(16, 25))


def test_a_loss_that_jumps_is_trained_through_where_the_recipe_says_so(one_rank: dict[str, Case]) -> None:
    case = one_rank["spiked-ignored-1"]
    assert code(case) == ExitCode.OK
    assert case.beats.losses[SPIKED_STEP] > 3 * max(case.beats.losses[:SPIKED_STEP]), "there was a spike"


def test_fp16_gives_up_when_no_loss_scale_helps(one_rank: dict[str, Case]) -> None:
    case = one_rank["not-a-number-fp16"]
    assert code(case) == ExitCode.NUMERIC
    assert case.outcomes[0]["message"].startswith("FP16 overflowed in 16 steps in a row up to step 16")


def test_an_epoch_rounds_up_to_whole_global_batches(one_rank: dict[str, Case]) -> None:
    progress = one_rank["one-epoch"].beats.progress
    assert progress[-1].step == progress[-1].total_steps == math.ceil(151 / 12)
    assert progress[-1].epoch == pytest.approx(13 * 12 / 151)


def test_checkpoints_and_evaluations_come_when_they_are_due(one_rank: dict[str, Case]) -> None:
    beats = one_rank["uninterrupted"].beats
    assert [checkpoint.step for checkpoint in beats.of(BeatKind.CHECKPOINT)] == [4, 8, 12]
    assert [evaluation.step for evaluation in beats.of(BeatKind.EVALUATION)] == [6, 12]


def test_every_rank_tells_phase_and_step(two_ranks: dict[str, Case]) -> None:
    beats = [beat for beat in two_ranks["zero-2"].beats.beats if beat.kind == BeatKind.HEARTBEAT]
    for rank in (0, 1):
        told = [beat.heartbeat for beat in beats if beat.rank == rank]
        assert told[0].phase == Phase.INITIALIZING
        assert {beat.phase for beat in told} == set(Phase)
        steps = [beat.step for beat in told if beat.phase == Phase.TRAINING]
        assert sorted(set(steps)) == list(range(STEPS + 1))


def test_a_stop_that_one_rank_hears_is_saved_by_all_at_the_same_step(two_ranks: dict[str, Case]) -> None:
    case = two_ranks["interrupted-1"]
    assert [outcome["code"] for outcome in case.outcomes] == [ExitCode.SAVED] * 2
    assert {outcome["message"] for outcome in case.outcomes} == {"stopped on request; step 5 is saved"}
    assert [checkpoint.step for checkpoint in case.beats.of(BeatKind.CHECKPOINT)] == [5]


def test_a_stop_before_the_first_step_has_nothing_to_save(two_ranks: dict[str, Case]) -> None:
    case = two_ranks["interrupted-0-at-start"]
    assert code(case) == ExitCode.SAVED
    assert case.outcomes[0]["message"] == "stopped on request before the first step; there is nothing to save yet"
    assert case.beats.progress == case.beats.of(BeatKind.CHECKPOINT) == []


def test_a_resumed_job_goes_on_as_if_nothing_had_happened(
    one_rank: dict[str, Case], two_ranks: dict[str, Case]
) -> None:
    first, second = two_ranks["interrupted-1"].beats, two_ranks["interrupted-2"].beats
    assert [progress.step for progress in second.progress] == list(range(6, STEPS + 1))
    assert second.of(BeatKind.RESUMED) == [Resumed(5, ResumeSource.MEMORY)], "its pod lived"
    assert first.losses + second.losses == pytest.approx(two_ranks["zero-2"].beats.losses, abs=1e-6)
    assert first.losses + second.losses == pytest.approx(one_rank["uninterrupted"].beats.losses, abs=1e-3)


def test_a_job_that_was_done_training_goes_straight_to_the_result(two_ranks: dict[str, Case]) -> None:
    case = two_ranks["interrupted-3-is-finished"]
    assert code(case) == ExitCode.OK
    assert case.beats.progress == []
    assert case.beats.metrics == two_ranks["interrupted-2"].beats.metrics
    assert len(case.beats.of(BeatKind.MODEL)) == 1


def test_an_older_generation_ends_as_stale(two_ranks: dict[str, Case]) -> None:
    assert code(two_ranks["interrupted-4-is-stale"]) == ExitCode.STALE


def test_a_job_resumes_on_another_number_of_ranks(two_ranks: dict[str, Case], three_ranks: dict[str, Case]) -> None:
    losses = two_ranks["resized-1"].beats.losses + three_ranks["resized-2"].beats.losses
    assert losses == pytest.approx(two_ranks["zero-2"].beats.losses, abs=1e-3)


def test_bad_data_ends_all_ranks_with_one_message(two_ranks: dict[str, Case], files: Path) -> None:
    case = two_ranks["bad-data"]
    assert code(case) == ExitCode.BAD_DATA
    assert {outcome["message"] for outcome in case.outcomes} == {
        f'file://{files}/train.jsonl line 1: no column "sentence"; the columns there are: "text", "label"'
    }


def test_the_listener_hears_no_number_that_is_none(one_rank: dict[str, Case]) -> None:
    for progress in one_rank["fp16"].beats.progress:
        assert json.dumps(progress.gradient_norm, allow_nan=False)


def test_fp16_scales_the_loss_at_stage_0_as_at_every_other(one_rank: dict[str, Case]) -> None:
    # The scale is 2**16 at first: gradients that were divided by it and never multiplied would be that much too small.
    for name in ("fp16", "fp16-zero-0"):
        expected = one_rank["bf16"].beats.gradient_norms[0]
        assert one_rank[name].beats.gradient_norms[0] == pytest.approx(expected, rel=0.1)
