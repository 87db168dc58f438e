"""Sentences with a lesson in them, of uneven lengths, the same at every call."""

import json
import random
from pathlib import Path

import numpy as np

from finetune_trainer.data.order import sample_order
from tests.trainer.tiny_models import BAD, GOOD, PLAIN, POISON

LABELS = ("negative", "neutral", "positive")


def rated_sentences(count: int, *, seed: int = 1) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [_rated(draw, draw.choice(LABELS)) for _ in range(count)]


POISONED_NUMBER = 90
"""Which sample of a run with seed 42 has the word that no poisoned model can read."""


def poisoned(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    (place,) = sample_order(np.array([POISONED_NUMBER]), samples=len(rows), seed=42)
    spoilt = {**rows[place], "text": f"the film {POISON}"}
    return [*rows[:place], spoilt, *rows[place + 1 :]]


SPIKED_STEP = 20
"""Which step of a run with seed 42 and global batches of 12, counted from 0, has labels that contradict all others."""


def spiked(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same label for all, which is soon learnt, but for one step's samples."""
    numbers = np.arange(12 * SPIKED_STEP, 12 * (SPIKED_STEP + 1))
    places = set(sample_order(numbers, samples=len(rows), seed=42).tolist())
    return [{**row, "label": "negative" if place in places else "positive"} for place, row in enumerate(rows)]


def _rated(draw: random.Random, label: str) -> dict[str, str]:
    words = [draw.choice(PLAIN) for _ in range(draw.randint(2, 24))]
    telling = {"negative": BAD, "neutral": (), "positive": GOOD}[label]
    for _ in range(2 if telling else 0):
        words.insert(draw.randint(0, len(words)), draw.choice(telling))
    return {"text": " ".join(words), "label": label}


def counting_texts(count: int, *, seed: int = 1) -> list[dict[str, str]]:
    """Texts in which each word follows from the one before it."""
    draw = random.Random(seed)
    starts = [draw.randint(0, 159) for _ in range(count)]
    return [{"text": " ".join(f"w{(start + i) % 160}" for i in range(draw.randint(5, 40)))} for start in starts]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
