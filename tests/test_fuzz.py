"""The public operators fuzzed against float64: shapes, strides, dtypes, accumulation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import norm_blocks
import oracle
import pytest
import torch
from cases import FLOATING
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    assert_same,
    assert_symmetric,
    assert_within_budget,
    lower_only,
    patches,
    poisoned,
    positive_definite,
    shared_rows,
    spread,
    whole_numbers,
    with_bias,
)
from torch import Tensor

import kfac_fast
from kfac_fast import backends, conv_kernels, ops, schema
from kfac_fast.backends import native
from kfac_fast.conv import ConvGeometry

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.usefixtures("one_thread"),
]

# The same examples in every run, so that a failure is the change's own.
fuzzed = settings(derandomize=True, deadline=None, database=None, max_examples=400)
flags = st.booleans()
seeds = st.integers(0, 999)
accumulation = st.fixed_dictionaries(
    {"alpha": st.sampled_from([1.0, 0.05, 3.0]), "beta": st.sampled_from([0.0, 1.0, 0.95])}
)


def laid_out(x: Tensor, gaps: bool) -> Tensor:
    return spread(x) if gaps else x


def check_accumulation(
    op: Callable[..., Tensor],
    plain64: Tensor,
    *args: Any,
    alpha: float,
    beta: float,
    by: Callable[..., Tensor] | None = None,
    **options: Any,
) -> None:
    """Check ``out <- beta out + alpha (...)``, computed ``by`` the operator itself or like it.

    In float64 the sum is ``plain64``.
    """
    dtype = schema.result_dtype(args[0].dtype)
    square = op is not ops.conv_window_sum
    before = torch.randn(plain64.shape, dtype=torch.float64).to(dtype)
    # Positive definite, as a running average is: the sum must not cancel against it to nearly
    # nothing, of which no rounding is a small part.
    before = before @ before.mT if square else before
    start = lower_only(before) if square else before
    start = torch.full_like(start, torch.nan) if beta == 0 else start
    out = start.clone()
    result = (by or op)(*args, alpha=alpha, beta=beta, out=out, **options)
    assert result is out
    with kfac_fast.use("reference"):
        expected = op(*args, alpha=alpha, beta=beta, out=start.clone(), **options)
    assert_within_budget(out, expected, beta * before.double() + alpha * plain64)
    if square:
        assert_symmetric(out)


@st.composite
def rows(draw: st.DrawFn, least: int) -> tuple[Tensor, Tensor | None, int]:
    """Rows ``[*, D]`` with so many leading dimensions at least, a mask or None, and groups."""
    torch.manual_seed(draw(seeds))
    leading = draw(st.lists(st.integers(0, 9), min_size=least, max_size=3))
    groups, features = draw(st.integers(1, 3)), draw(st.integers(0, 12))
    dtype = draw(st.sampled_from(FLOATING))
    x = laid_out(torch.randn(*leading, groups * features).to(dtype), draw(flags))
    mask = laid_out(torch.rand(leading) < 0.7, draw(flags)) if draw(flags) else None
    return x, mask, groups


@fuzzed
@given(rows(least=0), flags, accumulation)
def test_gram(
    case: tuple[Tensor, Tensor | None, int], bias: bool, scales: dict[str, float]
) -> None:
    x, mask, groups = case
    plain = oracle.gram(x, mask, groups, bias)
    check_accumulation(ops.gram, plain, x, mask=mask, groups=groups, bias=bias, **scales)


@fuzzed
@given(rows(least=1), st.sampled_from(["mean", "sum"]), flags, accumulation)
def test_shared_gram(
    case: tuple[Tensor, Tensor | None, int], reduction: str, bias: bool, scales: dict[str, float]
) -> None:
    x, mask, groups = case
    counted = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    wide, counted = (x[:, None], counted[:, None]) if x.dim() == 2 else (x, counted)
    reduced = shared_rows(wide.double(), counted, groups, bias, reduction)
    options = {"mask": mask, "groups": groups, "bias": bias, "reduction": reduction}
    plain = oracle.gram(reduced.flatten(1), groups=groups)
    check_accumulation(ops.shared_gram, plain, x, **options, **scales)


@st.composite
def normalized(draw: st.DrawFn, least: int) -> tuple[Tensor, Tensor]:
    """Input and gradient of a normalisation, ``[*, D]`` or ``[N, C, *]``."""
    torch.manual_seed(draw(seeds))
    # Three entries at least: two are normalised to their signs, one to the rounding of zero.
    sizes = draw(st.lists(st.integers(0, 7), min_size=least - 1, max_size=4))
    sizes = [*sizes, draw(st.integers(3, 40))]
    dtype = draw(st.sampled_from(FLOATING))
    x = torch.randn(sizes)
    # With the input, so that their products do not cancel to little more than their rounding.
    gradient = torch.randn(sizes) + 2 * x
    x = x + draw(st.sampled_from([0.0, 3.0]))
    return laid_out(x.to(dtype), draw(flags)), laid_out(gradient.to(dtype), draw(flags))


epsilons = st.sampled_from([1e-5, 1e-3, 1.0])


@fuzzed
@given(normalized(least=2), flags, flags, epsilons, st.integers(0, 4), flags)
def test_feature_norm_gram(
    case: tuple[Tensor, Tensor], center: bool, bias: bool, eps: float, graphs: int, masked: bool
) -> None:
    x, gradient = case
    options: dict[str, Any] = {"center": center, "bias": bias, "eps": eps}
    if masked:
        options["mask"] = torch.rand(x.shape[:-1]) < 0.7
    if graphs and x.dim() == 2:
        options |= {"segments": torch.randint(graphs, (len(x),)), "num_segments": graphs}
    norm_blocks.check(ops.feature_norm_gram, x, gradient, **options)


@fuzzed
@given(normalized(least=3), flags, epsilons, st.sampled_from(["batch", "groups", "given"]))
def test_channel_norm_gram(
    case: tuple[Tensor, Tensor], bias: bool, eps: float, statistics: str
) -> None:
    x, gradient = case
    channels = x.shape[1]
    options: dict[str, Any] = {"bias": bias, "eps": eps}
    if statistics == "groups":
        options["num_groups"] = 2 if channels % 2 == 0 and channels else 1
    elif statistics == "given":
        mean, variance = torch.randn(channels), torch.rand(channels)
        dtype = schema.result_dtype(x.dtype)
        options |= {"mean": mean.to(dtype), "variance": variance.to(dtype)}
    norm_blocks.check(ops.channel_norm_gram, x, gradient, **options)


@fuzzed
@given(rows(least=1), st.integers(1, 5), st.sampled_from(["mean", "sum"]), flags, accumulation)
def test_shared_gram_of_segments(
    case: tuple[Tensor, Tensor | None, int],
    graphs: int,
    reduction: str,
    bias: bool,
    scales: dict[str, float],
) -> None:
    x, mask, groups = case
    x = x.flatten(0, -2)
    mask = torch.ones(len(x), dtype=torch.bool) if mask is None else mask.flatten()
    segments = torch.randint(graphs, (len(x),))
    wide, counted = x.double()[None], mask & (segments == torch.arange(graphs)[:, None])
    reduced = shared_rows(wide.expand(graphs, -1, -1), counted, groups, bias, reduction)
    options = {"mask": mask, "groups": groups, "bias": bias, "reduction": reduction}
    options |= {"segments": segments, "num_segments": graphs}
    plain = oracle.gram(reduced.flatten(1), groups=groups)
    check_accumulation(ops.shared_gram, plain, x, **options, **scales)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Any]]:
    """An input's shape and a geometry, about half of them impossible."""
    torch.manual_seed(draw(seeds))
    dimensions, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def sizes(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(dimensions))

    options = {"kernel_size": sizes(1, 4), "dilation": sizes(1, 3), "groups": groups}
    if draw(st.sampled_from([False, False, True])):
        options |= {"transposed": True, "output_padding": sizes(0, 2)}
        options |= {"stride": sizes(1, 3), "padding": sizes(0, 4)}
    else:
        modes = ["zeros", "reflect", "replicate", "circular"]
        options["padding_mode"] = draw(st.sampled_from(modes))
        named = draw(st.sampled_from(["same", "valid", None, None, None]))
        options["padding"] = named or sizes(0, 4)
        options["stride"] = 1 if named == "same" else sizes(1, 3)
    channels = groups * draw(st.integers(1, 3))
    return (draw(st.integers(1, 3)), channels, *sizes(1, 7)), options


def run_kernel(
    kernel: str, x: Tensor, *, bias: bool, alpha: float, beta: float, out: Tensor, **options: Any
) -> Tensor:
    """A compiled kernel of conv_expand_gram, whichever the cost model prefers."""
    geometry = ConvGeometry.normalize("test", x.dim() - 2, **options)
    size = tuple(x.shape[2:])
    plan = conv_kernels.plan(kernel, geometry, size).tolist()
    assert native.ConvKernel(kernel, plan, size, geometry.groups)(x, bias, alpha, beta, out) is out
    return out


@settings(fuzzed, max_examples=2000)
@given(convolutions(), st.sampled_from(FLOATING), flags, flags, accumulation)
def test_convolutions(
    case: tuple[tuple[int, ...], dict[str, Any]],
    dtype: torch.dtype,
    gaps: bool,
    bias: bool,
    scales: dict[str, float],
) -> None:
    """Every operator takes the geometries that PyTorch takes, and no other."""
    shape, options = case
    # Replicated pixels may make all patches equal, and the roundings of a sum of equal terms do not
    # average out: whole numbers have none.
    replicated = options.get("padding_mode") == "replicate"
    image = whole_numbers(*shape) if replicated else torch.randn(shape)
    x = laid_out(image.to(dtype), gaps)
    operators = (ops.conv_expand_gram, ops.conv_reduce_gram, ops.conv_window_sum)
    try:
        read = patches(x, **options)
    except (RuntimeError, ValueError):
        for op in operators:
            with pytest.raises(ValueError, match=f"^{op.__name__}: "):
                op(x, bias=bias, **options)
        return
    read = with_bias(read, bias)
    plain = [
        oracle.gram(read.flatten(2), groups=options["groups"]),
        oracle.gram(read.mean(1).flatten(1), groups=options["groups"]),
        read.sum(1) if options["groups"] > 1 else read.sum(1)[:, 0],
    ]
    for op, expected in zip(operators, plain, strict=True):
        check_accumulation(op, expected, x, bias=bias, **options, **scales)
    for kernel in conv_kernels.EXPAND_KERNELS if backends.EXTENSION_BUILT else ():
        by = partial(run_kernel, kernel)
        check_accumulation(operators[0], plain[0], x, by=by, bias=bias, **options, **scales)


batches = st.lists(st.integers(0, 3), max_size=2)


@fuzzed
@given(
    st.lists(st.tuples(batches, st.integers(1, 40), st.floats(1e-9, 2)), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float64]),
    flags,
    seeds,
)
def test_damped_inverse_and_cholesky(
    entries: list[tuple[list[int], int, float]], dtype: torch.dtype, gaps: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    matrices = [positive_definite(*batch, n, n).to(dtype) for batch, n, _ in entries]
    damping = [value for *_, value in entries]
    given_matrices = [laid_out(lower_only(m), gaps) for m in matrices]
    damped = [
        m.double() + value * torch.eye(m.shape[-1])
        for m, value in zip(matrices, damping, strict=True)
    ]
    logdet64 = torch.cat([torch.logdet(m).reshape(-1) for m in damped])
    for op, exact in (
        (ops.damped_inverse, torch.linalg.inv),
        (ops.damped_cholesky, torch.linalg.cholesky),
    ):
        out = [poisoned(*m.shape, dtype=dtype) for m in matrices]
        result = op(given_matrices, damping, logdet=True, out=out)
        with kfac_fast.use("reference"):
            expected = op(given_matrices, damping, logdet=True)
        assert not result.info.any()
        assert_within_budget(result.logdet, expected.logdet, logdet64)
        for got, torch_result, matrix in zip(out, expected.matrices, damped, strict=True):
            assert_within_budget(got, torch_result, exact(matrix))


@fuzzed
@given(
    st.lists(st.tuples(batches, st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float64]),
    flags,
    seeds,
)
def test_precondition(
    shapes: list[tuple[list[int], int, int]], dtype: torch.dtype, gaps: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    grads = [torch.randn(*b, m, n, dtype=dtype) for b, m, n in shapes]
    inputs = [positive_definite(*b, n, n) for b, _, n in shapes]
    gradients = [positive_definite(*b, m, m) for b, m, _ in shapes]
    for op, side in (
        (ops.precondition, torch.linalg.inv),
        (ops.cholesky_precondition, torch.linalg.cholesky),
    ):
        sides = [[laid_out(side(m).to(dtype), gaps) for m in ms] for ms in (inputs, gradients)]
        out = [poisoned(*grad.shape, dtype=dtype) for grad in grads]
        result = op([laid_out(g, gaps) for g in grads], *sides, out=out)
        with kfac_fast.use("reference"):
            expected = op(grads, *sides)
            exact = op([g.double() for g in grads], *([s.double() for s in ss] for ss in sides))
        found = [*out, result.inner_product]
        plain, ref64 = ([*each.grads, each.inner_product] for each in (expected, exact))
        for got, torch_result, each64 in zip(found, plain, ref64, strict=True):
            if dtype == torch.float64:  # then PyTorch's result is the reference, without an error
                assert_same(got, each64)
            else:
                assert_within_budget(got, torch_result, each64)
