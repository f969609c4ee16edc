"""Peak memory of a call.

Peaks are read off the resident set: unlike a count of PyTorch's tensors it misses nothing that a
kernel allocates itself.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_HIGH_WATER_MARK = "5"  # see proc_pid_clear_refs(5)

# An option of mallopt(3).
M_MMAP_THRESHOLD = -3
MAPPED_FROM = 2**18


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def missing(device: str) -> str | None:
    """A sentence why the peak memory of calls on ``device`` is not measured, or None."""
    if device != "cpu":
        return f"a process's resident set does not show {device}'s"
    if not _is_glibc():
        return "it needs Linux and glibc"
    if not os.access(CLEAR, os.W_OK):
        return f"{CLEAR} cannot be written"
    return None


def _map_large_blocks() -> None:
    """From now on, return large blocks as soon as they are freed."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)


def _resident(field: str) -> int:
    """Bytes in a field of this process's status."""
    lines = STATUS.read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(kilobytes)


def peak_growth(call: Callable[[], Any]) -> int:
    """Bytes by which the resident set grows at most during ``call``, at least a page.

    Never too few by more than a few hundred kilobytes, which is how the kernel counts; too many
    where glibc finds room for large blocks between older ones, see :func:`in_new_process`. What an
    earlier call left for later ones, such as a library's buffers, is not counted. From then on the
    process maps its large blocks anew for every call, which takes time: time first.
    """
    gc.collect()
    _map_large_blocks()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text(RESET_HIGH_WATER_MARK)
    before = _resident("VmRSS")
    call()
    return max(_resident("VmHWM") - before, os.sysconf("SC_PAGESIZE"))


def least_peak_growth(call: Callable[[], Any]) -> int:
    """The least :func:`peak_growth` of three calls, after one that makes what is kept."""
    call()
    return min(peak_growth(call) for _ in range(3))


def in_new_process(call: Callable[..., Result], *args: Any) -> Result:
    """What a module's function returns in a process that maps its large blocks from the start.

    In one that did not, calls of many blocks find room for some of them in what was freed before,
    and what lies between stays resident with them: their peak is higher, and differs each time.
    """
    spawned = get_context("spawn")
    with ProcessPoolExecutor(1, spawned, initializer=_map_large_blocks) as executor:
        return executor.submit(call, *args).result()
