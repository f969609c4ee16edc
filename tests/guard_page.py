"""Memory that ends where nothing may be read."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

NO_ACCESS = 0


@contextmanager
def before_a_guard_page(x: Tensor) -> Iterator[Tensor]:
    """A contiguous copy that ends with a page whose successor must not even be read."""
    size = math.ceil(x.nbytes / mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    buffer = torch.frombuffer(memory, dtype=x.dtype)
    place = size // x.element_size()
    copy = buffer[place - x.numel() : place].view(x.shape)
    copy.copy_(x)
    guard, page = ctypes.c_void_p(buffer.data_ptr() + size), ctypes.c_size_t(mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(guard, page, NO_ACCESS) == 0
    yield copy
