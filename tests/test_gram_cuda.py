"""The CUDA C++ Gram kernels without a GPU: compiled by nvcc, and run on the CPU by emulation."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import GRAM_ROWS
from cuda_sources import (
    assert_compiles_without_spills,
    assert_every_barrier_is_needed,
    assert_loads_where_torch_has_no_cuda,
    emulation,
    integers,
)
from oracle import assert_symmetric, assert_within_budget, bits, lower_only, poisoned, spread
from oracle import gram as oracle_gram
from torch import Tensor

from kfac_fast import reference
from kfac_fast.schema import result_dtype, result_shape

# Element type and tile of every instantiation.
KERNELS = {
    "float_64": torch.float32,
    "float_128": torch.float32,
    "bfloat16_64": torch.bfloat16,
    "bfloat16_128": torch.bfloat16,
    "half_64": torch.float16,
    "half_128": torch.float16,
    "double_64": torch.float64,
}
# With rows for more than one chain and columns for more than one tile.
ROWS = {**GRAM_ROWS, "many-rows": (1100, 6), "wide": (40, 260)}


class Arguments(ctypes.Structure):
    """The struct of the same name in ``emulate_gram.cpp``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("dimensions", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("mask_strides", ctypes.POINTER(ctypes.c_int64)),
        ("width", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("bias", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("beta", ctypes.c_double),
        ("out", ctypes.c_void_p),
        ("split", ctypes.c_int64),
        ("descending", ctypes.c_int64),
    )


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    return emulation("gram")


def _launch(
    library: ctypes.CDLL,
    kernel: str,
    x: Tensor,
    descending: bool,
    mask: Tensor | None = None,
    groups: int = 1,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    split: int = 1,
    old: Tensor | None = None,
) -> Tensor:
    shape = result_shape("gram", x, mask, groups, bias)
    dtype = result_dtype(x.dtype)
    out = poisoned(*shape, dtype=dtype) if old is None else lower_only(old)
    arguments = Arguments(
        x.data_ptr(),
        None if mask is None else mask.data_ptr(),
        x.dim() - 1,
        integers(x.shape[:-1]),
        integers(x.stride()[:-1]),
        integers((0,) * (x.dim() - 1) if mask is None else mask.stride()),
        x.shape[-1] // groups,
        x.stride(-1),
        groups,
        bias,
        alpha,
        beta,
        out.data_ptr(),
        split,
        descending,
    )
    assert getattr(library, f"gram_{kernel}")(ctypes.byref(arguments)) >= 0
    return out


def _run(
    library: ctypes.CDLL,
    kernel: str,
    x: Tensor,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The result, after checking that it does not depend on the order of the threads."""
    results = [
        _launch(library, kernel, x, descending, mask, **options) for descending in (False, True)
    ]
    assert torch.equal(bits(results[0]), bits(results[1]))
    assert_symmetric(results[0])
    return results[0]


def _check(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    groups: int = 1,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    old: Tensor | None = None,
) -> None:
    expected = alpha * oracle_gram(x, mask, groups, bias)
    torch_result = poisoned(*out.shape, dtype=out.dtype)
    if old is not None:
        expected += beta * old.double()
        torch_result = old.clone()
    reference.gram(x, mask, groups, bias, alpha, beta, torch_result)
    assert_within_budget(out, torch_result, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS.keys())
def test_result(emulated: ctypes.CDLL, kernel: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(KERNELS[kernel])
    for split in (1, 3):
        _check(_run(emulated, kernel, x, bias=True, split=split), x, bias=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_options(emulated: ctypes.CDLL, kernel: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 11, 3 * 70, dtype=torch.float64).to(KERNELS[kernel])
    mask = torch.rand(7, 11) < 0.6
    x[~mask] = torch.nan
    old = torch.randn(3, 71, 71, dtype=result_dtype(x.dtype))
    old = old + old.mT
    options = {"mask": mask, "groups": 3, "bias": True, "alpha": 0.3, "beta": 0.9, "old": old}
    _check(_run(emulated, kernel, x, split=2, **options), x, **options)


def _cropped(x: Tensor) -> Tensor:
    """The same values as the inside of a larger tensor: no two dimensions step evenly."""
    buffer = x.new_full([n + 3 for n in x.shape], torch.nan)
    view = buffer[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


@pytest.mark.parametrize("layout", [spread, _cropped, lambda x: x.mT.contiguous().mT])
@pytest.mark.parametrize("kernel", ["float_64", "bfloat16_128", "double_64"])
def test_strides(emulated: ctypes.CDLL, kernel: str, layout: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = layout(torch.randn(3, 4, 9, 70, dtype=torch.float64).to(KERNELS[kernel]))
    mask = spread(torch.rand(3, 4, 9) < 0.6)
    for m in (None, mask):
        _check(_run(emulated, kernel, x, m, bias=True, split=2), x, m, bias=True)


@pytest.mark.parametrize("kernel", ["float_64", "float_128"])
def test_everything_masked(emulated: ctypes.CDLL, kernel: str) -> None:
    x = torch.full((40, 70), torch.nan)
    out = _run(emulated, kernel, x, torch.zeros(40, dtype=torch.bool), bias=True)
    assert torch.equal(out, torch.zeros(71, 71))


def test_wide_strides(emulated: ctypes.CDLL) -> None:
    # Untouched pages take no memory.
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    x = storage.as_strided((3, 20), (2**30, 1)).copy_(torch.randn(3, 20))
    _check(_run(emulated, "bfloat16_64", x), x)
    _check(_run(emulated, "bfloat16_64", x.mT), x.mT)


def test_merged_axes(emulated: ctypes.CDLL) -> None:
    x, out = torch.randn(5, 3, 4, 2), torch.empty(2, 2)
    for view, axes in ((x, 1), (x[:, :, :3], 2), (x[:, :2, :3], 3), (x[:, :, :1], 1)):
        shape, strides = integers(view.shape[:-1]), integers(view.stride()[:-1])
        arguments = Arguments(
            view.data_ptr(), None, 3, shape, strides, integers((0, 0, 0)), 2, 1, 1, 0, 1.0, 0.0,
            out.data_ptr(), 1, 0,
        )  # fmt: skip
        assert emulated.gram_float_64(ctypes.byref(arguments)) == axes


def test_tiles_of_the_triangle(emulated: ctypes.CDLL) -> None:
    side = 400
    tiles = side * (side + 1) // 2
    row, column = emulated.lower_tile_row, emulated.lower_tile_column
    row.argtypes = column.argtypes = (ctypes.c_int64,)
    found = [(row(n), column(n)) for n in range(tiles)]
    assert found == [(i, j) for i in range(side) for j in range(i + 1)]


def test_split_fills_the_device(emulated: ctypes.CDLL) -> None:
    split = emulated.gram_split_of
    split.argtypes, split.restype = (ctypes.c_int64,) * 4, ctypes.c_int64
    assert split(1, 0, 65536, 132) == 1
    assert split(1, 16, 65536, 132) == 1
    assert split(132, 65536, 65536, 132) == 1
    assert split(10**6, 65536, 65536, 132) == 1  # no room for more
    for tiles in (21, 36, 136, 300):
        parts = split(tiles, 65536, 65536, 132)
        busiest = -(-tiles * parts // 132) / parts
        assert busiest <= 1.1 * tiles / 132


def test_every_barrier_is_needed(emulated: ctypes.CDLL) -> None:
    x = torch.randn(70, 40)

    def run(descending: bool) -> Tensor:
        return _launch(emulated, "float_64", x, descending, bias=True, split=2)

    assert_every_barrier_is_needed(emulated, run, "gram.cuh")


def test_loads_where_torch_has_no_cuda() -> None:
    assert_loads_where_torch_has_no_cuda("gram", "gram")


def test_compiles_without_spills(record_property: Callable[[str, str], None]) -> None:
    finishing = 2
    assert_compiles_without_spills("gram", len(KERNELS) + finishing, record_property)
