"""Compiled running averages and mean eigenvalues against the reference; what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import (
    assert_same,
    assert_within_budget,
    bits,
    poisoned,
    positive_definite,
    spread,
)
from torch import Tensor

import kfac_fast
from kfac_fast import ops, reference, schema
from kfac_fast.backends import native

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = ((5, 5), (3, 4, 4), (1, 1), (7,), (70, 70))
BAD = (math.nan, math.inf, -math.inf)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def sums_of(dtype: torch.dtype) -> list[Tensor]:
    full = [positive_definite(*shape) for shape in SHAPES if len(shape) > 1]
    full.insert(3, torch.rand(7, dtype=torch.float64))
    return [total.to(dtype) for total in full]


def started(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Averages, weights and counts before the first batch."""
    shapes = SHAPES
    return (
        [torch.zeros(shape, dtype=dtype) for shape in shapes],
        [torch.zeros((), dtype=dtype) for _ in shapes],
        [torch.zeros((), dtype=torch.int64) for _ in shapes],
    )


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_averages_as_the_reference(dtype: torch.dtype, decay: float) -> None:
    ours, plain, exact = started(dtype), started(dtype), started(torch.float64)
    for batch in range(4):
        sums, terms = sums_of(dtype), [float(batch + i + 1) for i in range(len(SHAPES))]
        if batch == 2:
            sums[1][2, 3, 3] = math.nan
        assert native.update_averages(sums, terms, decay, True, *ours) is True
        reference.update_averages(sums, terms, decay, True, *plain)
        reference.update_averages([s.double() for s in sums], terms, decay, True, *exact)
    assert [int(count) for count in ours[2]] == [int(n) for n in plain[2]] == [0, 1, 0, 0, 0]
    for kind in (0, 1):
        for own, other, truth in zip(ours[kind], plain[kind], exact[kind], strict=True):
            if dtype == torch.float64:
                assert_same(own, truth)
            else:
                assert_within_budget(own, other, truth)


@pytest.mark.parametrize("decay", [0.0, 0.4, 0.9])
def test_the_first_mean_is_the_batch_itself(decay: float) -> None:
    for implementation in (native, reference):
        averages, *state = started(torch.float32)
        sums = sums_of(torch.float32)
        implementation.update_averages(sums, [3.0] * len(sums), decay, True, averages, *state)
        assert all(torch.equal(a, total / 3) for a, total in zip(averages, sums, strict=True))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("covariances", [True, False])
@pytest.mark.parametrize("implementation", [native, reference], ids=["cpp", "reference"])
def test_only_what_is_not_finite_is_left_out(
    implementation: Any, value: float, covariances: bool
) -> None:
    state = started(torch.float32)
    terms = [2.0] * len(SHAPES)
    implementation.update_averages(sums_of(torch.float32), terms, 0.9, True, *state)
    state[0][0][0, 1] = -0.0
    before = [[bits(tensor).clone() for tensor in kind] for kind in state]
    sums = sums_of(torch.float32)
    sums[0][4, 4] = value
    sums[4][69, 3] = value  # off the diagonal
    implementation.update_averages(sums, terms, 0.9, covariances, *state)
    bad = [0] if covariances else [0, 4]
    assert [i for i, count in enumerate(state[2]) if count == 1] == bad
    for i in range(len(SHAPES)):
        unchanged = [torch.equal(bits(state[kind][i]), before[kind][i]) for kind in (0, 1)]
        assert unchanged == [i in bad, i in bad]


def test_a_large_average_is_shared_by_threads() -> None:
    torch.set_num_threads(2)
    total = torch.randn(900, 900)
    out, weights, skipped = [torch.zeros(900, 900)], [torch.zeros(())], [torch.tensor(0)]
    ops.update_averages([total], [5], 0.9, out=out, weights=weights, skipped=skipped)
    assert torch.equal(out[0], total / 5)
    ops.update_averages([total], [2], 0.9, out=out, weights=weights, skipped=skipped)
    torch.testing.assert_close(out[0], (0.9 * total / 5 + total / 2) / 1.9)


def test_sums_of_any_strides_are_averaged() -> None:
    total = spread(positive_definite(4, 4))
    out, weights, skipped = (
        [torch.zeros(4, 4).double()],
        [torch.zeros(()).double()],
        [torch.tensor(0)],
    )
    assert native.update_averages([total], [1.0], 0.5, True, out, weights, skipped) is None
    found = ops.update_averages([total], [1], 0.5, out=out, weights=weights, skipped=skipped)
    assert found[0] is out[0] and torch.equal(out[0], total)


def arguments(**changed: Any) -> tuple[Any, ...]:
    defaults = {
        "sums": [torch.ones(3, 3)],
        "terms": [1.0],
        "decay": 0.5,
        "covariances": True,
        "out": [torch.zeros(3, 3)],
        "weights": [torch.zeros(())],
        "skipped": [torch.tensor(0)],
    }
    return tuple((defaults | changed).values())


MEMORY = torch.zeros(12)
REFUSED: dict[str, dict[str, Any]] = {
    "a missing sum": {"sums": []},
    "a missing number": {"terms": []},
    "a missing weight": {"weights": []},
    "a missing count": {"skipped": []},
    "a decay of one": {"decay": 1.0},
    "a negative decay": {"decay": -0.1},
    "a decay that is no number": {"decay": math.nan},
    "an empty one": {"sums": [torch.ones(0, 0)], "out": [torch.zeros(0, 0)]},
    "another shape": {"sums": [torch.ones(2, 2)]},
    "another rank": {"sums": [torch.ones(1, 3, 3)]},
    "another dtype": {"sums": [torch.ones(3, 3).double()]},
    "half precision": {"sums": [torch.ones(3, 3).half()], "out": [torch.zeros(3, 3).half()]},
    "no square": {"sums": [torch.ones(3, 2)], "out": [torch.zeros(3, 2)]},
    "a scalar": {"sums": [torch.ones(())], "out": [torch.zeros(())]},
    "an out with gaps": {"out": [torch.zeros(3, 6)[:, ::2]]},
    "an out that requires gradients": {"out": [torch.zeros(3, 3).requires_grad_()]},
    "an out in its sum": {"sums": [MEMORY[:9].view(3, 3)], "out": [MEMORY[1:10].view(3, 3)]},
    "a weight in its average": {"out": [MEMORY[:9].view(3, 3)], "weights": [MEMORY[8]]},
    "a vector for a weight": {"weights": [torch.zeros(1)]},
    "a weight of another dtype": {"weights": [torch.zeros(()).double()]},
    "a count of another dtype": {"skipped": [torch.zeros((), dtype=torch.int32)]},
}


@pytest.mark.parametrize("changed", REFUSED.values(), ids=REFUSED)
def test_what_the_check_refuses_the_kernel_refuses(changed: dict[str, Any]) -> None:
    refused = arguments(**changed)
    with pytest.raises((ValueError, TypeError), match=r"^update_averages: "):
        schema.check("update_averages", *refused)
    assert native.update_averages(*refused) is None
    names = "sums", "terms", "decay", "covariances", "out", "weights", "skipped"
    with pytest.raises((ValueError, TypeError), match=r"^update_averages: "):
        ops.update_averages(*refused[:3], **dict(zip(names[3:], refused[3:], strict=True)))
    assert all(not tensor.any() for kind in refused[4:] for tensor in kind)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"terms": [torch.tensor(2.0)]},
            "terms must be .* got Tensor",
        ),
        ({"terms": ["a"]}, "terms must be .* got str"),
        ({"decay": None}, "decay must be float or int or SymFloat, got NoneType"),
        ({"covariances": 1}, "covariances must be bool, got int"),
    ],
)
def test_other_types_are_refused(changed: dict[str, Any], message: str) -> None:
    sums, terms, decay, covariances, out, weights, skipped = arguments(**changed)
    with pytest.raises(TypeError, match=f"^update_averages: {message}$"):
        ops.update_averages(
            *(sums, terms, decay),
            out=out,
            weights=weights,
            skipped=skipped,
            covariances=covariances,
        )
    assert not out[0].any()


def test_no_averages_are_no_error() -> None:
    assert ops.update_averages([], [], 0.9, out=[], weights=[], skipped=[]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_eigenvalues(dtype: torch.dtype) -> None:
    stack = positive_definite(2, 3, 6, 6)[..., ::2, ::2]
    exact = [*sums_of(torch.float64), stack.transpose(0, 1), spread(torch.rand(9).double())]
    exact = [matrix.to(dtype).double() for matrix in exact]
    values = []
    for matrix in exact:
        full = torch.diag(matrix) if matrix.dim() == 1 else matrix
        values.append(torch.linalg.eigvalsh(full).mean(-1).flatten())
    matrices = [matrix.to(dtype) for matrix in exact]
    out = poisoned(14, dtype=dtype)
    assert native.mean_eigenvalues(matrices, out) is True
    torch.testing.assert_close(out.double(), torch.cat(values), rtol=1e-6, atol=0)
    plain = torch.empty_like(out)
    reference.mean_eigenvalues(matrices, plain)
    torch.testing.assert_close(plain, out)


def test_a_new_result_has_a_number_for_each_matrix_of_stacks_and_diagonals() -> None:
    matrices = [torch.full((7,), 2.0), 3 * torch.eye(4).expand(3, 4, 4)]
    assert ops.mean_eigenvalues(matrices).tolist() == [2, 3, 3, 3]
    with kfac_fast.use("reference"):
        assert ops.mean_eigenvalues(matrices).tolist() == [2, 3, 3, 3]


def test_threads_share_long_diagonals() -> None:
    torch.set_num_threads(2)
    sums = [torch.rand(size) for size in (60_000, 70_000, 40_000)]
    sums[1][69_999] = math.nan
    out, weights = [torch.zeros_like(s) for s in sums], [torch.zeros(()) for _ in sums]
    skipped = [torch.tensor(0) for _ in sums]
    ops.update_averages(sums, [3, 3, 3], 0.9, out=out, weights=weights, skipped=skipped)
    assert [int(count) for count in skipped] == [0, 1, 0]
    assert torch.equal(out[0], sums[0] / 3) and torch.equal(out[2], sums[2] / 3)
    assert not out[1].any()
    values = ops.mean_eigenvalues([sums[0], out[1], sums[2]]).double()
    exact = torch.stack([s.double().mean() for s in (sums[0], out[1], sums[2])])
    torch.testing.assert_close(values, exact, rtol=1e-6, atol=0)


def test_a_mean_that_is_not_finite_stays_alone() -> None:
    bad = torch.eye(3)
    bad[1, 1] = math.nan
    values = ops.mean_eigenvalues([2 * torch.eye(4), bad, math.inf * torch.ones(2)])
    assert values[0] == 2 and values[1].isnan() and values[2] == math.inf


REFUSED_MATRICES: dict[str, tuple[list[Tensor], Tensor]] = {
    "no matrix": ([], torch.zeros(0)),
    "no square": ([torch.ones(2, 3)], torch.zeros(1)),
    "a scalar": ([torch.ones(())], torch.zeros(1)),
    "an empty one": ([torch.ones(0, 0)], torch.zeros(1)),
    "an empty stack": ([torch.ones(0, 2, 2)], torch.zeros(0)),
    "two dtypes": ([torch.eye(2), torch.eye(2).double()], torch.zeros(2)),
    "half precision": ([torch.eye(2).half()], torch.zeros(1).half()),
    "an out of another length": ([torch.eye(2)], torch.zeros(2)),
    "an out of another dtype": ([torch.eye(2)], torch.zeros(1).double()),
    "an out in a matrix": ([MEMORY[:9].view(3, 3)], MEMORY[4:5]),
    "an out that requires gradients": ([torch.eye(2)], torch.zeros(1).requires_grad_()),
}


@pytest.mark.parametrize("refused", REFUSED_MATRICES.values(), ids=REFUSED_MATRICES)
def test_what_mean_eigenvalues_refuses(refused: tuple[list[Tensor], Tensor]) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^mean_eigenvalues: "):
        schema.check("mean_eigenvalues", *refused)
    assert native.mean_eigenvalues(*refused) is None
    with pytest.raises((ValueError, TypeError), match=r"^mean_eigenvalues: "):
        ops.mean_eigenvalues(refused[0], out=refused[1])
    assert not refused[1].any()
