"""The C++ kernel of sums and means over shared positions or segments."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import FLOATING
from guard_page import before_a_guard_page
from oracle import (
    assert_same,
    assert_symmetric,
    assert_within_budget,
    lower_only,
    poisoned,
    spread,
    whole_numbers,
)
from torch import Tensor

import kfac_fast
from kfac_fast import ops, reference
from kfac_fast.backends import native
from kfac_fast.schema import result_dtype, result_shape

pytestmark = pytest.mark.usefixtures("one_thread", "instruction_set", "seed")
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=str)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


def run(
    x: Tensor,
    reduction: str = "sum",
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    num_segments: int = -1,
    groups: int = 1,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
    implementation: Callable[..., Tensor | None] = native.shared_gram,
) -> Tensor:
    inputs = (x, mask, segments, num_segments, reduction, groups, bias)
    if out is None:
        out = poisoned(*result_shape("shared_gram", *inputs), dtype=result_dtype(x.dtype))
    result = implementation(*inputs, alpha, beta, out)
    assert result is (out if implementation is native.shared_gram else None)
    return out


def check(x: Tensor, **options) -> None:
    out = run(x, **options)
    torch_result = run(x, **options, implementation=reference.shared_gram)
    ref64 = run(x.double(), **options, implementation=reference.shared_gram)
    if x.dtype == torch.float64:  # the reference itself, rounded in an order of its own
        assert_same(out, ref64)
    else:
        assert_within_budget(out, torch_result, ref64)
    assert_symmetric(out)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels-first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "columns-of-a-wider-one": lambda x: torch.cat([x, x, x], -1)[..., 5 : 5 + x.shape[-1]],
    "every-second-column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "sequence-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one-position-repeated": lambda x: x[:, :1].expand_as(x),
    "with-gaps-and-reversed": spread,
}


@dtypes
@reductions
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(
    dtype: torch.dtype, reduction: str, layout: Callable[[Tensor], Tensor]
) -> None:
    for shape in ((3, 7, 12), (5, 70, 33), (2, 4, 16, 40), (1, 300, 300)):
        x = layout(torch.randn(shape).to(dtype))
        mask = spread(torch.rand(shape[:-1]) < 0.6)
        check(x, reduction=reduction)
        check(x, reduction=reduction, mask=mask, groups=1 + (shape[-1] % 2 == 0), bias=True)


@dtypes
def test_edges_of_vectors(dtype: torch.dtype) -> None:
    for columns in (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 130):
        for positions in (0, 1, 2, 3, 4, 5, 9):
            x = whole_numbers(2, positions, columns, dtype=dtype)
            for view in (x, LAYOUTS["channels-first"](x)):
                rows = view.double().sum(1)
                assert torch.equal(run(view).double(), rows.T @ rows)


@dtypes
@reductions
def test_segments(dtype: torch.dtype, reduction: str) -> None:
    """Rows in any order, some segments without any, as a loop over the segments."""
    x = torch.randn(500, 37).to(dtype)
    segments = torch.randint(40, (500,)).clamp(max=35)
    mask = torch.rand(500) < 0.7
    for view in (x, spread(x)):
        for m in (None, mask):
            options = {"segments": spread(segments), "num_segments": 40, "reduction": reduction}
            check(view, mask=m, bias=True, **options)


@reductions
def test_positions_that_are_masked_do_not_count(reduction: str) -> None:
    x, mask = torch.randn(6, 50, 20), torch.rand(6, 50) < 0.5
    mask[2] = False
    dirty = torch.where(mask[..., None], x, math.nan)
    options = {"reduction": reduction, "bias": True}
    assert torch.equal(run(dirty, mask=mask, **options), run(x, mask=mask, **options))
    segments = torch.arange(6).repeat_interleave(50)
    rows = {"mask": mask.flatten(), "segments": segments, "num_segments": 6}
    together = run(dirty.flatten(0, 1), **rows, **options)
    ref64 = run(x.double(), mask=mask, **options, implementation=reference.shared_gram)
    plain = run(x, mask=mask, **options, implementation=reference.shared_gram)
    assert_within_budget(together, plain, ref64)


@dtypes
@pytest.mark.parametrize(("alpha", "beta"), [(0.05, 0.95), (2.0, 1.0), (0.0, 0.5), (3.0, 0.0)])
def test_accumulates_on_the_lower_triangle(dtype: torch.dtype, alpha: float, beta: float) -> None:
    for shape, groups in (((4, 9, 30), 1), ((0, 9, 30), 1), ((3, 0, 8), 2), ((5, 6, 48), 3)):
        x = torch.randn(shape).to(dtype)
        options = {"groups": groups, "bias": True, "alpha": alpha, "beta": beta}
        edge = shape[-1] // groups + 1
        before = torch.randn(*([groups] if groups > 1 else []), edge, edge)
        before = (before + before.mT).to(result_dtype(dtype))
        start = lower_only(before) if beta else torch.full_like(before, math.nan)
        out = run(x, out=start.clone(), **options)
        by_reference = {"implementation": reference.shared_gram, **options}
        torch_result = run(x, out=start.clone(), **by_reference)
        ref64 = run(x.double(), out=before.double(), **by_reference)
        assert_within_budget(out, torch_result, ref64)
        assert_symmetric(out)


def test_long_sums() -> None:
    """Added in chains, which round less."""
    check(torch.randn(2, 20_000, 24) + 1, reduction="mean", bias=True)
    check(LAYOUTS["channels-first"](torch.randn(2, 20_000, 24) + 1), reduction="mean")


@pytest.mark.parametrize("positions", [700, 1000, 1024, 3000])
@pytest.mark.parametrize("layout", ["every-second-column", "with-gaps-and-reversed"])
@reductions
def test_sums_that_drift(reduction: str, layout: str, positions: int) -> None:
    """They are larger on their way than at the end."""
    drift = torch.linspace(1, -1, positions)[:, None]
    check(LAYOUTS[layout](torch.randn(8, positions, 32) + drift), reduction=reduction)


@pytest.mark.parametrize(("layout", "chain"), [(Tensor.contiguous, 64), (spread, 1024)])
@pytest.mark.parametrize("in_order", [True, False])
def test_long_segments(layout: Callable[[Tensor], Tensor], chain: int, in_order: bool) -> None:
    """In chains, too, whose additions each round once; a single sum is off by a thousandth."""
    lengths = torch.tensor([150_000, 63, 64, 65, 1, 0, 2048, 2049])
    segments = torch.arange(len(lengths)).repeat_interleave(lengths)
    if not in_order:
        segments = segments[torch.randperm(len(segments))]
    x = layout(torch.full((len(segments), 9), 0.1))
    out = run(x, reduction="mean", segments=segments, num_segments=len(lengths))
    expected = (lengths > 0).sum() * torch.full((9, 9), x[0, 0].double() ** 2)
    assert (out.double() / expected - 1).abs().max() < 2 * (chain + 8) * 2**-24


def test_same_bits_every_time_and_for_any_number_of_threads(
    set_threads: Callable[[int], None],
) -> None:
    x, segments = torch.randn(3, 900, 400), torch.randint(7, (2700,))
    results = []
    for threads in (1, 1, 2, 3, 5):
        set_threads(threads)
        by_segment = run(x.flatten(0, 1), segments=segments, num_segments=7)
        results.append(torch.stack([run(x), by_segment]))
    assert all(torch.equal(out, results[0]) for out in results)


@dtypes
def test_many_short_examples(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    """Several are a task of a thread; their number is no multiple of that."""
    x, mask = torch.randn(1009, 7, 40).to(dtype), torch.rand(1009, 7) < 0.8
    for options in ({"bias": True, "groups": 2}, {"mask": mask}):
        set_threads(1)
        check(x, reduction="mean", **options)
        alone = run(x, **options)
        set_threads(3)
        assert torch.equal(run(x, **options), alone)


@dtypes
def test_reads_nothing_beyond_the_end(dtype: torch.dtype) -> None:
    for shape in ((2, 5, 16), (3, 4, 7), (2, 9, 100), (2, 40, 3)):
        with before_a_guard_page(whole_numbers(*shape, dtype=dtype)) as x:
            rows = x.double().sum(1)
            assert torch.equal(run(x).double(), rows.T @ rows)
        with before_a_guard_page(x.movedim(-1, 1)) as memory:
            assert torch.equal(run(memory.movedim(1, -1)).double(), rows.T @ rows)


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_refuses_segments_that_are_not_there(bad: int) -> None:
    x, out = torch.ones(4, 5), torch.zeros(5, 5)
    segments = torch.tensor([0, 1, bad, 2])
    with pytest.raises(ValueError, match=rf"^shared_gram: segments must be in \[0, 3\), got {bad}"):
        run(x, segments=segments, num_segments=3, out=out)
    assert not out.any()
    with (
        kfac_fast.use("reference"),
        pytest.raises(ValueError, match=rf"^shared_gram: segments must be in \[0, 3\), got {bad}"),
    ):
        ops.shared_gram(x, segments=segments, num_segments=3, out=out)
    assert not out.any()


def test_refuses_an_out_of_another_size_or_dtype() -> None:
    x = torch.ones(3, 2, 4)
    for out in (torch.zeros(3, 3), torch.zeros(4, 4).double(), torch.zeros(4, 8)[:, ::2]):
        refused = native.shared_gram(x, None, None, -1, "sum", 1, False, 1.0, 0.0, out)
        assert refused is None
        assert not out.any()
