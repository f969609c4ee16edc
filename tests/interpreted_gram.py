"""The Triton Gram kernels on CPU tensors; run by test_interpreted.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from cases import GRAM_ROWS
from oracle import assert_symmetric, assert_within_budget, lower_only, poisoned, spread
from oracle import gram as oracle_gram
from torch import Tensor
from triton_kernels import cropped, rounded

from kfac_fast import reference
from kfac_fast.kernels import gram as kernels
from kfac_fast.kernels import launch
from kfac_fast.kernels.product import PRODUCTS
from kfac_fast.kernels.triangle import triangle_row
from kfac_fast.schema import result_shape

# With rows for more than one chain and columns for more than one tile.
ROWS = {**GRAM_ROWS, "many-rows": (1100, 6), "wide": (40, 260)}


def _check(
    x: Tensor,
    mask: Tensor | None = None,
    groups: int = 1,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    precision: str = "highest",
    old: Tensor | None = None,
) -> None:
    shape = result_shape("gram", x, mask, groups, bias)
    expected = alpha * oracle_gram(x, mask, groups, bias)
    out, torch_result = poisoned(*shape), poisoned(*shape)
    if old is not None:
        expected += beta * old.double()
        out, torch_result = lower_only(old), old.clone()
    reference.gram(rounded(x, precision), mask, groups, bias, alpha, beta, torch_result)
    kernels.gram(x, mask, groups, bias, alpha, beta, out, precision)
    assert_symmetric(out)
    assert_within_budget(out, torch_result, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS.keys())
def test_result(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    _check(torch.randn(shape).to(dtype), bias=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_all_options(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 11, 3 * 70).to(dtype)
    mask = torch.rand(7, 11) < 0.6
    x[~mask] = torch.nan
    old = torch.randn(3, 71, 71)
    _check(x, mask, groups=3, bias=True, alpha=0.3, beta=0.9, old=old + old.mT)


@pytest.mark.parametrize("precision", PRODUCTS)
@pytest.mark.parametrize("bias", (False, True))
def test_precisions(precision: str, bias: bool) -> None:
    torch.manual_seed(0)
    _check(torch.randn(600, 40), bias=bias, precision=precision)


@pytest.mark.parametrize("dtype, masked", [(torch.float32, False), (torch.bfloat16, True)])
def test_large_tiles_and_long_sums(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(launch.ROWS_PER_CHAIN + 90, 504).to(dtype)
    mask = torch.rand(len(x)) < 0.9 if masked else None
    assert launch.gram_tiling(x.shape[1], 6, x.element_size(), True, 90).block == 128
    _check(x, mask, bias=True)


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def _expanded(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("layout", (spread, _channels_first, cropped, _expanded))
@pytest.mark.parametrize("features", (24, 35))
def test_strides(layout: Callable[[Tensor], Tensor], features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = layout(torch.randn(3, 4, 16, features).to(dtype))
    mask = spread(torch.rand(3, 4, 16) < 0.6)
    for m in (None, mask):
        _check(x, m, bias=True)


def test_everything_masked() -> None:
    out = poisoned(41, 41)
    x, mask = torch.full((30, 40), torch.nan), torch.zeros(30, dtype=torch.bool)
    kernels.gram(x, mask, 1, True, 1.0, 0.0, out, "highest")
    assert torch.equal(out, torch.zeros(41, 41))


def test_wide_strides() -> None:
    # Untouched pages take no memory.
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    for features in (20, 24):  # the latter is read in chunks
        x = storage.as_strided((2, features), (2**31, 1)).copy_(torch.randn(2, features))
        _check(x)
        _check(x.mT)


def test_tiles_of_the_triangle() -> None:
    @triton.jit
    def rows_kernel(out, COUNT: tl.constexpr):
        tile = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
        tl.store(out + tile, triangle_row(tile))

    count = 4096
    rows = torch.empty(64 * count, dtype=torch.int32)
    rows_kernel[(64,)](rows, COUNT=count)
    expected = torch.arange(725).repeat_interleave(torch.arange(1, 726))[: len(rows)]
    assert torch.equal(rows.long(), expected)
