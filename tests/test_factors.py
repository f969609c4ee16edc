"""A factor's running average and damped inverse against their formulas, also after bad batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from host import NeverWaits
from oracle import assert_same, assert_symmetric, bits, poisoned, positive_definite
from plain_kfac import assert_solved, damp
from torch import Tensor

from kfac_fast import ops
from kfac_fast.factors import Factor, factored_damping, refresh_inverses

pytestmark = pytest.mark.usefixtures("one_thread")
BAD = (math.nan, math.inf, -math.inf)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def factor_of(covariance: Tensor) -> Factor:
    factor = Factor(covariance)
    factor.update(covariance, 0.95)
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
        factor.update(batch, decay)
    weights = [(1 - decays[i]) * math.prod(decays[i + 1 :]) for i in range(len(decays))]
    expected = sum(w * batch for w, batch in zip(weights, batches, strict=True)) / sum(weights)
    assert_same(factor.covariance(), expected)
    assert_same(factor.weight, torch.tensor(sum(weights), dtype=torch.float64))
    assert_symmetric(factor.covariance())


def test_the_covariance_of_one_batch_is_that_batch() -> None:
    batch = positive_definite(4, 4)
    assert_same(factor_of(batch).covariance(), batch)


def test_the_covariance_is_zero_and_the_inverse_the_identity_before_the_first_batch() -> None:
    factor = Factor(poisoned(2, 3, 3))
    assert torch.equal(factor.covariance(), torch.zeros(2, 3, 3))
    assert torch.equal(factor.inverse, torch.eye(3).expand(2, 3, 3))


@pytest.mark.parametrize("position", [(0, 0), (1, 2)], ids=str)
@pytest.mark.parametrize("value", BAD)
def test_a_bad_batch_changes_no_bit_and_is_counted(value: float, position: tuple[int, int]) -> None:
    factor = factor_of(positive_definite(2, 3, 3))
    refresh_inverses([(factor, factor)], 0.1)
    before = snapshot(factor, "total", "weight", "inverse", "failed")
    bad = positive_definite(2, 3, 3)
    bad[position[0], position[1], :] = bad[position[0], :, position[1]] = value
    factor.update(bad, 0.9)
    assert same(before, snapshot(factor, "total", "weight", "inverse", "failed"))
    assert factor.skipped == 1


def test_a_run_continues_as_if_a_bad_batch_had_never_come() -> None:
    batches = [positive_definite(3, 3) for _ in range(3)]
    clean, disturbed = Factor(batches[0]), Factor(batches[0])
    disturbed.update(torch.full((3, 3), math.nan, dtype=torch.float64), 0.9)
    for batch in batches:
        clean.update(batch, 0.9)
        disturbed.update(batch, 0.9)
        disturbed.update(batch * math.inf, 0.9)
    fields = ("total", "weight", "inverse", "failed")
    assert same(snapshot(clean, *fields), snapshot(disturbed, *fields))
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


def layer_factors() -> Iterator[tuple[Factor, Factor]]:
    """Layers of mixed sizes, one with groups, after several batches."""
    for shapes in [((5, 5), (3, 3)), ((1, 1), (4, 4)), ((2, 4, 4), (2, 3, 3)), ((9, 9), (1, 1))]:
        pair = Factor(positive_definite(*shapes[0])), Factor(positive_definite(*shapes[1]))
        for decay in (0.9, 0.5):
            for factor, scale in zip(pair, (1.0, 0.01), strict=True):
                factor.update(scale * positive_definite(*factor.total.shape), decay)
        yield pair


@pytest.mark.parametrize("mode", ["factored", "plain"])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_refreshed_inverses_are_those_of_the_damped_covariances(damping: float, mode: str) -> None:
    pairs = list(layer_factors())
    refresh_inverses(pairs, damping, mode)
    for pair in pairs:
        covariances = [f.covariance().reshape(-1, *f.total.shape[-2:]) for f in pair]
        for factor, damped in zip(pair, damp((*covariances,), damping, mode), strict=True):
            expected = torch.linalg.inv(damped).reshape(factor.total.shape)
            assert_solved(factor.inverse, expected)
            assert_symmetric(factor.inverse)
            assert factor.failed == 0


def test_a_failed_inverse_keeps_the_previous_pair_and_spares_its_neighbours() -> None:
    pairs = list(layer_factors())
    refresh_inverses(pairs, 1e-3)
    previous = [factor.inverse.clone() for pair in pairs for factor in pair]
    pairs[0][0].total = -torch.eye(5, dtype=torch.float64)
    pairs[2][1].total[0] = -torch.eye(3, dtype=torch.float64)
    refresh_inverses(pairs, 1.0, "plain")
    failed = [int(factor.failed) for pair in pairs for factor in pair]
    assert failed == [1, 0, 0, 0, 0, 1, 0, 0]
    for index, factor in enumerate(factor for pair in pairs for factor in pair):
        covariance = factor.covariance()
        inverse = torch.linalg.inv(covariance + torch.eye(covariance.shape[-1]).double())
        kept = previous[index]
        if index in (0, 1):
            assert torch.equal(factor.inverse, kept)
        elif index in (4, 5):
            assert torch.equal(factor.inverse[0], kept[0])
            assert_solved(factor.inverse[1], inverse[1])
        else:
            assert_solved(factor.inverse, inverse)
    pairs[2][1].total[1] = pairs[2][1].total[0]
    refresh_inverses(pairs, 1.0, "plain")
    # More damping helps those that failed before.
    assert pairs[0][0].failed == 1 and pairs[2][1].failed == 2


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_a_failure_raises_the_damping_of_its_matrix_until_it_succeeds(damping: float) -> None:
    """The second of two groups has a slightly negative eigenvalue."""
    (a, g), *_ = [pair for pair in layer_factors() if pair[0].total.dim() == 3]
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.5], dtype=torch.float64))
    a.total[1] = a.weight * indefinite
    levels = []
    for _ in range(20):
        refresh_inverses([(a, g)], damping, "plain")
        levels.append(a.raised.tolist())
    assert all(level[0] == 0 for level in levels)
    assert not g.raised.any()
    counts = [level[1] for level in levels]
    assert counts[:3] == [1, 2, 3]
    assert max(counts) <= Factor.MOST_RAISED
    if damping == 0:  # rounding times a million does not reach it
        assert counts[-1] == Factor.MOST_RAISED and a.failed == 20
    else:  # a thousand times the damping does
        assert counts[3:6] == [2, 3, 2]
        raised = indefinite + 1e3 * damping * torch.eye(4).double()
        assert_solved(a.inverse[1], torch.linalg.inv(raised))


def test_a_refresh_before_the_first_finite_batch_keeps_the_identity() -> None:
    factor = Factor(poisoned(3, 3))
    factor.update(poisoned(3, 3), 0.9)
    refresh_inverses([(factor, factor)], 0.1)
    assert torch.equal(factor.inverse, torch.eye(3)) and factor.failed == 0
    refresh_inverses([(factor, factor)], 0.0)  # of a zero covariance
    assert factor.failed == 0 and factor.raised == 0


def test_no_layers_have_nothing_to_refresh() -> None:
    refresh_inverses([], 1e-3)


@pytest.mark.parametrize(("mode", "power"), [("factored", 1), ("plain", 2)])
def test_as_the_damping_grows_the_step_tends_to_the_gradient_over_a_power_of_it(
    mode: str, power: int
) -> None:
    (a, g), *_ = layer_factors()
    v = torch.randn(3, 5, dtype=torch.float64)
    errors = []
    for damping in (1e6, 1e10):
        refresh_inverses([(a, g)], damping, mode)
        step = g.inverse @ v @ a.inverse * damping**power
        errors.append(float(torch.linalg.vector_norm(step - v) / torch.linalg.vector_norm(v)))
    order = 2 if mode == "factored" else 1  # the damping of each factor is a square root
    assert errors[0] < 1e-2
    assert errors[1] == pytest.approx(errors[0] / 1e4 ** (1 / order), rel=0.05)


def test_the_host_never_waits_for_a_factor() -> None:
    pairs = list(layer_factors())
    with NeverWaits():
        for pair in pairs:
            for factor in pair:
                factor.update(torch.full_like(factor.total, math.nan), 0.9)
                factor.update(torch.ones_like(factor.total), 0.9)
        refresh_inverses(pairs, 1e-3)
        refresh_inverses(pairs, 1e-3, "plain")
    assert [int(factor.skipped) for pair in pairs for factor in pair] == [1] * 8
