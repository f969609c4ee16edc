"""Damped inverses against their formulas, after failures, and followed by Newton-Schulz steps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from host import never_waits
from oracle import assert_same, assert_symmetric, poisoned, positive_definite
from plain_kfac import assert_solved, averaged, damp
from torch import Tensor

from kfac_fast.factors import Factor, update_averages
from kfac_fast.inverses import (
    Inverse,
    Inverted,
    apply_inverses,
    factored_damping,
    refine_inverses,
    refresh_inverses,
)

pytestmark = pytest.mark.usefixtures("one_thread")
BAD = (math.nan, math.inf, -math.inf)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_factored_damping_is_split_by_the_mean_eigenvalues_of_each_group() -> None:
    a, g = positive_definite(3, 5, 5), 100 * positive_definite(3, 2, 2)
    for_inputs, for_gradients = factored_damping(a, g, 0.01)
    for i in range(3):
        means = [torch.linalg.eigvalsh(m[i]).mean() for m in (a, g)]
        pi = (means[0] / means[1]).sqrt()
        assert_same(for_inputs[i], pi * 0.1)
        assert_same(for_gradients[i], 0.1 / pi)
    assert_same(for_inputs * for_gradients, torch.full((3,), 0.01, dtype=torch.float64))


@pytest.mark.parametrize("scale", [0.0, *BAD], ids=str)
@pytest.mark.parametrize("side", ["input", "gradient", "both"])
def test_an_unusable_trace_splits_the_damping_evenly(side: str, scale: float) -> None:
    a, g = positive_definite(2, 3, 3), positive_definite(2, 2, 2)
    if side != "gradient":
        a[0] *= scale
    if side != "input":
        g[0] *= scale
    for_inputs, for_gradients = factored_damping(a, g, 0.25)
    assert for_inputs[0] == for_gradients[0] == 0.5
    assert 0 < for_inputs[1] != 0.5


def layers() -> Iterator[Inverted]:
    """Layers of mixed sizes, one with groups, after several batches."""
    for shapes in [((5, 5), (3, 3)), ((1, 1), (4, 4)), ((2, 4, 4), (2, 3, 3)), ((9, 9), (1, 1))]:
        factors = averaged(*(positive_definite(*shape) for shape in shapes))
        yield factors, tuple(Inverse(factor.mean) for factor in factors)


@pytest.mark.parametrize("mode", ["factored", "plain"])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_refreshed_inverses_are_those_of_the_damped_covariances(damping: float, mode: str) -> None:
    pairs = list(layers())
    refresh_inverses(pairs, damping, mode)
    for factors, inverses in pairs:
        covariances = [f.mean.reshape(-1, *f.mean.shape[-2:]) for f in factors]
        for inverse, damped in zip(inverses, damp((*covariances,), damping, mode), strict=True):
            expected = torch.linalg.inv(damped).reshape(inverse.matrix.shape)
            assert_solved(inverse.matrix, expected)
            assert_symmetric(inverse.matrix)
            assert inverse.failed == 0


@pytest.mark.parametrize("mode", ["factored", "plain"])
def test_a_diagonal_factor_is_inverted_like_a_full_one(mode: str) -> None:
    diagonal, g = torch.rand(6).double(), positive_definite(3, 3)
    results = []
    for a in (diagonal, torch.diag(diagonal)):
        factors = averaged(a, g)
        inverses = Inverse(a), Inverse(g)
        refresh_inverses([(factors, inverses)], 0.1, mode)
        refine_inverses([(factors, inverses)], 0.2, mode, steps=9)
        results.append(inverses)
    assert_solved(torch.diag(results[0][0].matrix), results[1][0].matrix)
    assert_solved(results[0][1].matrix, results[1][1].matrix)


@pytest.mark.parametrize("mode", ["factored", "plain"])
def test_a_single_factor_has_all_of_the_damping(mode: str) -> None:
    joint = positive_definite(4, 2, 2)
    factors, inverses = averaged(joint), (Inverse(joint),)
    refresh_inverses([(factors, inverses)], 0.1, mode)
    expected = torch.linalg.inv(joint + 0.1 * torch.eye(2).double())
    assert_solved(inverses[0].matrix, expected)
    grad = torch.randn(4, 1, 2).double()
    (step,), inner = apply_inverses([grad], [inverses])
    assert_solved(step, (expected @ grad.mT).mT)
    assert_same(inner, (step * grad).sum())


def test_a_diagonal_that_is_not_positive_fails_as_a_whole() -> None:
    a, g = torch.tensor([1.0, 0.0, 2.0]).double(), positive_definite(2, 2)
    factors, inverses = averaged(a, g), (Inverse(a), Inverse(g))
    refresh_inverses([(factors, inverses)], 0.0)
    assert [int(inverse.failed) for inverse in inverses] == [1, 0]
    assert torch.equal(inverses[0].matrix, torch.ones(3).double())
    assert torch.equal(inverses[1].matrix, torch.eye(2).double())
    refresh_inverses([(factors, inverses)], 0.0)  # raised from rounding
    assert inverses[0].failed == 1 and inverses[0].matrix.isfinite().all()


def test_a_failed_inverse_keeps_the_previous_pair_and_spares_its_neighbours() -> None:
    pairs = list(layers())
    refresh_inverses(pairs, 1e-3)
    factors = [factor for own, _ in pairs for factor in own]
    inverses = [inverse for _, own in pairs for inverse in own]
    previous = [inverse.matrix.clone() for inverse in inverses]
    factors[0].mean = -2 * torch.eye(5, dtype=torch.float64)
    factors[5].mean[0] = -2 * torch.eye(3, dtype=torch.float64)
    refresh_inverses(pairs, 1.0, "plain")
    assert [int(inverse.failed) for inverse in inverses] == [1, 0, 0, 0, 0, 1, 0, 0]
    for index, (factor, inverse) in enumerate(zip(factors, inverses, strict=True)):
        covariance = factor.mean
        expected = torch.linalg.inv(covariance + torch.eye(covariance.shape[-1]).double())
        kept = previous[index]
        if index in (0, 1):
            assert torch.equal(inverse.matrix, kept)
        elif index in (4, 5):
            assert torch.equal(inverse.matrix[0], kept[0])
            assert_solved(inverse.matrix[1], expected[1])
        else:
            assert_solved(inverse.matrix, expected)
    factors[5].mean[1] = factors[5].mean[0]
    refresh_inverses(pairs, 1.0, "plain")
    # More damping helps those that failed before.
    assert inverses[0].failed == 1 and inverses[5].failed == 2


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_a_failure_raises_the_damping_of_its_matrix_until_it_succeeds(damping: float) -> None:
    """The second of two groups has a slightly negative eigenvalue."""
    *_, (factors, (a, g)), _ = layers()
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.5], dtype=torch.float64))
    factors[0].mean[1] = indefinite
    levels = []
    for _ in range(20):
        refresh_inverses([(factors, (a, g))], damping, "plain")
        levels.append(a.raised.tolist())
    assert all(level[0] == 0 for level in levels)
    assert not g.raised.any()
    counts = [level[1] for level in levels]
    assert counts[:3] == [1, 2, 3]
    assert max(counts) <= Inverse.MOST_RAISED
    if damping == 0:  # rounding times a million does not reach it
        assert counts[-1] == Inverse.MOST_RAISED and a.failed == 20
    else:  # a thousand times the damping does
        assert counts[3:6] == [2, 3, 2]
        raised = indefinite + 1e3 * damping * torch.eye(4).double()
        assert_solved(a.matrix[1], torch.linalg.inv(raised))


def test_a_refresh_before_the_first_finite_batch_keeps_the_identity() -> None:
    factor, inverse = Factor(poisoned(3, 3)), Inverse(poisoned(3, 3))
    update_averages([factor], [(poisoned(3, 3), 1)], 0.9)
    refresh_inverses([((factor,), (inverse,))], 0.1)
    assert torch.equal(inverse.matrix, torch.eye(3)) and inverse.failed == 0
    refresh_inverses([((factor,), (inverse,))], 0.0)  # of a zero covariance
    assert inverse.failed == 0 and inverse.raised == 0


def test_no_layers_have_nothing_to_refresh() -> None:
    refresh_inverses([], 1e-3)
    refine_inverses([], 1e-3, steps=1)


@pytest.mark.parametrize(("mode", "power"), [("factored", 1), ("plain", 2)])
def test_as_the_damping_grows_the_step_tends_to_the_gradient_over_a_power_of_it(
    mode: str, power: int
) -> None:
    layer, *_ = layers()
    v = torch.randn(3, 5, dtype=torch.float64)
    errors = []
    for damping in (1e6, 1e10):
        refresh_inverses([layer], damping, mode)
        (step,), _ = apply_inverses([v], [layer[1]])
        error = torch.linalg.vector_norm(step * damping**power - v)
        errors.append(float(error / torch.linalg.vector_norm(v)))
    order = 2 if mode == "factored" else 1  # the damping of each factor is a square root
    assert errors[0] < 1e-2
    assert errors[1] == pytest.approx(errors[0] / 1e4 ** (1 / order), rel=0.05)


def residuals(layers: list[Inverted], damping: float) -> list[Tensor]:
    """Frobenius norms of ``I - (C + damping I) X``."""
    return [
        torch.linalg.matrix_norm(
            torch.eye(x.matrix.shape[-1]).double()
            - (factor.mean + damping * torch.eye(x.matrix.shape[-1]).double()) @ x.matrix
        )
        for factors, inverses in layers
        for factor, x in zip(factors, inverses, strict=True)
    ]


def test_refinement_squares_the_residual_until_rounding() -> None:
    pairs = list(layers())
    refresh_inverses(pairs, 0.3, "plain")
    for factors, _ in pairs:
        for factor in factors:
            factor.mean = 1.3 * factor.mean
    before = residuals(pairs, 0.3)
    assert all((0.01 < r).all() and (r < 1).all() for r in before)
    for steps in (1, 2, 6):
        for factors, inverses in pairs:
            for factor, inverse in zip(factors, inverses, strict=True):
                inverse.matrix = torch.linalg.inv(
                    factor.mean / 1.3 + 0.3 * torch.eye(factor.mean.shape[-1]).double()
                )
        refine_inverses(pairs, 0.3, "plain", steps=steps)
        rounding = 1e3 * torch.finfo(torch.float64).eps  # the condition numbers are below 1e3
        for start, left in zip(before, residuals(pairs, 0.3), strict=True):
            assert (left <= start ** (2**steps) + rounding).all()
    for _, inverses in pairs:
        for inverse in inverses:
            assert_symmetric(inverse.matrix)


def test_an_inverse_too_far_away_is_not_refined_and_its_neighbours_are() -> None:
    covariance = torch.stack([torch.eye(3), 5 * torch.eye(3)]).double()
    factors, inverses = averaged(covariance), (Inverse(covariance),)
    refine_inverses([(factors, inverses)], 0.25, steps=8)  # from the identity
    assert_solved(inverses[0].matrix[0], torch.eye(3).double() / 1.25)
    assert torch.equal(inverses[0].matrix[1], torch.eye(3).double())


def test_the_host_never_waits_for_an_inverse() -> None:
    pairs = list(layers())
    with never_waits():
        refresh_inverses(pairs, 1e-3)
        refresh_inverses(pairs, 1e-3, "plain")
        refine_inverses(pairs, 1e-3, steps=2)
