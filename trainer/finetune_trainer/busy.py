"""What a step takes of one rank alone, without the time that it waits for its peers: who takes steadily more of it holds up all.

The whole of a step takes equally long on all ranks, whoever is slow. What is each rank's own is loading its batches and the forward pass:
gradients are exchanged in the backward pass and after it. At ZeRO stage 3 the forward pass gathers weights as well and counts for
nothing. On a GPU it is measured on the device, since the main thread only launches it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Busy:
    """Adds up one step."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Count what the block takes."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    @contextmanager
    def computing(self, *, alone: bool) -> Iterator[None]:
        """Count what the block's computation takes, if it needs no peers."""
        if not alone:
            yield
        elif not self._on_device:
            with self.loading():
                yield
        else:
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)

    def seconds(self) -> float:
        """Return the sum. What the device was given must be done (see ``Ranks.read``)."""
        milliseconds = sum(float(start.elapsed_time(end)) for start, end in self._events)
        return self._seconds + milliseconds / 1000
