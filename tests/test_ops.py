"""The public operators as users call them: their algebra, layouts and limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import CONVOLUTIONS, FLOATING, Convolution
from oracle import (
    assert_same,
    bits,
    positive_definite,
    spread,
    whole_numbers,
)
from torch import Tensor

from kfac_fast import ops, schema

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


# The algebra, on whole numbers so that equal means equal bit for bit.

CONV = {"kernel_size": (2, 3), "padding": 1, "stride": (1, 2)}
ACCUMULATING: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], dict[str, Any]]] = {
    "gram": (ops.gram, (6, 4), {}),
    "shared_gram": (ops.shared_gram, (6, 4, 4), {}),
    "conv_expand_gram": (ops.conv_expand_gram, (6, 4, 5, 5), CONV),
    "conv_reduce_gram": (ops.conv_reduce_gram, (6, 4, 3, 5), CONV),  # 4 x 3 positions
}
accumulating = pytest.mark.parametrize(
    ("op", "shape", "options"), ACCUMULATING.values(), ids=ACCUMULATING
)
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=str)


@accumulating
@dtypes
@pytest.mark.parametrize("groups", [1, 2])
def test_additive_over_the_batch(op, shape, options, dtype, groups) -> None:
    x = whole_numbers(*shape, dtype=dtype)
    if op is ops.conv_reduce_gram:
        x = x * 12  # its 12 positions' means are then whole
    options = {"groups": groups, **options}
    whole = op(x, **options)
    parts = op(x[2:], beta=1.0, out=op(x[:2], **options), **options)
    assert torch.equal(parts, whole)
    empty = op(x[:0], beta=1.0, out=parts.clone(), **options)
    assert torch.equal(empty, whole)


@accumulating
@dtypes
def test_scales_with_the_square(op, shape, options, dtype) -> None:
    x = torch.randn(shape).to(dtype)
    assert torch.equal(op(2 * x, **options), 4 * op(x, **options))


@accumulating
@dtypes
def test_positive_semidefinite(op, shape, options, dtype) -> None:
    x = torch.randn(shape).to(dtype)
    result = op(x, bias=True, **options)
    eigenvalues = torch.linalg.eigvalsh(result.double())
    assert eigenvalues[0] >= -len(result) * torch.finfo(result.dtype).eps * eigenvalues[-1]


@accumulating
@dtypes
def test_groups_are_independent(op, shape, options, dtype) -> None:
    x = whole_numbers(*shape, dtype=dtype)
    axis = 1 if "kernel_size" in options else -1
    alone = [op(part.contiguous(), bias=True, **options) for part in x.chunk(2, axis)]
    assert torch.equal(op(x, bias=True, groups=2, **options), torch.stack(alone))


@dtypes
def test_1x1_convolution_is_linear(dtype: torch.dtype) -> None:
    x = whole_numbers(3, 4, 2, 4, dtype=dtype)
    pixels = x.movedim(1, -1)
    assert torch.equal(ops.conv_expand_gram(x, 1, bias=True), ops.gram(pixels, bias=True))
    assert torch.equal(ops.conv_reduce_gram(x, 1, bias=True), ops.shared_gram(pixels, bias=True))
    assert torch.equal(ops.conv_window_sum(x, 1).to(dtype), x.sum((2, 3)))


@dtypes
def test_one_position_reduces_to_expand(dtype: torch.dtype) -> None:
    x = whole_numbers(5, 4, 2, 3, dtype=dtype)
    expand = ops.conv_expand_gram(x, (2, 3), bias=True)
    assert torch.equal(ops.conv_reduce_gram(x, (2, 3), bias=True), expand)
    rows = x.flatten(1)
    assert torch.equal(ops.gram(rows, bias=True), expand)
    for reduction in ("mean", "sum"):
        assert torch.equal(ops.shared_gram(rows[:, None], reduction=reduction, bias=True), expand)


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_layout_changes_nothing(case: Convolution) -> None:
    x = whole_numbers(2, case.channels, *case.size, dtype=torch.float32)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    for op in (ops.conv_expand_gram, ops.conv_window_sum):
        expected = op(x, **case.options)
        for other in (last, spread(x)):
            assert torch.equal(op(other, **case.options), expected)
        repeated = op(x[:1].expand_as(x), **case.options)
        assert torch.equal(repeated, op(x[:1].repeat(2, *[1] * (x.dim() - 1)), **case.options))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_entry_shows_on_the_diagonal(value: float) -> None:
    for op, shape, options in ACCUMULATING.values():
        x = torch.randn(shape)
        x.view(-1)[7] = value
        assert not op(x, **options).diagonal().isfinite().all()


def test_large_damping_is_division() -> None:
    damping = 2.0**60
    grad = torch.randn(3, 5, dtype=torch.float64)
    sides = ops.damped_inverse([positive_definite(5, 5), positive_definite(3, 3)], damping)
    result = ops.precondition([grad], sides.matrices[:1], sides.matrices[1:])
    assert_same(result.grads[0] * damping**2, grad)


def test_offsets_beyond_32_bits() -> None:
    step = 2**30 + 3
    memory = torch.empty(3 * step, dtype=torch.float16)  # reserved, and touched in three places
    x = memory.as_strided((3, 4), (step, 1))
    x.copy_(whole_numbers(3, 4))
    assert torch.equal(ops.gram(x), ops.gram(x.clone()))


@accumulating
def test_autocast_changes_nothing(op, shape, options) -> None:
    x = torch.randn(shape)
    expected = op(x, bias=True, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op(x, bias=True, **options), expected)


# Not differentiable


def trainable(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def identities() -> list[Tensor]:
    return [torch.eye(3).requires_grad_()]


NOT_DIFFERENTIABLE = {
    **{
        name: lambda op=op, shape=shape, options=options: op(trainable(*shape), **options)
        for name, (op, shape, options) in ACCUMULATING.items()
    },
    "conv_window_sum": lambda: ops.conv_window_sum(trainable(2, 4, 5, 5), **CONV),
    "feature_norm_gram": lambda: ops.feature_norm_gram(trainable(3, 4), trainable(3, 4)),
    "channel_norm_gram": lambda: ops.channel_norm_gram(
        *(trainable(3, 4, 2) for _ in range(2)),
        mean=trainable(4),
        variance=torch.ones(4, requires_grad=True),
    ),
    "mean_eigenvalues": lambda: ops.mean_eigenvalues(identities()),
    "update_averages": lambda: ops.update_averages(
        identities(),
        [1],
        0.5,
        out=[torch.zeros(3, 3)],
        weights=[torch.zeros(())],
        skipped=[torch.tensor(0)],
    ),
    "eigh": lambda: ops.eigh(identities()),
    "damped_inverse": lambda: ops.damped_inverse(
        identities(), torch.ones((), requires_grad=True), logdet=True
    ),
    "damped_cholesky": lambda: ops.damped_cholesky(
        identities(), [torch.ones((), requires_grad=True)], logdet=True
    ),
    "precondition": lambda: ops.precondition(identities(), identities(), identities()),
    "cholesky_precondition": lambda: ops.cholesky_precondition(
        identities(), identities(), identities()
    ),
}


def tensors_in(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors_in(part)]


@pytest.mark.parametrize("name", schema.OPERATORS)
def test_inputs_may_require_a_gradient_and_results_do_not(name: str) -> None:
    results = tensors_in(NOT_DIFFERENTIABLE[name]())
    assert results and not any(tensor.requires_grad for tensor in results)


def test_an_input_is_left_as_it_was() -> None:
    for op, shape, options in ACCUMULATING.values():
        x = spread(torch.randn(shape))
        before = x.clone()
        op(x, bias=True, **options)
        assert torch.equal(bits(x), bits(before))


def test_autograd_sees_that_out_has_changed() -> None:
    """What it saved of ``out`` before is no longer there."""
    x, square = torch.randn(2, 3, 5, 5), torch.eye(4)
    calls = {
        "gram": lambda out: ops.gram(x[0, 0], out=out),
        "conv_expand_gram": lambda out: ops.conv_expand_gram(x, 1, out=out),
        "damped_inverse": lambda out: ops.damped_inverse([square], 1.0, out=[out]),
        "precondition": lambda out: ops.precondition([square], [square], [square], out=[out]),
    }
    for name, call in calls.items():
        edge = {"gram": 5, "conv_expand_gram": 3}.get(name, 4)
        out, weight = torch.zeros(edge, edge), torch.ones((), requires_grad=True)
        product = (weight * out).sum()
        call(out)
        assert out._version > 0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with torch.inference_mode():
        assert ops.gram(x[0, 0]).shape == (5, 5)


def test_what_is_refused_does_not_depend_on_earlier_calls() -> None:
    """Although 1, 1.0 and True are equal."""
    x = torch.randn(1, 2, 5, 5)
    ops.conv_expand_gram(x, 3)
    ops.conv_expand_gram(x, (3, 3), stride=(1, 1), padding=[1, 1])
    for bad in ({"kernel_size": 3.0}, {"kernel_size": (3.0, 3.0)}, {"padding": (1.0, 1)}):
        with pytest.raises(ValueError, match="must be"):
            ops.conv_expand_gram(x, **{"kernel_size": 3, **bad})
    with pytest.raises(ValueError, match="kernel_size must be an int or 2 ints"):
        ops.conv_expand_gram(x, np.array([3, 3]))


def documented(op: Callable[..., Any], **arguments: Any) -> Any:
    """Run what an operator's documentation says is equivalent."""
    block = (op.__doc__ or "").split("Equivalent to::\n\n")[1].split("\n\n    Args:")[0]
    names: dict[str, Any] = {"torch": torch}
    exec(f"def equivalent({', '.join(arguments)}):\n{block}", names)
    return names["equivalent"](**arguments)


def test_the_documented_equivalents() -> None:
    torch.manual_seed(0)
    for shape in ((5, 4), (5, 3, 4), (5, 2, 3, 4)):
        x = torch.randn(shape, dtype=torch.float64)
        assert torch.allclose(ops.shared_gram(x), documented(ops.shared_gram, x=x))
    grads = [torch.randn(3, 4), torch.randn(2, 5, 3)]
    sides = [
        [
            torch.randn(*g.shape[:-2], n, n).tril() + 4 * torch.eye(n)
            for g, n in zip(grads, sizes, strict=True)
        ]
        for sizes in ((4, 3), (3, 5))
    ]
    found = ops.cholesky_precondition(grads, *sides)
    names = {"grads": grads, "input_factors": sides[0], "gradient_factors": sides[1]}
    results, inner = documented(ops.cholesky_precondition, **names)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found.grads, results, strict=True))
    assert torch.allclose(found.inner_product, inner, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_documented_average(dtype: torch.dtype) -> None:
    sums = [torch.rand(shape, dtype=dtype) for shape in ((3, 3), (2, 3, 3), (4,), (3, 3))]
    sums[3][1, 1] = torch.inf
    results = []
    for average in (ops.update_averages, None):
        out = [torch.zeros_like(x) for x in sums]
        weights = [torch.zeros((), dtype=dtype) for _ in sums]
        skipped = [torch.zeros((), dtype=torch.int64) for _ in sums]
        written = {"out": out, "weights": weights, "skipped": skipped}
        if average:
            average(sums, [2.0] * 4, 0.9, **written)
        else:
            options = {"terms": [2.0] * 4, "decay": 0.9, "covariances": True}
            documented(ops.update_averages, sums=sums, **options, **written)
        results.append([*out, *weights, *skipped])
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))
