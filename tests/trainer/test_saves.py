"""How saving goes, as numbers: what a save costs, and all of them together."""

from finetune_api.protocol import Saves
from finetune_trainer import saves
from finetune_trainer.checkpoint.saving import Outcome


def test_training_stands_still_for_each_save_and_the_sum_is_told_too() -> None:
    told = Saves()
    for step, seconds in ((50, 0.5), (100, 0.25), (150, 1.0)):
        outcome = Outcome(step, 3.0, copy_seconds=2.0, stall_seconds=seconds)
        told = saves.ended(told, outcome, now="2026-01-01T12:00:00Z")
    assert (told.stall_seconds, told.total_stall_seconds) == (1.0, 1.75)
