"""What the host gets to know without waiting for a device."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def known_true(flags: Tensor) -> bool:
    """Whether all are true, as far as the host knows without waiting for a device."""
    return flags.is_cpu and bool(flags.all())


class HostCopy:
    """An int64 number on its way from its device to the host."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def send(self, number: Tensor) -> None:
        """Start to copy a number; what was on its way before is dropped.

        Args:
            number: int64 scalar tensor.
        """
        on_gpu = number.is_cuda
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return  # a replay would send it to where nobody looks
        self._copy = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self._copy.copy_(number, non_blocking=True)
        self._arrived = None
        if on_gpu:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(number.device))

    def read(self) -> int | None:
        """The number, or None if none was sent, or it is not known whether it has arrived."""
        if self._copy is None:
            return None
        if self._arrived is not None:
            # A query would break off the capture of a graph.
            if torch.cuda.is_current_stream_capturing() or not self._arrived.query():
                return None
        # item() would be a wait, at least for whoever looks for them.
        return ctypes.c_int64.from_address(self._copy.data_ptr()).value
