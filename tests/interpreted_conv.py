"""The Triton kernels of convolutions on CPU tensors; run by test_interpreted.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CONVOLUTIONS, Convolution
from conv_kernels import OPERATORS, geometry_of, run
from oracle import assert_symmetric, assert_within_budget, lower_only, poisoned, spread
from torch import Tensor
from triton_kernels import cropped, rounded

from kfac_fast import reference
from kfac_fast.kernels import launch
from kfac_fast.kernels.product import PRODUCTS
from kfac_fast.schema import result_shape

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    # Lanes outside of the matrix, and column sums of cells that have none, hold whatever was in
    # memory; NumPy, which the interpreter adds with, warns of it.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
kernels = pytest.mark.parametrize("kernel", OPERATORS)
expand_kernels = pytest.mark.parametrize("kernel", ("conv_offset_gram", "conv_patch_gram"))


def _reference(
    kernel: str, x: Tensor, case: Convolution, accumulation: tuple, precision: str
) -> None:
    """PyTorch's result at a matmul precision."""
    arguments = geometry_of(case).arguments()
    if kernel != "conv_reduce_gram":
        x = rounded(x, precision).float()
        getattr(reference, OPERATORS[kernel])(x, *arguments, *accumulation)
        return
    bias, *rest = accumulation
    shape = result_shape("conv_window_sum", x, *arguments, False)
    sums = poisoned(*shape)
    reference.conv_window_sum(x.float(), *arguments, False, 1.0, 0.0, sums)
    means = (sums / torch.Size(geometry_of(case).output_size(case.size)).numel()).flatten(1)
    reference.gram(rounded(means, precision), None, case.groups, bias, *rest)


def _check(
    kernel: str,
    x: Tensor,
    case: Convolution,
    bias: bool = True,
    alpha: float = 1.0,
    beta: float = 0.0,
    precision: str = "highest",
) -> None:
    """Check a kernel; with ``beta``, accumulating into a random result."""
    op, geometry = OPERATORS[kernel], geometry_of(case)
    shape = result_shape(op, x, *geometry.arguments(), bias)
    symmetric = op != "conv_window_sum"
    out, torch_result = poisoned(*shape), poisoned(*shape)
    if beta:
        torch_result = torch.randn(shape)
        if symmetric:
            torch_result += torch_result.mT.clone()
        out = lower_only(torch_result) if symmetric else torch_result.clone()
    expected = torch_result.double()
    getattr(reference, op)(x.double(), *geometry.arguments(), bias, alpha, beta, expected)
    _reference(kernel, x, case, (bias, alpha, beta, torch_result), precision)
    run(kernel, x, geometry, bias, alpha, beta, out, precision)
    if symmetric:
        assert_symmetric(out)
    assert_within_budget(out, torch_result, expected)


# The reduced Gram only divides the window sums and hands them on.
@pytest.mark.parametrize("kernel", [k for k in OPERATORS if k != "conv_reduce_gram"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_result(kernel: str, name: str) -> None:
    torch.manual_seed(0)
    case = CONVOLUTIONS[name]
    # The dtypes take turns, because the interpreter is slow.
    turn = [*CONVOLUTIONS].index(name) + [*OPERATORS].index(kernel)
    _check(kernel, torch.randn(3, case.channels, *case.size).to(DTYPES[turn % 3]), case)


ACCUMULATING = Convolution(6, (4, 5), {"kernel_size": (2, 3), "padding": 1, "groups": 2})


@kernels
@pytest.mark.parametrize(
    "dtype, bias", [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)]
)
def test_accumulates(kernel: str, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 5).to(dtype)
    _check(kernel, x, ACCUMULATING, bias, alpha=0.3, beta=0.9)


@pytest.mark.parametrize("kernel", [k for k in OPERATORS if k != "conv_window_sum"])
@pytest.mark.parametrize("precision", PRODUCTS)
def test_precisions(kernel: str, precision: str) -> None:
    torch.manual_seed(0)
    case = Convolution(24, (50,), {"kernel_size": 2})
    _check(kernel, torch.randn(7, 24, 50), case, precision=precision)


# Channels, groups: narrow groups that share a tile, the last of them alone; one tile; a tile for
# each group; several small ones; two large ones.
TILES = [
    (35, 7, torch.bfloat16),
    (24, 1, torch.float32),
    (96, 2, torch.bfloat16),
    (144, 1, torch.float32),
    (256, 1, torch.bfloat16),
]


@expand_kernels
@pytest.mark.parametrize("channels, groups, dtype", TILES)
def test_tiles(kernel: str, channels: int, groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = Convolution(channels, (5,), {"kernel_size": 2, "padding": 1, "groups": groups})
    _check(kernel, torch.randn(2, channels, 5).to(dtype), case)


@kernels
def test_long_sums(kernel: str) -> None:
    torch.manual_seed(0)
    size = (2, launch.ROWS_PER_CHAIN) if "expand" in OPERATORS[kernel] else (300, 3)
    case = Convolution(8, size, {"kernel_size": (1, 2)})
    _check(kernel, torch.randn(2, 8, *size).bfloat16(), case)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _expanded(x: Tensor) -> Tensor:
    return x[:1, :, :1].expand(x.shape)


@kernels
@pytest.mark.parametrize("layout", (spread, _channels_last, cropped, _expanded))
@pytest.mark.parametrize("channels, dtype", [(3, torch.float32), (32, torch.bfloat16)])
def test_strides(
    kernel: str, layout: Callable[[Tensor], Tensor], channels: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    case = Convolution(channels, (3, 8), {"kernel_size": (1, 2), "padding": (0, 1)})
    _check(kernel, layout(torch.randn(3, channels, 3, 8).to(dtype)), case)


@expand_kernels
@pytest.mark.parametrize(
    "channels, groups, dtype", [(34, 17, torch.float32), (36, 9, torch.bfloat16)]
)
def test_some_channels_of_wide_pixels(
    kernel: str, channels: int, groups: int, dtype: torch.dtype
) -> None:
    """The last groups' channels are no whole chunk, though strips and strides are."""
    torch.manual_seed(0)
    case = Convolution(channels, (3, 4), {"kernel_size": 2, "groups": groups})
    x = _channels_last(torch.randn(2, 40, 3, 4).to(dtype))[:, :channels]
    _check(kernel, x, case)


@kernels
def test_pixels_that_no_tap_reads(kernel: str) -> None:
    torch.manual_seed(0)
    case = Convolution(2, (5, 6), {"kernel_size": 1, "stride": (2, 3)})
    x = torch.randn(2, 2, 5, 6)
    unread = torch.ones(5, 6, dtype=torch.bool)
    unread[::2, ::3] = False
    x[..., unread] = torch.nan
    _check(kernel, x, case)


@kernels
def test_nan_stays_with_the_taps_that_read_it(kernel: str) -> None:
    case = Convolution(1, (4,), {"kernel_size": 2})
    x = torch.ones(1, 1, 4)
    x[..., 3] = torch.nan  # which the first tap does not read
    out = poisoned(*result_shape(OPERATORS[kernel], x, *geometry_of(case).arguments(), False))
    run(kernel, x, geometry_of(case), False, 1.0, 0.0, out)
    assert out.isnan().sum() == (1 if kernel == "conv_window_sum" else 3)


@kernels
@pytest.mark.parametrize("beta", (0.0, 0.5))
@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 0, 4), (2, 2, 0)])
def test_empty(kernel: str, shape: tuple[int, ...], beta: float) -> None:
    case = Convolution(shape[1], shape[2:], {"kernel_size": 3, "padding": 2})
    _check(kernel, torch.zeros(shape), case, beta=beta)


@kernels
def test_wide_strides(kernel: str) -> None:
    # Untouched pages take no memory.
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    case = Convolution(32, (3, 4), {"kernel_size": (1, 2)})
    for strides in ((2**31, 1, 128, 32), (2**31, 12, 4, 1), (400, 1, 2**30, 32)):
        x = storage.as_strided((2, 32, 3, 4), strides)
        _check(kernel, x.copy_(torch.randn(x.shape)), case)
