"""The CUDA C++ inverses on a device, against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from host import waits_refused
from inverses import assert_as_accurate, covariance
from oracle import bits, lower_only, poisoned, spread
from torch import Tensor

import kfac_fast
from kfac_fast import ops
from kfac_fast.backends import TABLE

pytestmark = pytest.mark.gpu
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SIZES = (1, 2, 17, 32, 33, 64, 65, 96, 97, 100, 128, 129, 200, 300, 769, 2048)
# Beyond it, float64's exact inverses, in extended precision on the CPU, take minutes.
LARGEST_IN_FLOAT64 = 300


@pytest.fixture(autouse=True)
def kernel() -> None:
    torch.manual_seed(0)
    (implementation,) = (i for i in TABLE["damped_inverse", "cuda"] if i.name == "cuda")
    if implementation.missing is not None:
        pytest.skip(implementation.missing)


def _matrix(size: int, dtype: torch.dtype = torch.float32, decades: float = 2) -> Tensor:
    return covariance(size, dtype, decades).cuda()


def _run(
    matrices: Sequence[Tensor], damping: ops.Damping = 1e-3, out: list[Tensor] | None = None
) -> ops.DampedInverses:
    if out is None:
        out = [poisoned(*m.shape, dtype=m.dtype, device="cuda") for m in matrices]
    with kfac_fast.use("cuda"):
        return ops.damped_inverse(matrices, damping, logdet=True, out=out)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(size, torch.float32) for size in SIZES]
    + [(size, torch.float64) for size in SIZES if size <= LARGEST_IN_FLOAT64],
    ids=str,
)
def test_every_size(size: int, dtype: torch.dtype) -> None:
    matrices = [_matrix(size, dtype) for _ in range(4)]
    assert_as_accurate(_run(matrices), matrices, 1e-3)


@pytest.mark.parametrize("size", [64, 128, 1024])
@pytest.mark.parametrize("decades", [4, 6])
def test_ill_conditioned_matrices(size: int, decades: int) -> None:
    matrices = [_matrix(size, decades=decades) for _ in range(8)]
    assert_as_accurate(_run(matrices, 1e-7), matrices, 1e-7)


@dtypes
def test_mixed_sizes_stacks_strides_and_dampings(dtype: torch.dtype) -> None:
    layouts = []
    for size in (5, 70, 140, 515):
        stack = torch.stack([_matrix(size, dtype) for _ in range(6)]).view(2, 3, size, size)
        damping = torch.rand(2, 3, dtype=dtype, device="cuda")
        scalar = torch.tensor(0.1, dtype=dtype, device="cuda")
        layouts += [
            (stack, damping),
            (spread(stack), spread(damping)),
            (stack, damping.as_strided((2, 3), (1, 2))),
            (stack.transpose(0, 1), damping.T),
            (lower_only(stack), scalar),
            (stack[0, 0], damping[0, 0]),
            (stack[:0], damping[:0]),
        ]
    result = _run(*map(list, zip(*layouts, strict=True)))
    assert not result.info.any()
    for (layout, damping), inverse in zip(layouts, result.matrices, strict=True):
        plain = layout.reshape(-1, *layout.shape[-2:])
        shifts = damping.expand(layout.shape[:-2]).reshape(-1)
        for i, out in enumerate(inverse.reshape(plain.shape)):
            alone = _run([plain[i].contiguous()], [shifts[i]])
            assert torch.equal(out, alone.matrices[0])


def test_one_tensor_holds_the_damping_of_every_matrix() -> None:
    stack = torch.stack([_matrix(20) for _ in range(6)])
    matrices = [stack.view(2, 3, 20, 20), _matrix(150), stack[:4]]
    joint = torch.rand(22, device="cuda")[::2]
    first, middle, last = joint.split([6, 1, 4])
    expected = _run(matrices, [first.reshape(2, 3), middle[0], last])
    result = _run(matrices, joint)
    for found, other in zip(result.matrices, expected.matrices, strict=True):
        assert torch.equal(bits(found), bits(other))


@pytest.mark.parametrize("size", [16, 100, 129, 600])
@pytest.mark.parametrize("value", [math.nan, math.inf, -5.0])
def test_a_failure_touches_only_its_own_matrix(size: int, value: float) -> None:
    good = [_matrix(n) for n in (7, 150, size, 700, size)]
    expected = _run(good)
    bad = [m.clone() for m in good]
    place = 2 * size // 3
    bad[2][place, place] = value
    result = _run(bad)
    assert result.info.tolist() == [0, 0, place + 1, 0, 0]
    assert result.matrices[2].isnan().all() and result.logdet[2].isnan()
    for i in (0, 1, 3, 4):
        assert torch.equal(bits(result.matrices[i]), bits(expected.matrices[i]))
        assert result.logdet[i] == expected.logdet[i]


def test_repeats_bit_for_bit() -> None:
    matrices = [_matrix(size) for size in (1500, 1030, 300, 128, 90, 64, 10) for _ in range(5)]
    first = _run(matrices)
    for _ in range(3):
        again = _run(matrices)
        assert torch.equal(bits(again.logdet), bits(first.logdet))
        for a, b in zip(again.matrices, first.matrices, strict=True):
            assert torch.equal(bits(a), bits(b))


def test_graph_capture_on_a_side_stream() -> None:
    # More rows of the table than one launch uploads.
    sizes = [n % 200 + 1 for n in range(7, 607, 7)]
    matrices = [_matrix(size) for size in sizes]
    damping = torch.tensor(1e-3, device="cuda")
    out = [poisoned(size, size, device="cuda") for size in sizes]
    _run(matrices, damping, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _run(matrices, damping, out)
    for matrix in matrices:
        matrix.mul_(2)
    damping.fill_(0.5)
    graph.replay()
    expected = _run(matrices, damping)
    assert torch.equal(captured.logdet, expected.logdet) and not captured.info.any()
    for a, b in zip(out, expected.matrices, strict=True):
        assert torch.equal(a, b)


def test_the_host_does_not_wait() -> None:
    matrices = [_matrix(size) for size in (40, 300)]
    damping = torch.tensor(1e-3, device="cuda")
    for each in (damping, 1e-3, [1e-3, 2e-3], [1e-3, damping]):
        with waits_refused():
            _run(matrices, each)


@pytest.mark.large
def test_more_elements_than_int32_counts() -> None:
    stack = torch.zeros(2**21 + 3, 32, 32, device="cuda")
    stack[-3:] = torch.stack([_matrix(32) for _ in range(3)])
    result = _run([stack], 1.0)
    alone = _run([stack[-4:].clone()], 1.0)
    assert torch.equal(bits(result.matrices[0][-4:]), bits(alone.matrices[0]))
    assert torch.equal(result.logdet[-4:], alone.logdet) and not result.info.any()
    result.matrices[0][:-3] -= torch.eye(32, device="cuda")  # of zeros with the damping 1
    assert not result.matrices[0][:-3].any() and not result.logdet[:-3].any()


def test_refused_lists_are_not_touched() -> None:
    matrix, out = _matrix(4), poisoned(4, 4, device="cuda")
    scalar, info = torch.tensor(0.1, device="cuda"), torch.zeros(1, dtype=torch.int32).cuda()
    native = torch.ops.kfac_fast_native.damped_inverse
    refused = [
        ([matrix[:3]], [scalar], [out], info),
        ([matrix], [scalar.cpu()], [out], info),
        ([matrix.cpu()], [scalar], [out], info),
        ([matrix], [scalar], [out.cpu()], info),
        ([matrix], [scalar], [out], info.cpu()),
        ([matrix], [scalar.double()], [out], info),
        ([matrix], [scalar], [out.mT], info),
        ([matrix], [scalar], [matrix], info),
    ]
    for arguments in refused:
        assert native(*arguments, None) is False
    assert out.isnan().all()
    with pytest.raises(ValueError, match=r"^damped_inverse: damping\[0\] must be on cuda:0"):
        torch.ops.kfac_fast.damped_inverse([matrix], [scalar.cpu()], [out], info, None)
