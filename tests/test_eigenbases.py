"""Eigendecompositions of lists, and exact damping in the eigenbases against dense solves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import assert_same, assert_within_budget, positive_definite, spread
from plain_kfac import assert_solved, averaged
from torch import Tensor

import kfac_fast
from kfac_fast import backends, ops, schema
from kfac_fast.backends import native
from kfac_fast.eigenbases import (
    Eigenbasis,
    apply_eigenbases,
    eigendecompositions,
    refresh_eigenbases,
)
from kfac_fast.factors import Factor, RunningAverage, update_averages

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(5, 5), (3, 4, 4), (5, 5), (300, 300), (1, 1), (290, 290), (300, 300)]
Layer = tuple[tuple[Factor, ...], tuple[Eigenbasis, ...]]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def layer_of(*covariances: Tensor) -> Layer:
    return averaged(*covariances), tuple(Eigenbasis(covariance) for covariance in covariances)


def dense(covariance: Tensor) -> Tensor:
    return torch.diag(covariance) if covariance.dim() == 1 else covariance


def exactly_damped(v: Tensor, a: Tensor, g: Tensor, damping: float) -> Tensor:
    """``(G (x) A + damping I)^-1 vec(V)``."""
    block = torch.kron(g, a)
    damped = block + damping * torch.eye(len(block)).double()
    return torch.linalg.solve(damped, v.flatten()).reshape(v.shape)


@pytest.fixture(params=["cpp", "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with kfac_fast.use(request.param):
        yield request.param


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lists_of_mixed_sizes_are_decomposed_as_one_by_one(
    dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    matrices = [positive_definite(*shape) for shape in SHAPES]
    matrices += [positive_definite(60, 8, 8), positive_definite(2, 3, 4, 4)]
    lower = [spread(matrix.to(dtype)) for matrix in matrices]  # in memory with gaps
    lower[0] = lower[0].mT
    for matrix in lower:  # the upper triangle is not read
        above = torch.ones(matrix.shape[-2:]).triu(1).bool()
        matrix[..., above] = math.nan
    results = eigendecompositions(lower)
    for matrix, result in zip(matrices, results, strict=True):
        rounded = matrix.to(dtype)
        values, vectors = torch.linalg.eigh(rounded)
        assert result.valid.all() and result.valid.shape == matrix.shape[:-2]
        assert_within_budget(result.values, values, torch.linalg.eigvalsh(rounded.double()))
        product, expected = (
            (q.double() * s[..., None, :].double()) @ q.mT.double()
            for q, s in ((result.vectors, result.values), (vectors, values))
        )
        assert_within_budget(product.to(dtype), expected.to(dtype), rounded.double())
        identity = torch.eye(matrix.shape[-1]).double().expand_as(matrix)
        orthogonal, expected = (q.double().mT @ q.double() for q in (result.vectors, vectors))
        assert_within_budget(orthogonal.to(dtype), expected.to(dtype), identity)


@pytest.mark.usefixtures("implementation")
def test_what_is_not_finite_fails_alone() -> None:
    matrices = [torch.stack([positive_definite(4, 4).float() for _ in range(5)]) for _ in range(2)]
    broken = [stack.clone() for stack in matrices]
    broken[0][1, 3, 0], broken[0][4, 2, 2], broken[1][0, 0, 0] = math.nan, math.inf, -math.inf
    found, whole = ops.eigh(broken), ops.eigh(matrices)
    assert found.info.tolist() == [0, 1, 0, 0, 1, 1, 0, 0, 0, 0]
    failed = found.info.bool().split(5)
    for part, expected in ((found.values, whole.values), (found.vectors, whole.vectors)):
        for own, other, bad in zip(part, expected, failed, strict=True):
            assert own[bad].isnan().all() and torch.equal(own[~bad], other[~bad])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # float64 would not help
        assert eigendecompositions(broken)[0].valid.tolist() == [True, False, True, True, False]


@pytest.mark.usefixtures("implementation")
def test_eigenvalues_that_overflow_are_a_failure() -> None:
    large = torch.full((3, 3), 3e38)
    found = ops.eigh([torch.stack([torch.eye(3), large]), torch.eye(2)])
    assert found.info.tolist() == [0, 1, 0]
    assert found.values[0][1].isnan().all() and found.vectors[0][1].isnan().all()
    assert torch.equal(found.values[0][0], torch.ones(3))


def test_stacks_of_tiny_matrices_are_decomposed_in_groups() -> None:
    for size in (1, 2, 7):
        stack = positive_definite(3000, size, size).float()
        found = ops.eigh([stack, stack[:1]])
        values, vectors = torch.linalg.eigh(stack)
        torch.testing.assert_close(found.values[0], values)
        products = found.vectors[0] * found.values[0][:, None] @ found.vectors[0].mT
        torch.testing.assert_close(products, vectors * values[:, None] @ vectors.mT)
        assert torch.equal(found.values[1], found.values[0][:1]) and not found.info.any()


class Broken:
    """A compiled extension on whose second matrix torch's eigensolver raises an error."""

    @staticmethod
    def eigh(*arguments: Any) -> bool:
        assert native.eigh(*arguments) is True
        arguments[3][1] = 2
        return True


def test_errors_of_the_eigensolver_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [positive_definite(4, 4).float() for _ in range(3)]
    expected = ops.eigh(matrices)
    monkeypatch.setattr(backends, "native", Broken)

    def solved() -> ops.Eigendecompositions:
        results = [m[0].clone() for m in matrices], [m.clone() for m in matrices]
        info = torch.zeros(3, dtype=torch.int32)
        assert backends._eigh(matrices, *results, info)
        return ops.Eigendecompositions(*results, info)

    again = solved()
    assert not again.info.any()
    torch.testing.assert_close(again.values, expected.values)
    monkeypatch.setattr(torch.linalg, "eigh", failing_eigh({torch.float32}, matrices[1]))
    failed = solved()
    assert failed.info.tolist() == [0, 1, 0] and failed.vectors[1].isnan().all()
    assert torch.equal(failed.vectors[2], expected.vectors[2])

    def without_memory(stack: Tensor) -> Any:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch.linalg, "eigh", without_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        solved()


def eigh_arguments(matrix: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Matrices, values, vectors and info."""
    results = [torch.full_like(matrix[0], math.nan)], [torch.full_like(matrix, math.nan)]
    return [matrix], *results, torch.full((1,), 7, dtype=torch.int32)


MATRIX = torch.eye(3)
REFUSED: dict[str, dict[int, Any]] = {
    "no matrix": {0: [], 1: [], 2: [], 3: torch.zeros(0, dtype=torch.int32)},
    "no square": {0: [torch.ones(3, 2)]},
    "an empty matrix": {0: [torch.ones(0, 0)], 1: [torch.ones(0)], 2: [torch.ones(0, 0)]},
    "half precision": {0: [MATRIX.half()]},
    "values of another shape": {1: [torch.ones(2)]},
    "values of another dtype": {1: [torch.ones(3).double()]},
    "values that are missing": {1: []},
    "vectors with gaps": {2: [torch.ones(3, 6)[:, ::2]]},
    "vectors in the matrix": {2: [MATRIX]},
    "values in the matrix": {1: [MATRIX[1]]},
    "an info of another length": {3: torch.zeros(2, dtype=torch.int32)},
    "an info of another dtype": {3: torch.zeros(1)},
}


@pytest.mark.parametrize("replaced", REFUSED.values(), ids=list(REFUSED))
def test_what_eigh_refuses(replaced: dict[int, Any]) -> None:
    given = eigh_arguments(MATRIX)
    arguments = [replaced.get(i, value) for i, value in enumerate(given)]
    with pytest.raises((ValueError, TypeError), match=r"^eigh: "):
        schema.check("eigh", *arguments)
    assert native.eigh(*arguments) is None
    with pytest.raises((ValueError, TypeError), match=r"^eigh: "):
        torch.ops.kfac_fast.eigh(*arguments)
    assert given[1][0].isnan().all() and given[2][0].isnan().all() and given[3] == 7
    assert torch.equal(MATRIX, torch.eye(3))


def failing_eigh(dtypes: set[torch.dtype], bad: Tensor) -> Any:
    """PyTorch's eigensolver, but for a matrix on which it does not converge in some dtypes."""
    eigh = torch.linalg.eigh

    def solve(stack: Tensor) -> Any:
        if stack.dtype in dtypes and any(torch.equal(m.float(), bad.tril()) for m in stack):
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(stack)

    return solve


def test_what_does_not_converge_is_decomposed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [positive_definite(6, 6).float() for _ in range(3)]
    monkeypatch.setattr(torch.linalg, "eigh", failing_eigh({torch.float32}, matrices[1]))
    with (
        kfac_fast.use("reference"),
        pytest.warns(RuntimeWarning, match="6 x 6 .* torch.float32; .* again in torch.float64"),
    ):
        results = eigendecompositions(matrices)
    for matrix, result in zip(matrices, results, strict=True):
        assert result.valid and result.vectors.dtype == torch.float32
        product = (result.vectors.double() * result.values.double()) @ result.vectors.double().mT
        bound = 64 * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(matrix.double())
        assert torch.linalg.matrix_norm(product - matrix.double()) <= bound


def test_what_does_not_converge_at_all_is_not_valid_and_its_neighbours_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrices = [positive_definite(4, 4).float() for _ in range(3)]
    failing = failing_eigh({torch.float32, torch.float64}, matrices[1])
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with kfac_fast.use("reference"), pytest.warns(RuntimeWarning):
        results = eigendecompositions([torch.stack(matrices), matrices[2]])
    assert results[0].valid.tolist() == [True, False, True] and results[1].valid
    assert results[0].vectors[1].isnan().all()
    assert torch.equal(results[0].values[2], results[1].values)
    with kfac_fast.use("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = layer_of(torch.stack(matrices).mean(0), matrices[1])
        layer[0][1].mean, layer[0][1].weight = matrices[1], torch.tensor(1.0)
        refresh_eigenbases([layer])
    assert [int(basis.failed) for basis in layer[1]] == [0, 1]
    for basis in layer[1]:  # both sides keep what they had
        assert torch.equal(basis.vectors, torch.eye(4)) and torch.equal(basis.values, torch.ones(4))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("damping", [1e-3, 10.0])
def test_exact_damping_is_that_of_the_dense_block(damping: float, diagonal: bool) -> None:
    sides = [((5,) if diagonal else (5, 5), (3, 3)), ((2, 4, 4), (2, 3, 3)), ((1, 1), (6, 6))]
    covariances = [
        (torch.rand(5).double() if len(a) == 1 else positive_definite(*a), positive_definite(*g))
        for a, g in sides
    ]
    layers = [layer_of(a, g) for a, g in covariances]
    refresh_eigenbases(layers)
    grads = [torch.randn(*g[:-1], a[-1]).double() for a, g in sides]
    steps, inner = apply_eigenbases(grads, [bases for _, bases in layers], [None] * 3, damping)
    total = 0.0
    for v, step, (a, g) in zip(grads, steps, covariances, strict=True):
        groups = zip(*(t.reshape(-1, *t.shape[-2:]) for t in (v, dense(a), g)), strict=True)
        expected = torch.stack([exactly_damped(*group, damping) for group in groups])
        assert_solved(step.reshape(expected.shape), expected)
        total += float((v * step).sum())
    assert float(inner) == pytest.approx(total, rel=1e-12)


def test_a_single_factor_is_damped_as_a_whole() -> None:
    joint = positive_definite(4, 2, 2)
    layer = layer_of(joint)
    refresh_eigenbases([layer])
    grad = torch.randn(4, 1, 2).double()
    (step,), inner = apply_eigenbases([grad], [layer[1]], [None], 0.1)
    expected = torch.linalg.solve(joint + 0.1 * torch.eye(2).double(), grad.mT).mT
    assert_solved(step, expected)
    assert_same(inner, (step * grad).sum())


def test_corrected_eigenvalues_replace_the_products_once_there_are_any() -> None:
    a, g, v = positive_definite(4, 4), positive_definite(3, 3), torch.randn(3, 4).double()
    layer = layer_of(a, g)
    refresh_eigenbases([layer])
    correction = RunningAverage(v)
    (before,), _ = apply_eigenbases([v], [layer[1]], [correction], 0.1)
    assert_solved(before, exactly_damped(v, a, g, 0.1))
    corrected = torch.rand(3, 4).double()
    update_averages([correction], [(corrected, 1)], 0.9)
    (after,), inner = apply_eigenbases([v], [layer[1]], [correction], 0.1)
    basis = torch.kron(layer[1][1].vectors, layer[1][0].vectors)
    block = (basis * (corrected.flatten() + 0.1)) @ basis.mT
    assert_solved(after, torch.linalg.solve(block, v.flatten()).reshape(3, 4))
    assert_same(inner, (v * after).sum())


def test_as_the_damping_grows_the_step_tends_to_the_gradient_over_it() -> None:
    layer, v = (
        layer_of(positive_definite(5, 5), positive_definite(3, 3)),
        torch.randn(3, 5).double(),
    )
    refresh_eigenbases([layer])
    errors = []
    for damping in (1e4, 1e8):
        (step,), _ = apply_eigenbases([v], [layer[1]], [None], damping)
        errors.append(float((step * damping - v).norm() / v.norm()))
    assert errors[0] < 1e-2
    assert errors[1] == pytest.approx(errors[0] / 1e4, rel=0.05)


def test_a_singular_covariance_has_no_negative_eigenvalues() -> None:
    row = torch.randn(1, 40)
    layer = layer_of(row.mT @ row, torch.eye(2))
    refresh_eigenbases([layer])
    assert (layer[1][0].values >= 0).all() and math.isclose(
        float(layer[1][0].values.sum()), float(row.square().sum()), rel_tol=1e-5
    )


def test_the_condition_number_of_a_singular_matrix_is_infinite() -> None:
    basis = Eigenbasis(torch.zeros(3, 2, 2))
    basis.values.copy_(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 2.0]]))
    assert basis.condition_number().tolist() == [math.inf, math.inf, 2.0]


def test_a_refresh_before_the_first_finite_batch_keeps_the_identity() -> None:
    a = torch.full((3, 3), math.nan)
    factor, basis = Factor(a), Eigenbasis(a)
    update_averages([factor], [(a, 1)], 0.9)
    refresh_eigenbases([((factor,), (basis,))])
    assert torch.equal(basis.vectors, torch.eye(3)) and basis.failed == 0


def test_no_layers_have_nothing_to_refresh() -> None:
    refresh_eigenbases([])
    assert eigendecompositions([]) == []
    assert apply_eigenbases([], [], [], 1.0)[0] == []
