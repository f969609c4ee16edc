"""The Triton kernel of preconditioning without a GPU: compiled."""

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

from kfac_fast.kernels import precondition as kernels  # noqa: E402
from kfac_fast.kernels.product import PRODUCTS  # noqa: E402


def _compile(
    capability: int, shapes: list[tuple[int, int]], precision: str = "highest"
) -> dict[str, Any]:
    """The kernel of the last product, with that of the inner products."""
    grads = [torch.zeros(shape) for shape in shapes]
    sides = [[torch.zeros(shape[i], shape[i]) for shape in shapes] for i in (1, 0)]
    out = [torch.zeros(shape) for shape in shapes]
    with compiled_only(capability) as compiled:
        kernels.precondition(grads, *sides, out, torch.zeros(()), precision)
    return compiled


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("precision", PRODUCTS)
@pytest.mark.parametrize("columns", [128, 129], ids=["in chunks", "one by one"])
def test_compiles_without_spills(
    record_property: Callable[[str, str], None],
    capability: int,
    precision: str,
    columns: int,
) -> None:
    compiled = _compile(capability, [(64, columns)], precision)
    statistics = assert_no_spills(compiled, capability, record_property)["product_kernel"]
    assert_multiplies_on_tensor_cores(statistics, capability, 64)
    assert bool(statistics.count("cp.async.cg.shared.global")) == (columns == 128)  # 16 bytes


def test_one_compilation_serves_all_lists() -> None:
    lists = [[(4, 4)], [(64, 128)] * 2, [(16, 32)] * 16]
    assert len({_compile(90, shapes)["product_kernel"].hash for shapes in lists}) == 1
