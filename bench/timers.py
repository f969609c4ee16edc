"""Seconds that one call takes, on the CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

Timer = Callable[[Callable[[], Any]], float]


def wall_clock(call: Callable[[], Any]) -> float:
    """Seconds of one call on the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class DeviceClock:
    """Seconds of one call on the GPU's own clock, its inputs not cached.

    Overwriting a buffer larger than the L2 cache evicts the inputs, and keeps the GPU busy while
    the host queues the call's kernels: launches that fit behind it are not timed.
    """

    def __init__(self) -> None:
        self._evict = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)

    def __call__(self, call: Callable[[], Any]) -> float:
        self._evict.zero_()
        self._start.record()
        call()
        self._stop.record()
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1e3


@cache
def timer_of(device: str) -> Timer:
    """The timer for calls on ``device``."""
    return DeviceClock() if device == "cuda" else wall_clock
