"""The C++ Gram kernel with every instruction set that this processor has."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable

import oracle
import pytest
import torch
from cases import FLOATING
from guard_page import before_a_guard_page
from oracle import (
    assert_symmetric,
    assert_within_budget,
    lower_only,
    poisoned,
    spread,
    whole_numbers,
)
from torch import Tensor

from kfac_fast import reference
from kfac_fast.backends import native
from kfac_fast.schema import result_dtype, result_shape

pytestmark = pytest.mark.usefixtures("one_thread", "instruction_set", "seed")
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=str)

# Columns about the edges of vectors, panels and tiles of every instruction set.
COLUMNS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 23, 24, 25, 31, 33, 47, 48, 49)
MORE_COLUMNS = (64, 95, 96, 97, 127, 128, 129, 144, 145, 192, 200)
# Rows about the edges of a block; many enough to be shared out by rows, or too few.
ROWS = (0, 1, 2, 7, 16, 255, 256, 257, 1300)


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


def run(
    x: Tensor,
    mask: Tensor | None = None,
    groups: int = 1,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        shape = result_shape("gram", x, mask, groups, bias)
        out = poisoned(*shape, dtype=result_dtype(x.dtype))
    assert native.gram(x, mask, groups, bias, alpha, beta, out) is out
    return out


def check(x: Tensor, mask: Tensor | None = None, groups: int = 1, bias: bool = False) -> None:
    out = run(x, mask, groups, bias)
    torch_result = torch.empty_like(out)
    reference.gram(x, mask, groups, bias, 1.0, 0.0, torch_result)
    assert_within_budget(out, torch_result, oracle.gram(x, mask, groups, bias))
    assert_symmetric(out)


@dtypes
def test_edges_of_panels_and_blocks(dtype: torch.dtype) -> None:
    few = dtype == torch.float64  # its oracle in extended precision is slow
    for columns in COLUMNS if few else COLUMNS + MORE_COLUMNS:
        for rows in ROWS[:-1] if few else ROWS:
            x = whole_numbers(rows, columns, dtype=dtype)  # exact, so every entry is compared
            expected = x.double().T @ x.double()
            assert torch.equal(run(x).double(), expected), (rows, columns)
            assert torch.equal(run(x, bias=True).double(), oracle.gram(x.float(), bias=True))
    for columns, rows in ((33, 600), (100, 150), (145, 40)):
        check(torch.randn(rows, columns).to(dtype), bias=True)


@pytest.mark.parametrize("rows", [17, 33, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_few_rows_are_stored_as_they_are_multiplied(rows: int, dtype: torch.dtype) -> None:
    for columns in (96, 112, 144, 208, 400):
        for groups in (1, 2):
            x = whole_numbers(rows, groups * columns, dtype=dtype)
            expected = oracle.gram(x, groups=groups)
            assert torch.equal(run(x, groups=groups).double(), expected)
            start = torch.ones_like(expected).to(dtype)
            assert torch.equal(run(x, groups=groups, beta=1.0, out=start).double(), expected + 1)


@pytest.mark.parametrize("columns, dtype", [(2560, torch.float32), (1792, torch.float64)])
@pytest.mark.parametrize("rows", [8, 20, 600])
@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (2.0, 1.0)])
def test_results_larger_than_the_caches(
    columns: int, dtype: torch.dtype, rows: int, alpha: float, beta: float
) -> None:
    """Where vectors are lines, written past them if rows are aligned and nothing is read."""
    x = whole_numbers(rows, columns, dtype=dtype)
    product = x.double().T @ x.double()
    for shift in (0, 1):  # the second is not aligned
        memory = torch.ones(columns * columns + shift, dtype=dtype)
        out = run(x, alpha=alpha, beta=beta, out=memory[shift:].view(columns, columns))
        assert torch.equal(out.double(), alpha * product + beta)


@pytest.mark.parametrize("groups", [1, 2])
def test_large_results_with_a_bias(groups: int) -> None:
    """Lines, perhaps written past the caches, meet ragged last columns and those of the bias."""
    x = whole_numbers(8, groups * 2559, dtype=torch.float32)
    assert torch.equal(
        run(x, groups=groups, bias=True).double(), oracle.gram(x, groups=groups, bias=True)
    )


@dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_groups_narrower_and_wider_than_a_vector(dtype: torch.dtype, bias: bool) -> None:
    narrow = ((2, 1), (70, 1), (40, 2), (7, 3), (5, 7))
    for groups, width in (*narrow, (3, 16), (4, 17), (2, 50), (2, 210)):
        for rows in (5, 300, 900):
            x = torch.randn(rows, groups * width).to(dtype)
            check(x, groups=groups, bias=bias)
            check(x, torch.rand(rows) < 0.5, groups=groups, bias=bias)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "channels-before-batch": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "columns-of-a-wider-one": lambda x: torch.cat([x, x, x], -1)[..., 5 : 5 + x.shape[-1]],
    "every-second-column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every-second-row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "one-row-repeated": lambda x: x[:1, :1, :1].expand_as(x),
    "with-gaps-and-reversed": spread,
}


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    for shape in ((3, 1, 5, 12), (9, 7, 7, 26), (2, 16, 20, 60), (1, 70, 4, 130)):
        x = layout(torch.randn(shape).to(dtype))
        mask = spread(torch.rand(shape[:-1]) < 0.7)
        check(x)
        check(x, mask, groups=2, bias=True)


@dtypes
def test_masks_leave_rows_out(dtype: torch.dtype) -> None:
    """Whatever a row holds that does not count, it is not seen: not even multiplied by zero."""
    x = torch.randn(1100, 37).to(dtype)
    masks = {
        "none": torch.zeros(1100, dtype=torch.bool),
        "alternating": torch.arange(1100) % 2 == 1,
        "not the first block": torch.arange(1100) >= 300,
        "only the last": torch.arange(1100) == 1099,
    }
    for mask in masks.values():
        dirty = torch.where(mask[:, None], x, math.nan)
        assert torch.equal(run(dirty, mask, bias=True), run(x, mask, bias=True))
        check(x, mask, bias=True)
        assert run(dirty, mask, bias=True)[-1, -1] == mask.sum()


@dtypes
@pytest.mark.parametrize(("alpha", "beta"), [(0.05, 0.95), (2.0, 1.0), (0.0, 0.5), (3.0, 0.0)])
def test_accumulates_on_the_lower_triangle(dtype: torch.dtype, alpha: float, beta: float) -> None:
    for rows, columns, groups in ((40, 130, 1), (0, 70, 1), (700, 60, 1), (90, 24, 8), (9, 66, 2)):
        x = torch.randn(rows, columns).to(dtype)
        edge = columns // groups + 1
        before = torch.randn(groups, edge, edge, dtype=result_dtype(dtype))
        before = (before + before.mT) if groups > 1 else (before + before.mT)[0]
        start = lower_only(before) if beta else torch.full_like(before, math.nan)
        out = run(x, None, groups, True, alpha, beta, start.clone())
        torch_result = start.clone()
        reference.gram(x, None, groups, True, alpha, beta, torch_result)
        plain = oracle.gram(x, None, groups, True)
        assert_within_budget(out, torch_result, beta * before.double() + alpha * plain)
        assert_symmetric(out)


@pytest.mark.parametrize("shape", [(1500, 520), (900, 700), (300, 1100)], ids=str)
def test_rounds_of_blocks(shape: tuple[int, int], set_threads: Callable[[int], None]) -> None:
    """Many columns: blocks are packed into a few buffers that are used again and again."""
    x, mask = whole_numbers(*shape, dtype=torch.float32), torch.rand(shape[0]) < 0.5
    expected, expected_of_some = oracle.gram(x, bias=True), oracle.gram(x, mask)
    for threads in (1, 2, 4):
        set_threads(threads)
        assert torch.equal(run(x, bias=True).double(), expected)
        assert torch.equal(run(x, mask).double(), expected_of_some)


@pytest.mark.parametrize(
    "shape", [(20000, 20), (3000, 90), (1000, 600), (70, 500), (9, 1000)], ids=str
)
def test_same_bits_every_time_and_for_any_number_of_threads(
    shape: tuple[int, int], set_threads: Callable[[int], None]
) -> None:
    x, mask = torch.randn(shape), torch.rand(shape[0]) < 0.9
    results = []
    for threads in (1, 1, 2, 3, 5):
        set_threads(threads)
        results.append(run(x, mask, bias=True))
    assert all(torch.equal(out, results[0]) for out in results)


@dtypes
@pytest.mark.parametrize("columns", [1, 5, 16, 30, 50, 100])
def test_reads_nothing_beyond_the_end(dtype: torch.dtype, columns: int) -> None:
    rows = mmap.PAGESIZE * 50 // (columns * torch.empty(0, dtype=dtype).element_size())
    rows = rows // 256 * 256  # whole blocks
    with before_a_guard_page(whole_numbers(rows, columns, dtype=dtype)) as x:
        expected = x.double().T @ x.double()
        assert torch.equal(run(x).double(), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_writes_nothing_beyond_the_end(
    dtype: torch.dtype, bias: bool, set_threads: Callable[[int], None]
) -> None:
    """Of few rows, whose whole vectors reach from one row of the result into the next."""
    set_threads(2)
    for columns in (9, 25, 47, 49, 97, 130):
        for groups, rows in ((1, 3), (3, 8), (40, 4)):
            x = whole_numbers(rows, groups * columns, dtype=dtype)
            nothing = poisoned(*result_shape("gram", x, None, groups, bias), dtype=dtype)
            with before_a_guard_page(nothing) as out:
                run(x, None, groups, bias, out=out)
                assert torch.equal(out.double(), oracle.gram(x, groups=groups, bias=bias))


def test_threads_write_nothing_of_each_others_rows(set_threads: Callable[[int], None]) -> None:
    """Where one's last vector would reach into the other's first row, stored long before."""
    set_threads(2)
    x = whole_numbers(4, 1001, dtype=torch.float32)
    for _ in range(5):
        assert torch.equal(run(x).double(), oracle.gram(x))


def test_refuses_an_out_of_another_size_or_dtype() -> None:
    x = torch.ones(3, 4)
    for out in (torch.zeros(3, 3), torch.zeros(4, 4).double(), torch.zeros(4, 8)[:, ::2]):
        assert native.gram(x, None, 1, False, 1.0, 0.0, out) is None
        assert not out.any()


def test_small_half_precision_is_read_where_denormals_are_flushed() -> None:
    x = torch.full((64, 8), 3e-5, dtype=torch.float16)
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    expected = every.double().square()
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("the processor does not flush denormals")
        small = run(x)
        alone = torch.stack([run(every[i : i + 1, None])[0, 0] for i in range(0, len(every), 97)])
    finally:
        torch.set_flush_denormal(False)
    assert (small.double() / (64 * x[0, 0].double() ** 2) - 1).abs().max() < 1e-6
    assert (alone.double() / expected[::97] - 1).abs()[expected[::97] > 0].max() < 1e-6
