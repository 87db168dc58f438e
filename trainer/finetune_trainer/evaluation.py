"""Measures the model on the evaluation data, every example once, whatever the number of ranks.

Micro-batches are dealt to ranks as in training; ignored ones fill up the deal and have no target, so they count in nothing. Metrics add
up their counts over the ranks, not their values.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from finetune_api.protocol import JobCheckpoint, Metric
from finetune_api.recipe import MetricName
from finetune_trainer.checkpoint.head import Retention
from finetune_trainer.data.batches import cut, deal
from finetune_trainer.feed import Feed
from finetune_trainer.ranks import Ranks

ALIVE_EVERY = 8
"""Ask whether to stop, and tell that we are alive, once in so many micro-batches."""

WIRE_NAMES = {MetricName.ACCURACY: "accuracy", MetricName.MACRO_F1: "macroF1", MetricName.PERPLEXITY: "perplexity"}

LOWER_IS_BETTER = (MetricName.PERPLEXITY,)


@torch.no_grad()
def evaluate(
    engine: Any,
    feed: Feed,
    *,
    names: Sequence[MetricName],
    vocabulary: int,
    micro_batch_size: int,
    ranks: Ranks,
    should_stop: Callable[[], bool],
    alive: Callable[[], None],
) -> list[Metric] | None:
    """Return the loss per target and the metrics, the same on every rank; None when it was asked to stop. Collective."""
    built = {name: feed.task.metric(name, vocabulary=vocabulary) for name in names}
    metrics = {name: metric.to(feed.device) for name, metric in built.items() if metric is not None}
    everything = np.arange(len(feed.data))
    pieces = cut(everything, feed.data.lengths(everything), micro_batch_size)
    loss, targets = 0.0, 0
    engine.eval()
    for turn, index in enumerate(deal(len(pieces), ranks=ranks.size, rank=ranks.rank)):
        if turn % ALIVE_EVERY == 0:
            alive()
            if ranks.sum([float(should_stop())])[0] > 0:
                return None
        piece = None if index is None else pieces[index]
        batch = feed.batch(piece).to(feed.device)
        logits = engine(**batch.inputs).logits
        loss += float(feed.task.loss(logits, batch.labels))
        targets += 0 if piece is None else feed.task.count_targets(feed.data, piece)
        for metric in metrics.values():
            metric.update(*feed.task.predict(logits, batch.labels))
    total_loss, total_targets = ranks.sum([loss, targets])
    mean = total_loss / total_targets
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    return [Metric("loss", mean)] + [Metric(WIRE_NAMES[name], values.get(name, _exp(mean))) for name in names]


def value_of(metrics: Sequence[Metric], name: MetricName) -> float:
    """Return the value of one metric of an evaluation."""
    return next(metric.value for metric in metrics if metric.name == WIRE_NAMES[name])


def retention_of(wish: JobCheckpoint) -> Retention:
    """Return which checkpoints a job keeps."""
    if wish.keep_best is None:
        return Retention(wish.keep)
    is_lower_better = MetricName(wish.keep_best) in LOWER_IS_BETTER
    return Retention(wish.keep, "lowest" if is_lower_better else "highest", wish.keep_best)


def _exp(mean: float) -> float:
    """Return perplexity: the exponential of the loss per target; infinite where it cannot be written down."""
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
