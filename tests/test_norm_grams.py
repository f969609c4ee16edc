"""The factors of normalisations in C++ and in plain PyTorch, against extended precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FLOATING
from guard_page import before_a_guard_page
from norm_blocks import DEFINITIONS, Norm, assert_blocks, check
from oracle import bits, lower_only, poisoned, spread
from torch import Tensor

import kfac_fast
from kfac_fast import ops, schema
from kfac_fast.backends import native

pytestmark = pytest.mark.usefixtures("one_thread", "instruction_set", "seed")
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=str)


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "every-second-entry": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "batch-second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "with-gaps-and-reversed": spread,
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@dtypes
@layouts
def test_features(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    for shape in ((5, 3), (3, 7, 12), (2, 4, 16, 40), (1, 90, 33), (7, 1, 300)):
        x, g = (layout(torch.randn(shape).to(dtype)) for _ in range(2))
        check(ops.feature_norm_gram, x, g)
        check(ops.feature_norm_gram, x, g[:1].expand_as(x), center=False, bias=False, eps=0.1)
        mask = spread(torch.rand(shape[:-1]) < 0.6)
        check(ops.feature_norm_gram, x, g[:, :1].expand_as(x), mask=mask)


@dtypes
@layouts
@pytest.mark.parametrize("num_groups", [None, 1, 3])
def test_channels(
    dtype: torch.dtype, layout: Callable[[Tensor], Tensor], num_groups: int | None
) -> None:
    for shape in (
        (5, 3),
        (40, 132),
        (4, 6, 17),
        (3, 12, 5, 9),
        (2, 3, 40, 33),
        (3, 6, 2, 3, 4),
        (1, 33, 1),
    ):
        x, g = (layout(torch.randn(shape).to(dtype)) for _ in range(2))
        if num_groups is None and len(x) * x[0, 0].numel() == 1:
            assert not ops.channel_norm_gram(x, g)[:, 0, 0].any()  # a single entry is the mean
            continue
        check(ops.channel_norm_gram, x, g, num_groups=num_groups)
        check(ops.channel_norm_gram, x, g, num_groups=num_groups, bias=False, eps=0.1)


@dtypes
def test_channels_by_given_statistics(dtype: torch.dtype) -> None:
    x, g = torch.randn(2, 5, 6, 4, 3).to(dtype)
    mean, variance = torch.randn(6), torch.rand(6) + 0.1
    given = {"mean": mean, "variance": variance}
    given = {name: value.to(schema.result_dtype(dtype)) for name, value in given.items()}
    check(ops.channel_norm_gram, x, g, **given)
    check(ops.channel_norm_gram, x, g, **{name: spread(value) for name, value in given.items()})


@dtypes
def test_segments(dtype: torch.dtype) -> None:
    """Rows in any order, some segments without any, some with many rows."""
    x, g = torch.randn(2, 500, 37).to(dtype)
    segments = torch.randint(40, (500,)).clamp(min=9, max=30)
    options = {"segments": spread(segments), "num_segments": 40}
    check(ops.feature_norm_gram, x, g, **options)
    check(ops.feature_norm_gram, spread(x), g, mask=torch.rand(500) < 0.7, **options)


@pytest.mark.parametrize("center", [True, False])
def test_positions_that_are_masked_do_not_count(center: bool) -> None:
    x, g = torch.randn(2, 6, 50, 20)
    mask = torch.rand(6, 50) < 0.5
    mask[2] = False
    options = {"mask": mask, "center": center}
    for op_x, op_g in (
        (x, g),
        (x.where(mask[..., None], math.nan), g.where(mask[..., None], 1e38)),
    ):
        result = ops.feature_norm_gram(op_x, op_g, **options)
        assert torch.equal(result, ops.feature_norm_gram(x, g, **options))


def test_long_sums() -> None:
    """Added in chains, which round less; the mean is far from zero."""
    x, g = torch.randn(2, 2, 3000, 20)
    check(ops.feature_norm_gram, 100 + x, g + 1)
    check(ops.feature_norm_gram, *torch.randn(2, 3, 2, 9000))
    x, g = torch.randn(2, 2, 4, 150, 150)
    check(ops.channel_norm_gram, 100 + x, g + 1)
    check(ops.channel_norm_gram, 100 + x, g + 1, num_groups=2)
    check(ops.channel_norm_gram, *(torch.randn(2, 3000, 3, 2) + 1))
    check(ops.channel_norm_gram, *torch.randn(2, 300, 50))


@pytest.mark.parametrize("op", DEFINITIONS, ids=lambda op: op.__name__)
def test_a_large_mean_is_taken_away_whole(op: Norm) -> None:
    """Rounded to float32, a mean of a million is off by a hundredth of the deviation."""
    x, g = torch.randn(2, 4, 6, 50)
    shifted = (x + 1e6).double()
    expected = DEFINITIONS[op](shifted.float(), g)
    error = (op(shifted.float(), g) - expected).norm() / expected.norm()
    assert error < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("op", DEFINITIONS, ids=lambda op: op.__name__)
def test_an_overflow_shows(op: Norm) -> None:
    """A variance beyond the largest number must not pass for a scale of zero."""
    x, g = 1e25 * torch.randn(3, 4, 20), torch.randn(3, 4, 20)
    assert op(x, g)[:, 0, 0].isnan().all()


@dtypes
@pytest.mark.parametrize(("alpha", "beta"), [(0.05, 0.95), (2.0, 1.0), (0.0, 0.5), (3.0, 0.0)])
@pytest.mark.parametrize("op", DEFINITIONS, ids=lambda op: op.__name__)
def test_accumulates_on_the_lower_triangles(
    op: Norm, dtype: torch.dtype, alpha: float, beta: float
) -> None:
    for shape in ((4, 5, 5), (0, 5, 5), (3, 5, 0), (3, 0, 5)):
        x, g = torch.randn(2, *shape).to(dtype)
        units = shape[-1] if op is ops.feature_norm_gram else shape[1]
        before = torch.randn(units, 2, 2).to(schema.result_dtype(dtype))
        before = before @ before.mT
        start = lower_only(before) if beta else torch.full_like(before, math.nan)
        results = {}
        for name in ("cpp", "reference"):
            with kfac_fast.use(name):
                results[name] = op(x, g, alpha=alpha, beta=beta, out=start.clone())
        expected = alpha * DEFINITIONS[op](x, g) + (beta * before.double() if beta else 0)
        assert_blocks(results["cpp"], results["reference"], expected)


def test_same_bits_every_time_and_for_any_number_of_threads(
    set_threads: Callable[[int], None],
) -> None:
    x, g = torch.randn(2, 700, 40, 30)
    segments = torch.randint(7, (28_000,))
    long_x, long_g = torch.randn(2, 3, 9000, 30)
    results = []
    for threads in (1, 1, 2, 3, 5):
        set_threads(threads)
        by_segment = ops.feature_norm_gram(
            x.flatten(0, 1), g.flatten(0, 1), segments=segments, num_segments=7
        )
        parts = [
            ops.feature_norm_gram(x, g),
            ops.feature_norm_gram(long_x, long_g),
            by_segment,
            ops.channel_norm_gram(x, g),
            ops.channel_norm_gram(x, g, num_groups=8),
        ]
        results.append(torch.cat(parts))
    assert all(torch.equal(bits(out), bits(results[0])) for out in results)


@dtypes
def test_reads_nothing_beyond_the_end(dtype: torch.dtype) -> None:
    for shape in ((2, 5, 16), (3, 4, 7), (2, 9, 100), (2, 4, 3), (3, 70, 1)):
        values = torch.randn(2, *shape).to(dtype)
        with before_a_guard_page(values[0]) as x, before_a_guard_page(values[1]) as g:
            for op in DEFINITIONS:
                assert torch.equal(op(x, g), op(*values))
                turned = (t.transpose(1, 2) for t in (x, g))
                assert torch.equal(op(*turned), op(*(t.transpose(1, 2) for t in values)))


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_refuses_segments_that_are_not_there(implementation: str, bad: int) -> None:
    x, out = torch.ones(4, 5), torch.zeros(5, 2, 2)
    segments = torch.tensor([0, 1, bad, 2])
    with (
        kfac_fast.use(implementation),
        pytest.raises(
            ValueError, match=rf"^feature_norm_gram: segments must be in \[0, 3\), got {bad}"
        ),
    ):
        ops.feature_norm_gram(x, x, segments=segments, num_segments=3, out=out)
    assert not out.any()


X = torch.ones(5, 4)
FEATURE = (X, X, None, None, -1, 1e-5, True, True)
CHANNEL = (X, X, None, None, -1, 1e-5, True)
SEGMENTS = torch.zeros(5).long()
# By the position of what is changed.
REFUSED: dict[str, tuple[str, dict[int, Any]]] = {
    "no rows": ("feature_norm_gram", {0: X[0], 1: X[0]}),
    "a gradient of another shape": ("feature_norm_gram", {1: X[:4]}),
    "a gradient of another dtype": ("feature_norm_gram", {1: X.double()}),
    "whole numbers": ("feature_norm_gram", {0: X.int(), 1: X.int()}),
    "a mask of another shape": ("feature_norm_gram", {2: torch.ones(4).bool()}),
    "a mask of numbers": ("feature_norm_gram", {2: torch.ones(5)}),
    "a count without segments": ("feature_norm_gram", {4: 3}),
    "segments without a count": ("feature_norm_gram", {3: SEGMENTS}),
    "segments of another length": ("feature_norm_gram", {3: SEGMENTS[:4], 4: 3}),
    "short segments": ("feature_norm_gram", {3: SEGMENTS.int(), 4: 3}),
    "a negative eps": ("feature_norm_gram", {5: -1e-5}),
    "an eps that is no number": ("channel_norm_gram", {5: math.nan}),
    "an infinite eps": ("channel_norm_gram", {5: math.inf}),
    "no channels": ("channel_norm_gram", {0: X[0], 1: X[0]}),
    "groups that do not divide": ("channel_norm_gram", {4: 3}),
    "no group": ("channel_norm_gram", {4: 0}),
    "a mean alone": ("channel_norm_gram", {2: X[0]}),
    "a variance alone": ("channel_norm_gram", {3: X[0]}),
    "statistics of groups": ("channel_norm_gram", {2: X[0], 3: X[0], 4: 2}),
    "a mean of another shape": ("channel_norm_gram", {2: X[:, 0], 3: X[0]}),
    "a variance of another dtype": ("channel_norm_gram", {2: X[0], 3: X[0].double()}),
}


@pytest.mark.parametrize(("op", "changed"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(op: str, changed: dict[int, Any]) -> None:
    valid = FEATURE if op == "feature_norm_gram" else CHANNEL
    inputs = [changed.get(i, value) for i, value in enumerate(valid)]
    out = poisoned(4, 2, 2)
    schema.check(op, *valid, 1.0, 0.0, out)
    with pytest.raises((ValueError, TypeError), match=f"^{op}: .* must be .*, got "):
        schema.check(op, *inputs, 1.0, 0.0, out)
    assert getattr(native, op)(*inputs, 1.0, 0.0, out) is None
    assert out.isnan().all()


@pytest.mark.parametrize("op", DEFINITIONS, ids=lambda op: op.__name__)
def test_an_out_is_refused(op: Norm) -> None:
    memory = torch.ones(40)
    x = memory[:20].view(5, 4)
    for out in (poisoned(4, 1, 1), poisoned(2, 2), poisoned(4, 2, 2).double(), memory[10:26]):
        out = out.view(4, 2, 2) if out.numel() == 16 else out
        before = out.clone()
        with pytest.raises((ValueError, TypeError), match="out must be"):
            op(x, torch.ones(5, 4), out=out)
        with pytest.raises((ValueError, TypeError), match="out must be"):
            op(torch.ones(5, 4), x, out=out)
        assert torch.equal(bits(out), bits(before))


@pytest.mark.parametrize("name", ["mean", "variance"])
def test_an_out_in_the_statistics_is_refused(name: str) -> None:
    memory = torch.ones(16)
    given = {"mean": torch.zeros(4), "variance": torch.ones(4), name: memory[:4]}
    x, out = torch.randn(5, 4), memory.view(4, 2, 2)
    with pytest.raises(ValueError, match="out must be apart"):
        ops.channel_norm_gram(x, x.clone(), out=out, **given)
    assert torch.equal(memory, torch.ones(16))


def test_minus_one_is_no_number_of_groups() -> None:
    with pytest.raises(ValueError, match="num_groups must be positive or None, got -1"):
        ops.channel_norm_gram(X, X.clone(), num_groups=-1)
