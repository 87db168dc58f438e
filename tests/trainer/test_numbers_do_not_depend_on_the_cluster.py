"""The same seed gives the same training, whatever the number of ranks and the ZeRO stage, with dropout on."""

from pathlib import Path

import pytest
import torch

from finetune_api.recipe import Recipe
from finetune_trainer.data.batches import BatchPlan, cut, random_seed
from finetune_trainer.data.encoded import open_encoded
from finetune_trainer.data.encoding import encode_data
from finetune_trainer.feed import Feed
from finetune_trainer.model_files import fetch_model, pin_model
from finetune_trainer.models import build_model, load_config, load_tokenizer
from finetune_trainer.object_store import MemoryObjectStore
from finetune_trainer.optimization import learning_rate, parameter_groups
from finetune_trainer.sources import fetch, pin_data
from finetune_trainer.tasks import task_of
from tests.trainer.launch import Case
from tests.trainer.recipes import STEPS, classification

CURVES_AGREE = 1e-3
SAME_ARITHMETIC = 1e-4


def differences(left: list[float], right: list[float]) -> float:
    assert len(left) == len(right) == STEPS
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_train_as_one_does(stage: int, one_rank: dict[str, Case], two_ranks: dict[str, Case]) -> None:
    one, two = one_rank[f"zero-{stage}"].beats, two_ranks[f"zero-{stage}"].beats
    assert differences(one.losses, two.losses) < CURVES_AGREE
    assert differences(one.gradient_norms, two.gradient_norms) < CURVES_AGREE
    assert one.metrics == pytest.approx(two.metrics, abs=CURVES_AGREE)


@pytest.mark.parametrize("stage", [2, 3])
def test_three_ranks_train_as_one_does(stage: int, one_rank: dict[str, Case], three_ranks: dict[str, Case]) -> None:
    one, three = one_rank[f"zero-{stage}"].beats, three_ranks[f"zero-{stage}"].beats
    assert differences(one.losses, three.losses) < CURVES_AGREE
    assert differences(one.gradient_norms, three.gradient_norms) < CURVES_AGREE
    assert one.metrics == pytest.approx(three.metrics, abs=CURVES_AGREE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_zero_stage_trains_as_stage_0_does(stage: int, one_rank: dict[str, Case]) -> None:
    assert differences(one_rank["zero-0"].beats.losses, one_rank[f"zero-{stage}"].beats.losses) < CURVES_AGREE


def test_ranks_without_a_micro_batch_change_nothing(one_rank: dict[str, Case], three_ranks: dict[str, Case]) -> None:
    one, three = one_rank["micro-batches-of-6"].beats, three_ranks["micro-batches-of-6"].beats
    assert differences(one.losses, three.losses) < CURVES_AGREE


def test_gradient_checkpointing_changes_no_number(one_rank: dict[str, Case]) -> None:
    usual, recomputed = one_rank["zero-2"].beats, one_rank["gradient-checkpointing"].beats
    assert differences(usual.losses, recomputed.losses) < SAME_ARITHMETIC


def test_offloading_changes_no_number(two_ranks: dict[str, Case]) -> None:
    for stage in (2, 3):
        usual, offloaded = two_ranks[f"zero-{stage}"].beats, two_ranks[f"offload-zero-{stage}"].beats
        assert differences(usual.losses, offloaded.losses) < SAME_ARITHMETIC


def test_the_first_ten_steps_are_those_of_a_plain_pytorch_loop(
    files: Path, tmp_path: Path, one_rank: dict[str, Case], two_ranks: dict[str, Case]
) -> None:
    losses, norms = plain_loop(Recipe.model_validate(classification(files)), tmp_path, steps=10)
    for ran in (one_rank["zero-0"].beats, two_ranks["zero-2"].beats, two_ranks["zero-3"].beats):
        assert ran.losses[:10] == pytest.approx(losses, abs=SAME_ARITHMETIC)
        assert ran.gradient_norms[:10] == pytest.approx(norms, abs=SAME_ARITHMETIC)


def plain_loop(recipe: Recipe, scratch: Path, *, steps: int) -> tuple[list[float], list[float]]:
    """The recipe's first steps as a textbook writes them: no DeepSpeed, no ranks, one big sum."""
    store, task = MemoryObjectStore(), task_of(recipe)
    model_source = pin_model(recipe.model.source, store, scratch, with_weights=True)
    folder, uri = fetch_model(model_source, store, scratch), recipe.model.source
    tokenizer = load_tokenizer(folder, uri)
    config = load_config(folder, uri, recipe=recipe, task=task, tokenizer=tokenizer)
    data = pin_data(recipe.data.train.source, store, scratch)
    encoded = encode_data(
        data=data,
        model=model_source,
        folder=fetch(data, store, scratch),
        columns=recipe.data.columns,
        task=task,
        tokenizer=tokenizer,
        scratch=scratch,
        alive=lambda: None,
    )
    feed = Feed(open_encoded(encoded), task, tokenizer.pad_token_id, torch.device("cpu"))
    model = build_model(folder, uri, config=config, recipe=recipe, task=task).train()
    training = recipe.training
    optimizer = torch.optim.AdamW(parameter_groups(model, training.optimizer.weight_decay))
    plan = BatchPlan(len(feed.data), training.global_batch_size, training.micro_batch_size, training.seed)
    losses, norms = [], []
    for step in range(steps):
        total = torch.zeros(())
        chosen = plan.chosen(step)
        for index, samples in enumerate(cut(chosen, feed.data.lengths(chosen), training.micro_batch_size)):
            torch.manual_seed(random_seed("dropout", training.seed, step, index))
            batch = feed.batch(samples)
            total = total + task.loss(model(**batch.inputs).logits, batch.labels)
        mean = total / training.global_batch_size
        mean.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_gradient_norm)))
        losses.append(float(mean))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms
