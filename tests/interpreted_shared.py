"""The Triton kernels of shared positions on CPU tensors; run by test_interpreted.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import SHARED_SHAPES
from oracle import assert_symmetric, assert_within_budget, lower_only, poisoned, spread
from torch import Tensor
from triton_kernels import cropped, rounded

from kfac_fast import reference
from kfac_fast.kernels import launch
from kfac_fast.kernels.product import PRODUCTS
from kfac_fast.kernels.shared_gram import shared_gram
from kfac_fast.schema import result_shape

REDUCTIONS = ("mean", "sum")
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
# Also more positions than a program adds in a chain, and more columns than it reads at once.
SHAPES = {**SHARED_SHAPES, "long": (2, 1100, 5), "wide": (3, 4, 300), "no-features": (3, 4, 0)}


def _check(
    x: Tensor,
    reduction: str,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    num_segments: int = -1,
    groups: int = 1,
    bias: bool = True,
    alpha: float = 1.0,
    beta: float = 0.0,
    precision: str = "highest",
) -> None:
    """Check the kernels; with ``beta``, accumulating into a random result."""
    inputs = (mask, segments, num_segments, reduction, groups, bias)
    shape = result_shape("shared_gram", x, *inputs)
    out, torch_result = poisoned(*shape), poisoned(*shape)
    if beta:
        torch_result = torch.randn(shape)
        torch_result += torch_result.mT.clone()
        out = lower_only(torch_result)
    expected = torch_result.double()
    reference.shared_gram(x.double(), *inputs, alpha, beta, expected)
    if precision == "highest":
        reference.shared_gram(x, *inputs, alpha, beta, torch_result)
    else:  # it is the means that PyTorch rounds
        rows = rounded(x.float().flatten(1, -2).mean(1), precision)
        reference.gram(rows, None, groups, bias, alpha, beta, torch_result)
    shared_gram(x, *inputs, alpha, beta, out, precision)
    assert_symmetric(out)
    assert_within_budget(out, torch_result, expected)


@reductions
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("name", SHAPES)
def test_result(name: str, masked: bool, reduction: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(SHAPES[name])
    mask = torch.rand(x.shape[:-1]) < 0.6 if masked else None
    if masked:
        x[~mask] = torch.nan
    _check(x, reduction, mask)


@reductions
@pytest.mark.parametrize(
    "dtype, bias", [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)]
)
def test_all_options(dtype: torch.dtype, bias: bool, reduction: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 7, 3 * 24).to(dtype)
    mask = torch.rand(5, 3, 7) < 0.6
    mask[1] = False  # an example that adds nothing, not even its bias
    x[~mask] = torch.nan
    _check(x, reduction, mask, groups=3, bias=bias, alpha=0.3, beta=0.9)


@pytest.mark.parametrize("precision", PRODUCTS)
def test_precisions(precision: str) -> None:
    torch.manual_seed(0)
    _check(torch.randn(50, 4, 40), "mean", precision=precision)


@reductions
@pytest.mark.parametrize("dtype, masked", [(torch.float32, False), (torch.bfloat16, True)])
def test_segments(dtype: torch.dtype, masked: bool, reduction: str) -> None:
    torch.manual_seed(0)
    # In no order, some empty, one with most of the rows.
    segments = torch.randint(0, 40, (400,)).clamp(max=11)
    segments[segments == 3] = 4
    x = torch.randn(400, 24).to(dtype)
    mask = torch.rand(400) < 0.6 if masked else None
    if masked:
        x[~mask] = torch.nan
    for layout in (lambda x: x, spread, lambda x: x.T.contiguous().T):
        masks = None if mask is None else spread(mask)
        _check(layout(x), reduction, masks, segments, num_segments=14)


@reductions
@pytest.mark.parametrize("rows, num_segments", [(0, 0), (0, 3), (5, 8)])
def test_few_rows_and_segments(rows: int, num_segments: int, reduction: str) -> None:
    x, segments = torch.ones(rows, 4), torch.zeros(rows, dtype=torch.int64)
    _check(x, reduction, None, segments, num_segments, beta=0.5)


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def _expanded(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


@pytest.mark.parametrize("layout", (spread, _channels_first, cropped, _expanded))
@pytest.mark.parametrize("features, dtype", [(35, torch.float32), (24, torch.bfloat16)])
def test_strides(layout: Callable[[Tensor], Tensor], features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = layout(torch.randn(3, 4, 8, features).to(dtype))
    for mask in (None, spread(torch.rand(3, 4, 8) < 0.6)):
        _check(x, "mean", mask)


@pytest.mark.parametrize("layout", (lambda x: x, _channels_first))
def test_sums_of_many_positions(layout: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = layout(torch.randn(1, 4 * 64 * launch.STEPS_PER_SUM, 8))
    _check(x, "sum")


def test_wide_strides() -> None:
    # Untouched pages take no memory.
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    for strides in ((2**31, 16, 1), (64, 2**30, 1), (2**31, 1, 8)):
        x = storage.as_strided((2, 3, 16), strides)
        _check(x.copy_(torch.randn(x.shape)), "mean")
