"""What the tests of Triton kernels share: the bounds on a compiled kernel, and odd inputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from compile_kernels import Statistics, triton_statistics
from torch import Tensor

from kfac_fast.kernels.product import PRODUCTS

# Shared memory of a thread block, by compute capability.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
ARITHMETIC = [(torch.bfloat16, "highest"), *((torch.float32, precision) for precision in PRODUCTS)]

# Bits of float32 that survive in tf32 and in bfloat16; the interpreter's casts truncate.
SURVIVING = {"highest": -1, "high": ~0x1FFF, "medium": ~0xFFFF}


def assert_no_spills(
    kernels: dict[str, Any], capability: int, record_property: Callable[[str, str], None]
) -> dict[str, Statistics]:
    """Check that compiled kernels keep their registers and fit; their statistics by name."""
    all_statistics = {name: triton_statistics(kernel) for name, kernel in kernels.items()}
    for name, statistics in all_statistics.items():
        registers, stack, shared, _ = statistics
        line = f"{registers} registers, {stack} bytes stack, {shared} bytes shared"
        record_property(name, line)
        print(f"sm_{capability} {name}: {line}")
        assert stack == 0 and shared <= SHARED_BYTES[capability]
        _assert_running_products_keep_their_operands(kernels[name].asm["ttgir"])
    return all_statistics


def _assert_running_products_keep_their_operands(ttgir: str) -> None:
    """Check that loops which leave a product running have as many buffers for all of its operands.

    Triton may give an operand that something else reads, too, one buffer less, and loads into the
    one that the product still reads: https://github.com/triton-lang/triton/issues/6691.
    """
    buffers: list[int] = []
    for line in ttgir.splitlines():
        if found := re.search(r"ttg\.local_alloc.*memdesc<(\d+)x\d+x\d+x\w+", line):
            buffers.append(int(found[1]))
        elif re.search(r"warp_group_dot_wait.*pendings = [1-9]", line):
            assert len(set(buffers)) == 1, line
        elif "local_dealloc" in line:
            buffers.clear()


def assert_multiplies_on_tensor_cores(statistics: Statistics, capability: int, block: int) -> None:
    """Check for the device's product of its tiles; those below 64 are too small for the newer."""
    newer = capability >= 90 and block >= 64
    assert statistics.count("wgmma.mma_async" if newer else "mma.sync")


def rounded(x: Tensor, precision: str) -> Tensor:
    """What PyTorch multiplies at a matmul precision: tf32 for "high", bfloat16 for "medium"."""
    if x.dtype != torch.float32:
        return x
    return (x.contiguous().view(torch.int32) & SURVIVING[precision]).view(torch.float32)


def cropped(x: Tensor) -> Tensor:
    """The same values as the inside of a larger tensor: no two dimensions step evenly."""
    buffer = x.new_full([n + 3 for n in x.shape], torch.nan)
    view = buffer[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)
