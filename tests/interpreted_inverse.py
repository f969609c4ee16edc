"""The Triton kernels of damped inverses on CPU tensors; run by test_interpreted.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from inverses import assert_as_accurate, covariance
from oracle import assert_within_budget, bits, lower_only, poisoned, spread
from torch import Tensor

import kfac_fast
from kfac_fast import ops
from kfac_fast.kernels.damped_inverse import damped_inverse


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _run(matrices: Sequence[Tensor], damping: Sequence[Tensor]) -> ops.DampedInverses:
    out = [poisoned(*m.shape) for m in matrices]
    total = sum(math.prod(m.shape[:-2]) for m in matrices)
    info, logdet = torch.full((total,), -1, dtype=torch.int32), poisoned(total)
    damped_inverse(matrices, damping, out, info, logdet)
    return ops.DampedInverses(out, info, logdet)


def test_errors_of_large_condition_numbers() -> None:
    sizes = [2, 33, 64, 65, 150] * 3
    matrices = [covariance(size, decades=6) for size in sizes]
    assert_as_accurate(_run(matrices, len(matrices) * [torch.tensor(1e-7)]), matrices, 1e-7)


def test_mixed_sizes_stacks_strides_and_dampings() -> None:
    stack = torch.stack([covariance(5) for _ in range(4)]).view(2, 2, 5, 5)
    large, damping = covariance(70), torch.rand(2, 2)
    layouts = [
        (stack, damping),
        (spread(stack).mT, spread(damping)),
        (stack.transpose(0, 1), damping.T),
        (lower_only(stack[0]), torch.tensor(0.1)),
        (spread(large).mT, damping[0, 0]),
        (stack[:0], damping[:0]),
        (lower_only(large), damping[0, 0]),
    ]
    result = _run(*map(list, zip(*layouts, strict=True)))
    assert not result.info.any()
    for (layout, shift), inverse in zip(layouts, result.matrices, strict=True):
        own = layout.tril() + layout.tril(-1).mT
        alone = _run([own.contiguous()], [shift.contiguous()])
        assert torch.equal(bits(inverse), bits(alone.matrices[0]))
        damped = own.double() + shift.double()[..., None, None] * torch.eye(own.shape[-1])
        assert_within_budget(inverse, torch.linalg.inv(damped.float()), torch.linalg.inv(damped))


@pytest.mark.parametrize(
    ("size", "place", "value"), [(20, 7, math.nan), (100, 30, -5.0), (100, 80, math.inf)]
)
def test_a_failure_touches_only_its_own_matrix(size: int, place: int, value: float) -> None:
    good = [covariance(n) for n in (7, size, 70)]
    damping = 3 * [torch.tensor(1e-3)]
    expected = _run(good, damping)
    bad = [m.clone() for m in good]
    bad[1][place, place] = value
    result = _run(bad, damping)
    assert result.info.tolist() == [0, place + 1, 0]
    assert result.matrices[1].isnan().all() and result.logdet[1].isnan()
    for i in (0, 2):
        assert torch.equal(bits(result.matrices[i]), bits(expected.matrices[i]))
        assert result.logdet[i] == expected.logdet[i]


def test_the_public_function_serves_it() -> None:
    matrices = [covariance(size) for size in (9, 70)]
    with kfac_fast.use("triton"):
        result = ops.damped_inverse(matrices, 0.1, logdet=True)
        assert ops.damped_inverse(matrices[:1], 0.1).logdet is None
        for damping in (torch.tensor([0.1, 0.1]), [0.1, torch.tensor(0.1)]):
            same = ops.damped_inverse(matrices, damping).matrices
            assert all(map(torch.equal, same, result.matrices))
        assert ops.damped_inverse([torch.empty(0, 3, 3)], 0.1).matrices[0].shape == (0, 3, 3)
        with pytest.raises(RuntimeError, match="float64"):
            ops.damped_inverse([matrices[0].double()], 0.1)
    assert_as_accurate(result, matrices, 0.1)
