"""The Triton kernels of damped inverses without a GPU: compiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compile_kernels import compiled_only

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton_kernels import (  # noqa: E402
    SHARED_BYTES,
    assert_multiplies_on_tensor_cores,
    assert_no_spills,
)

from kfac_fast.kernels import damped_inverse as kernels  # noqa: E402

MULTIPLY = ("diagonal_kernel", "panel_kernel", "update_kernel")


def _compile(capability: int, sizes: list[int]) -> dict[str, Any]:
    matrices = [torch.zeros(size, size) for size in sizes]
    out = [torch.zeros_like(matrix) for matrix in matrices]
    info = torch.zeros(len(sizes), dtype=torch.int32)
    with compiled_only(capability) as compiled:
        kernels.damped_inverse(matrices, len(sizes) * [torch.tensor(0.1)], out, info, None)
    return compiled


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_compiles_without_spills(
    record_property: Callable[[str, str], None], capability: int
) -> None:
    statistics = assert_no_spills(_compile(capability, [100]), capability, record_property)
    assert len(statistics) == 5
    for kernel in MULTIPLY:
        assert_multiplies_on_tensor_cores(statistics[kernel], capability, kernels.BLOCK)


def test_one_compilation_serves_all_lists() -> None:
    lists = [[65], [128] * 2, [16, 300] * 8]
    for kernel in (*MULTIPLY, "load_kernel", "finish_kernel"):
        assert len({_compile(90, sizes)[kernel].hash for sizes in lists}) == 1
