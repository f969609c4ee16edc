"""The Triton inverses on a device, against float64."""

from __future__ import annotations

import pytest
import torch
from host import waits_refused
from inverses import assert_as_accurate, covariance
from oracle import bits, poisoned

import kfac_fast
from kfac_fast import ops

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [1, 2, 17, 63, 64, 65, 128, 129, 300, 769, 2048])
@pytest.mark.parametrize("decades", [2, 6])
def test_every_size(size: int, decades: int) -> None:
    matrices = [covariance(size, decades=decades).cuda() for _ in range(8)]
    out = [poisoned(size, size, device="cuda") for _ in matrices]
    damping = 10.0 ** -(decades + 1)
    on_device = torch.tensor(damping, device="cuda")
    with waits_refused(), kfac_fast.use("triton"):
        result = ops.damped_inverse(matrices, on_device, logdet=True, out=out)
    assert_as_accurate(result, matrices, damping)
    with kfac_fast.use("triton"):
        again = ops.damped_inverse(matrices, on_device, logdet=True)
    assert torch.equal(bits(again.logdet), bits(result.logdet))
    for a, b in zip(again.matrices, result.matrices, strict=True):
        assert torch.equal(bits(a), bits(b))


def test_mixed_sizes_and_a_failure() -> None:
    matrices = [covariance(n).cuda() for n in (7, 300, 64, 700, 129)]
    matrices[1][200, 200] = -5.0
    with kfac_fast.use("triton"):
        result = ops.damped_inverse(matrices, 1e-3, logdet=True)
    assert result.info.tolist() == [0, 201, 0, 0, 0]
    assert result.matrices[1].isnan().all() and result.logdet[1].isnan()
    good = [0, 2, 3, 4]
    found = [result.matrices[i] for i in good]
    rest = ops.DampedInverses(found, result.info[good], result.logdet[good])
    assert_as_accurate(rest, [matrices[i] for i in good], 1e-3)


def test_negated_views_are_inverted_as_what_they_stand_for() -> None:
    matrix = covariance(20)
    view = torch.complex(torch.zeros_like(matrix), -matrix).cuda().conj().imag
    assert view.is_neg()
    with kfac_fast.use("triton"):
        found, expected = (ops.damped_inverse([m], 0.1).matrices for m in (view, matrix.cuda()))
    assert torch.equal(found[0], expected[0])
