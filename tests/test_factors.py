"""Running averages against their formulas, also after bad batches; products with both sides."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from host import never_waits
from oracle import assert_same, assert_symmetric, bits, poisoned, positive_definite
from torch import Tensor

import kfac_fast
from kfac_fast import ops
from kfac_fast.factors import Factor, RunningAverage, multiply_sides, update_averages
from kfac_fast.layers import Count

pytestmark = pytest.mark.usefixtures("one_thread")
BAD = (math.nan, math.inf, -math.inf)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def factor_of(covariance: Tensor) -> Factor:
    factor = Factor(covariance)
    update_averages([factor], [(covariance, 1)], 0.95)
    return factor


def snapshot(factor: Factor, *fields: str) -> list[Tensor]:
    return [bits(getattr(factor, field)).clone() for field in fields]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("shape", [(5, 5), (3, 4, 4)], ids=["one", "groups"])
@pytest.mark.parametrize("decays", [[0.9] * 6, [0.0] * 3, [0.5, 0.99, 0.0, 0.3, 0.95]], ids=str)
def test_the_covariance_is_the_explicitly_weighted_mean(
    decays: list[float], shape: tuple[int, ...]
) -> None:
    batches = [positive_definite(*shape) for _ in decays]
    factor = Factor(batches[0])
    for batch, decay in zip(batches, decays, strict=True):
        update_averages([factor], [(batch, 1)], decay)
    weights = [(1 - decays[i]) * math.prod(decays[i + 1 :]) for i in range(len(decays))]
    expected = sum(w * batch for w, batch in zip(weights, batches, strict=True)) / sum(weights)
    assert_same(factor.mean, expected)
    assert_same(factor.weight, torch.tensor(sum(weights), dtype=torch.float64))
    assert_symmetric(factor.mean)


def test_the_covariance_of_one_batch_is_that_batch() -> None:
    batch = positive_definite(4, 4)
    assert_same(factor_of(batch).mean, batch)


@pytest.mark.parametrize("shape", [(500, 500), (3, 300, 300), (2**18,)], ids=str)
@pytest.mark.parametrize("terms", [7, torch.tensor(7)], ids=["number", "tensor"])
def test_a_large_sum_is_averaged_as_a_small_one(shape: tuple[int, ...], terms: Count) -> None:
    first, second = torch.randn(2, *shape, dtype=torch.float64)
    factor = Factor(first)
    update_averages([factor], [(first, 1)], 0.9)
    update_averages([factor], [(second, terms)], 0.9)
    assert_same(factor.mean, (0.9 * first + second / 7) / 1.9)


def test_what_a_narrower_factor_cannot_hold_is_left_out() -> None:
    factor = Factor(torch.zeros(3, 3))
    update_averages([factor], [(torch.eye(3, dtype=torch.float64), 1)], 0.9)
    before = snapshot(factor, "mean", "weight")
    update_averages([factor], [(1e300 * torch.eye(3, dtype=torch.float64), 1)], 0.9)
    assert same(before, snapshot(factor, "mean", "weight"))
    assert factor.skipped == 1 and factor.mean.equal(torch.eye(3))


def test_a_sum_of_no_terms_is_left_out() -> None:
    factor = factor_of(positive_definite(3, 3))
    before = snapshot(factor, "mean", "weight")
    update_averages([factor], [(torch.zeros(3, 3, dtype=torch.float64), torch.tensor(0))], 0.9)
    assert same(before, snapshot(factor, "mean", "weight"))
    assert factor.skipped == 1


def test_the_covariance_is_zero_before_the_first_batch() -> None:
    assert torch.equal(Factor(poisoned(2, 3, 3)).mean, torch.zeros(2, 3, 3))


@pytest.mark.parametrize("position", [(0, 0), (1, 2)], ids=str)
@pytest.mark.parametrize("value", BAD)
def test_a_bad_batch_changes_no_bit_and_is_counted(value: float, position: tuple[int, int]) -> None:
    factor = factor_of(positive_definite(2, 3, 3))
    before = snapshot(factor, "mean", "weight")
    bad = positive_definite(2, 3, 3)
    bad[position[0], position[1], :] = bad[position[0], :, position[1]] = value
    update_averages([factor], [(bad, 1)], 0.9)
    assert same(before, snapshot(factor, "mean", "weight"))
    assert factor.skipped == 1


def test_a_run_continues_as_if_a_bad_batch_had_never_come() -> None:
    batches = [positive_definite(3, 3) for _ in range(3)]
    clean, disturbed = Factor(batches[0]), Factor(batches[0])
    update_averages([disturbed], [(torch.full((3, 3), math.nan, dtype=torch.float64), 1)], 0.9)
    for batch in batches:
        update_averages([clean], [(batch, 1)], 0.9)
        update_averages([disturbed], [(batch, 1)], 0.9)
        update_averages([disturbed], [(batch * math.inf, 1)], 0.9)
    assert same(snapshot(clean, "mean", "weight"), snapshot(disturbed, "mean", "weight"))
    assert disturbed.skipped == 4


GRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "gram": lambda x: ops.gram(x.flatten(1), bias=True),
    "gram-groups": lambda x: ops.gram(x.flatten(1), groups=3),
    "shared_gram": lambda x: ops.shared_gram(x, reduction="mean"),
    "conv_expand_gram": lambda x: ops.conv_expand_gram(x, 3, padding=1),
    "conv_expand_gram-groups": lambda x: ops.conv_expand_gram(x, 2, groups=3),
    "conv_reduce_gram": lambda x: ops.conv_reduce_gram(x, (2, 3), bias=True),
    "conv_reduce_gram-transposed": lambda x: ops.conv_reduce_gram(x, 2, stride=2, transposed=True),
}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", GRAMS)
def test_a_bad_input_shows_on_the_diagonal_wherever_it_is(name: str, value: float) -> None:
    x = torch.randn(2, 3, 4, 3)
    for index in range(x.numel()):
        bad = x.clone()
        bad.view(-1)[index] = value
        assert not GRAMS[name](bad).diagonal(dim1=-2, dim2=-1).isfinite().all()


def test_a_diagonal_covariance_is_averaged_like_a_full_one() -> None:
    diagonals = torch.rand(3, 4, dtype=torch.float64)
    diagonal, full = Factor(diagonals[0]), Factor(torch.diag(diagonals[0]))
    for entries in (*diagonals, torch.tensor([1.0, math.nan, 1.0, 1.0]).double()):
        update_averages([diagonal], [(entries, 1)], 0.9)
        update_averages([full], [(torch.diag(entries), 1)], 0.9)
    assert_same(torch.diag(diagonal.mean), full.mean)
    assert diagonal.skipped == full.skipped == 1


@pytest.mark.parametrize("value", BAD)
def test_an_average_of_any_batches_looks_at_every_entry(value: float) -> None:
    average = RunningAverage(torch.zeros(2, 3))
    batch = torch.ones(2, 3)
    batch[1, 0] = value
    update_averages([average], [(batch, 1)], 0.9)
    assert average.skipped == 1 and average.weight == 0


def test_sides_may_be_any_matrices_and_the_right_one_a_diagonal() -> None:
    """Also where a layer has groups, and where no layer is left for the operator."""
    grads = [torch.randn(*shape).double() for shape in [(3, 5), (2, 4), (2, 3, 2), (1, 6)]]
    left = [torch.randn(*v.shape[:-1], v.shape[-2]).double() for v in grads]
    right = [torch.randn(*v.shape[:-2], v.shape[-1], v.shape[-1]).double() for v in grads]
    right[1] = torch.randn(4).double()
    matrices = [side if side.dim() > 1 else torch.diag(side) for side in right]
    expected = [g @ v @ a for g, v, a in zip(left, grads, matrices, strict=True)]
    products, inner = multiply_sides(grads, right, [side.mT.contiguous().mT for side in left])
    for product, matrix in zip(products, expected, strict=True):
        assert_same(product, matrix)
    terms = [(v * p).sum() for v, p in zip(grads, expected, strict=True)]
    assert float(inner) == pytest.approx(float(sum(terms)), rel=1e-12)
    (alone,), inner = multiply_sides(grads[1:2], right[1:2], left[1:2])
    assert_same(alone, expected[1])
    assert_same(inner, terms[1])


def test_the_host_never_waits_for_a_factor() -> None:
    with never_waits(), kfac_fast.use("reference"):
        factor = Factor(torch.ones(2, 3, 3))
        update_averages([factor], [(torch.full((2, 3, 3), math.nan), 1)], 0.9)
        update_averages([factor], [(torch.ones(2, 3, 3), 1)], 0.9)
    assert factor.skipped == 1
