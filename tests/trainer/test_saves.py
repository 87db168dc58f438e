"""How saving goes, as numbers: what a save costs, and all of them together."""

from finetune_api.protocol import Saves
from finetune_trainer import saves


def test_training_stands_still_for_each_save_and_the_sum_is_told_too() -> None:
    told = Saves()
    for step, seconds in ((50, 0.5), (100, 0.25), (150, 1.0)):
        told = saves.begun(told, step=step, now="2026-01-01T12:00:00Z", stall_seconds=seconds)
    assert (told.stall_seconds, told.total_stall_seconds) == (1.0, 1.75)
