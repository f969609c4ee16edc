"""The pure-PyTorch operators against slow definitions, exactly where whole numbers allow it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import CONVOLUTIONS, MATRIX_SIZES, SHARED_SHAPES, Convolution
from oracle import (
    assert_same,
    assert_symmetric,
    bits,
    lower_only,
    outer_sum,
    patches,
    poisoned,
    positive_definite,
    shared_rows,
    whole_numbers,
    with_bias,
)
from torch import Tensor

import kfac_fast
from kfac_fast import ops

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.usefixtures("one_thread"),
]
convolutions = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
biases = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    torch.manual_seed(0)
    with kfac_fast.use("reference"):
        yield


@biases
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(4,), (0, 4), (7, 4), (2, 3, 4), (2, 0, 4), (2, 2, 3, 8)])
def test_gram_sums_outer_products(shape: tuple[int, ...], groups: int, bias: bool) -> None:
    x = whole_numbers(*shape)
    mask = torch.rand(shape[:-1]) < 0.6
    rows = with_bias(x.reshape(math.prod(shape[:-1]), groups, shape[-1] // groups), bias)
    assert torch.equal(ops.gram(x, groups=groups, bias=bias), outer_sum(rows))
    masked = ops.gram(x, groups=groups, bias=bias, mask=mask)
    assert torch.equal(masked, outer_sum(rows[mask.reshape(-1)]))


def test_gram_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    expected = torch.tensor([[10.0, 17.0, 4.0], [17.0, 29.0, 7.0], [4.0, 7.0, 2.0]])
    assert torch.equal(ops.gram(x, bias=True), expected)


@biases
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", SHARED_SHAPES.values(), ids=SHARED_SHAPES)
def test_shared_gram_reduces_each_example(
    shape: tuple[int, ...], groups: int, reduction: str, masked: bool, bias: bool
) -> None:
    x = whole_numbers(*shape)
    mask = torch.rand(shape[:-1]) < 0.5 if masked else None
    positions = mask if masked else torch.ones(shape[:-1], dtype=torch.bool)
    if len(shape) == 2:
        x, positions = x[:, None], positions[:, None]
    expected = outer_sum(shared_rows(x, positions, groups, bias, reduction))
    result = ops.shared_gram(
        x.reshape(shape), reduction=reduction, groups=groups, bias=bias, mask=mask
    )
    assert_same(result, expected)
    assert_symmetric(result)


@biases
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_segments_are_a_loop_over_graphs(masked: bool, reduction: str, bias: bool) -> None:
    sizes = (3, 0, 1, 6)  # nodes of each graph; the second has none
    x = whole_numbers(sum(sizes), 4)
    mask = torch.rand(len(x)) < 0.5 if masked else None
    graphs = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    expected = torch.zeros(4 + bias, 4 + bias, dtype=torch.float64)
    for graph in range(4):
        nodes = graphs == graph if mask is None else (graphs == graph) & mask
        expected += ops.shared_gram(x[nodes][None], reduction=reduction, bias=bias)
    shuffle = torch.randperm(len(x))
    result = ops.shared_gram(
        x[shuffle],
        reduction=reduction,
        bias=bias,
        mask=None if mask is None else mask[shuffle],
        segments=graphs[shuffle],
        num_segments=4,
    )
    assert_same(result, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("padding", [0.0, 7.0, math.nan, math.inf])
def test_padded_and_masked_is_unpadded(padding: float, reduction: str) -> None:
    lengths = (4, 1, 3)
    sequences = [whole_numbers(length, 3) for length in lengths]
    x = torch.full((3, 6, 3), padding, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    x[mask] = torch.cat(sequences)
    whole = ops.gram(x, mask=mask, bias=True)
    assert torch.equal(whole, ops.gram(torch.cat(sequences), bias=True))
    assert whole[-1, -1] == sum(lengths)
    alone = [ops.shared_gram(s[None], reduction=reduction, bias=True) for s in sequences]
    shared = ops.shared_gram(x, mask=mask, reduction=reduction, bias=True)
    assert_same(shared, torch.stack(alone).sum(0))
    assert shared[-1, -1] == (3 if reduction == "mean" else sum(n * n for n in lengths))


@convolutions
@biases
def test_convolutions_read_the_patches_that_pytorch_reads(case: Convolution, bias: bool) -> None:
    x = whole_numbers(3, case.channels, *case.size)
    rows = with_bias(patches(x, **case.options), bias)  # [N, S, groups, d]
    expand = ops.conv_expand_gram(x, bias=bias, **case.options)
    assert torch.equal(expand, outer_sum(rows.flatten(0, 1)))
    sums = ops.conv_window_sum(x, bias=bias, **case.options)
    assert torch.equal(sums, rows.sum(1).reshape(sums.shape))
    reduced = ops.conv_reduce_gram(x, bias=bias, **case.options)
    assert_same(reduced, outer_sum(rows.mean(1)))
    assert_symmetric(reduced)


def test_features_are_ordered_as_in_unfold() -> None:
    x = whole_numbers(2, 3, 6, 5)
    geometry = {"kernel_size": (3, 2), "dilation": (1, 2), "padding": (1, 0), "stride": (2, 1)}
    rows = F.unfold(x, **geometry).mT.flatten(0, 1)
    assert torch.equal(ops.conv_expand_gram(x, **geometry), rows.T @ rows)


@pytest.mark.parametrize("op", [ops.conv_expand_gram, ops.conv_reduce_gram])
def test_convolution_of_no_examples_is_zero(op) -> None:
    for case in CONVOLUTIONS.values():
        result = op(torch.empty(0, case.channels, *case.size), **case.options)
        assert torch.equal(result, torch.zeros_like(result))


def matrices_of_mixed_sizes() -> list[Tensor]:
    """Single matrices and stacked batches, one of them empty; NaN above the diagonals."""
    single = [positive_definite(n, n) for n in (*MATRIX_SIZES, 3)]
    stacked = [
        positive_definite(2, 3, 8, 8),
        positive_definite(0, 4, 4),
        positive_definite(5, 2, 2),
    ]
    return single + stacked


@pytest.mark.parametrize("kind", ["number", "scalar", "each", "per-matrix"])
def test_damped_inverse_and_cholesky(kind: str) -> None:
    matrices = matrices_of_mixed_sizes()
    each = [0.1 * (i + 1) for i in range(len(matrices))]
    dampings = {
        "number": 0.3,
        "scalar": torch.tensor(0.3, dtype=torch.float64),
        "each": each,
        "per-matrix": [torch.rand(m.shape[:-2], dtype=torch.float64) for m in matrices],
    }
    damping = dampings[kind]
    values = damping if isinstance(damping, list) else [damping] * len(matrices)
    damped = [
        m + torch.as_tensor(v, dtype=torch.float64)[..., None, None] * torch.eye(m.shape[-1])
        for m, v in zip(matrices, values, strict=True)
    ]
    lower = [lower_only(m) for m in matrices]
    inverses = ops.damped_inverse(lower, damping, logdet=True)
    factors = ops.damped_cholesky(lower, damping, logdet=True)
    for matrix, inverse, factor in zip(damped, inverses.matrices, factors.matrices, strict=True):
        assert_same(inverse, torch.linalg.inv(matrix))
        assert_symmetric(inverse)
        assert_same(factor @ factor.mT, matrix)
        assert torch.equal(factor, factor.tril())
    logdets = torch.cat([torch.linalg.slogdet(m).logabsdet.reshape(-1) for m in damped])
    for result in (inverses, factors):
        assert_same(result.logdet, logdets)
        assert result.info.dtype == torch.int32 and not result.info.any()
        assert len(result.info) == len(logdets)


BAD_ENTRIES = {
    "indefinite": lambda m: m.sub_(9 * torch.eye(4)),
    "zero": lambda m: m.zero_(),
    "late": lambda m: m[3, 3].fill_(-5.0),
    "all-nan": lambda m: m.fill_(math.nan),
    "nan-on-the-diagonal": lambda m: m[2, 2].fill_(math.nan),
    "nan-below-the-diagonal": lambda m: m[3, 0].fill_(math.nan),
    "infinity-below-the-diagonal": lambda m: m[2, 1].fill_(math.inf),
}


@pytest.mark.parametrize("op", [ops.damped_inverse, ops.damped_cholesky])
@pytest.mark.parametrize("spoil", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_failure_touches_only_its_own_matrix(op, spoil) -> None:
    good = [positive_definite(3, 4, 4), positive_definite(4, 4), positive_definite(6, 6)]
    bad = [m.clone() for m in good]
    spoil(bad[0][1])
    before = [m.clone() for m in bad]
    undamped = torch.zeros((), dtype=torch.float64)
    expected = op(good, undamped, logdet=True)
    out = [poisoned(*m.shape, dtype=m.dtype) for m in good]
    result = op(bad, undamped, logdet=True, out=out)
    assert result.info[1] > 0 and result.info[[0, 2, 3, 4]].eq(0).all()
    assert result.matrices[0][1].isnan().all() and result.logdet[1].isnan()
    for got, want in zip(result.matrices, expected.matrices, strict=True):
        flat, wanted = got.reshape(-1, *got.shape[-2:]), want.reshape(-1, *want.shape[-2:])
        keep = [i for i in range(len(flat)) if not (got is result.matrices[0] and i == 1)]
        assert torch.equal(bits(flat[keep]), bits(wanted[keep]))
    others = [0, 2, 3, 4]
    assert torch.equal(bits(result.logdet[others]), bits(expected.logdet[others]))
    for matrix, kept in zip(bad, before, strict=True):
        assert torch.equal(bits(matrix), bits(kept))


def test_info_is_the_order_of_the_failing_minor() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64))
    assert ops.damped_inverse([matrix, torch.eye(2)[None].double()], 1e-3).info.tolist() == [3, 0]


@pytest.mark.parametrize("op", [ops.precondition, ops.cholesky_precondition])
def test_precondition_solves_the_kronecker_system(op) -> None:
    shapes = [(3, 4), (1, 5), (3, 4), (2, 2, 3), (0, 2, 2), (2, 2, 4, 1)]
    grads = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs = [positive_definite(*s[:-2], s[-1], s[-1]) for s in shapes]
    gradients = [positive_definite(*s[:-2], s[-2], s[-2]) for s in shapes]
    side = torch.linalg.inv if op is ops.precondition else torch.linalg.cholesky
    result = op(grads, [side(m) for m in inputs], [side(m) for m in gradients])
    total = torch.zeros((), dtype=torch.float64)
    for v, a, g, p in zip(grads, inputs, gradients, result.grads, strict=True):
        for v1, a1, g1, p1 in zip(
            *(t.reshape(-1, *t.shape[-2:]) for t in (v, a, g, p)), strict=True
        ):
            solution = torch.linalg.solve(torch.kron(g1, a1), v1.flatten())
            assert_same(p1, solution.reshape(v1.shape))
            total += v1.flatten() @ solution
    assert_same(result.inner_product, total)


def test_nothing_to_do() -> None:
    no_matrices = torch.empty(0, 3, 3)
    assert ops.damped_inverse([no_matrices], 1.0, logdet=True).logdet.shape == (0,)
    assert ops.damped_cholesky([no_matrices], [1.0]).info.shape == (0,)
    assert ops.precondition([], [], []).inner_product == 0
    assert ops.cholesky_precondition([], [], []).grads == []
