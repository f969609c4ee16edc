"""The CUDA C++ inverses without a GPU: compiled by nvcc, and run on the CPU by emulation."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from cuda_sources import (
    Launches,
    assert_compiles_without_spills,
    assert_every_barrier_is_needed,
    assert_loads_where_torch_has_no_cuda,
    emulation,
    integers,
)
from inverses import assert_as_accurate, covariance
from oracle import bits, lower_only, poisoned, spread
from torch import Tensor

from kfac_fast import ops
from kfac_fast.list_checks import number_of_matrices

# A forked process, which a barrier's test needs, cannot use the threads of its parent.
pytestmark = pytest.mark.usefixtures("one_thread")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# About the edges of the kernels for small matrices, of blocks and of tiles.
SIZES = (1, 2, 17, 32, 33, 64, 65, 96, 97, 100, 128, 129, 200, 300)
# Multiprocessors that large tiles could never fill, and that they always do.
TILES = {"small": 2**40, "large": 1}


class Stack(ctypes.Structure):
    """The struct of the same name in ``emulate_inverse.cpp``."""

    _fields_ = (
        ("matrices", ctypes.c_void_p),
        ("damping", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("batch_dims", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("damping_strides", ctypes.POINTER(ctypes.c_int64)),
    )


class Arguments(ctypes.Structure):
    """The struct of the same name in ``emulate_inverse.cpp``."""

    _fields_ = (
        ("stacks", ctypes.POINTER(Stack)),
        ("count", ctypes.c_int64),
        ("info", ctypes.c_void_p),
        ("logdet", ctypes.c_void_p),
        ("multiprocessors", ctypes.c_int64),
        ("descending", ctypes.c_int64),
    )


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    return emulation("inverse")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _launch(
    library: ctypes.CDLL,
    matrices: Sequence[Tensor],
    damping: float | Sequence[Tensor] = 1e-3,
    *,
    logdet: bool = True,
    tiles: str = "small",
    descending: bool = False,
) -> tuple[ops.DampedInverses, Launches]:
    dtype = matrices[0].dtype
    if isinstance(damping, float):
        damping = [torch.tensor(damping, dtype=dtype)] * len(matrices)
    # What lies beyond a result shows if it is written.
    places = [poisoned(m.numel() + 64, dtype=dtype) for m in matrices]
    stacks = [
        Stack(
            m.data_ptr(),
            shift.data_ptr(),
            place.data_ptr(),
            m.dim() - 2,
            integers(m.shape),
            integers(m.stride()),
            integers(shift.stride() or (0,) * (m.dim() - 2)),
        )
        for m, shift, place in zip(matrices, damping, places, strict=True)
    ]
    total = number_of_matrices(matrices)
    info = torch.full((total,), -1, dtype=torch.int32)
    logdets = poisoned(total, dtype=dtype) if logdet else None
    arguments = Arguments(
        (Stack * len(stacks))(*stacks),
        len(stacks),
        info.data_ptr(),
        None if logdets is None else logdets.data_ptr(),
        TILES[tiles],
        descending,
    )
    launches = Launches()
    function = library.inverse_float if dtype == torch.float32 else library.inverse_double
    function(ctypes.byref(arguments), ctypes.byref(launches))
    assert launches.bytes >= 0
    assert all(place[-64:].isnan().all() for place in places)
    pairs = zip(matrices, places, strict=True)
    inverses = [place[: m.numel()].view(m.shape) for m, place in pairs]
    return ops.DampedInverses(inverses, info, logdets), launches


def _same(first: ops.DampedInverses, second: ops.DampedInverses) -> bool:
    pairs = zip(first.matrices, second.matrices, strict=True)
    same = all(torch.equal(bits(a), bits(b)) for a, b in pairs)
    return same and torch.equal(first.info, second.info)


def _run(
    library: ctypes.CDLL,
    matrices: Sequence[Tensor],
    damping: float | Sequence[Tensor] = 1e-3,
    tiles: str = "small",
) -> ops.DampedInverses:
    """The result, after checking that it does not depend on the order of the threads."""
    results = [
        _launch(library, matrices, damping, tiles=tiles, descending=descending)[0]
        for descending in (False, True)
    ]
    assert _same(*results)
    assert torch.equal(bits(results[0].logdet), bits(results[1].logdet))
    return results[0]


@dtypes
@pytest.mark.parametrize("size", SIZES)
def test_every_size(emulated: ctypes.CDLL, size: int, dtype: torch.dtype) -> None:
    matrices = [covariance(size, dtype) for _ in range(4)]
    assert_as_accurate(_run(emulated, matrices), matrices, 1e-3)


@pytest.mark.parametrize("size", [129, 200, 300])
def test_large_tiles(emulated: ctypes.CDLL, size: int) -> None:
    matrices = [covariance(size) for _ in range(4)]
    result = _run(emulated, matrices, tiles="large")
    assert_as_accurate(result, matrices, 1e-3)
    assert _same(result, _run(emulated, matrices))


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("decades", [4, 6])
def test_ill_conditioned_matrices(emulated: ctypes.CDLL, size: int, decades: int) -> None:
    matrices = [covariance(size, decades=decades) for _ in range(8)]
    assert_as_accurate(_run(emulated, matrices, 1e-7), matrices, 1e-7)


@dtypes
def test_stacks_strides_and_dampings(emulated: ctypes.CDLL, dtype: torch.dtype) -> None:
    for size in (19, 129):
        stack = torch.stack([covariance(size, dtype) for _ in range(4)]).view(2, 2, size, size)
        damping = torch.rand(2, 2, dtype=dtype)
        scalar = torch.tensor(0.1, dtype=dtype)
        layouts = [
            (stack, damping),
            (spread(stack), spread(damping)),
            (stack, damping.T),
            (stack.transpose(0, 1), damping.T),
            (stack.mT, scalar),
            (stack[:, 1], damping[:, 0]),
            (stack[0, 0], damping[0, 0]),
            (stack[:0], damping[:0]),
        ]
        result = _run(emulated, *map(list, zip(*layouts, strict=True)))
        assert not result.info.any()
        logdets = iter(result.logdet)
        for (layout, shift), inverse in zip(layouts, result.matrices, strict=True):
            plain = layout.reshape(-1, size, size)
            shifts = shift.expand(layout.shape[:-2]).reshape(-1)
            for i, out in enumerate(inverse.reshape(-1, size, size)):
                alone = _launch(emulated, [plain[i].contiguous()], [shifts[i]])[0]
                assert torch.equal(out, alone.matrices[0])
                assert next(logdets) == alone.logdet


def test_only_lower_triangles_are_read(emulated: ctypes.CDLL) -> None:
    matrices = [covariance(size) for size in (5, 33, 70, 128, 150)]
    inverses = _run(emulated, [lower_only(m) for m in matrices]).matrices
    for got, expected in zip(inverses, _run(emulated, matrices).matrices, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [1, 16, 40, 80, 128, 129, 300])
def test_without_log_determinants(emulated: ctypes.CDLL, size: int) -> None:
    matrices = [torch.eye(size), torch.eye(3)]
    result, _ = _launch(emulated, matrices, 3.0, logdet=False)
    assert result.logdet is None and not result.info.any()
    assert torch.equal(result.matrices[0], torch.eye(size) / 4)
    assert torch.equal(_run(emulated, matrices, 0.0).logdet, torch.zeros(2))


@pytest.mark.parametrize("size", [1, 16, 40, 129, 300])
def test_a_failure_touches_only_its_own_matrix(emulated: ctypes.CDLL, size: int) -> None:
    good = [covariance(n) for n in (7, 150, size, 130, size)]
    expected = _run(emulated, good)
    place = 2 * size // 3
    for value in (math.nan, math.inf, -5.0):
        bad = [m.clone() for m in good]
        bad[2][place, place] = value
        result = _run(emulated, bad)
        assert result.info.tolist() == [0, 0, place + 1, 0, 0]
        assert result.matrices[2].isnan().all() and result.logdet[2].isnan()
        for i in (0, 1, 3, 4):
            assert torch.equal(bits(result.matrices[i]), bits(expected.matrices[i]))
            assert result.logdet[i] == expected.logdet[i]


@dtypes
def test_the_first_minor_that_is_not_positive(emulated: ctypes.CDLL, dtype: torch.dtype) -> None:
    for size in (30, 100, 200):
        for order in (1, size // 2, size):
            matrix = covariance(size, dtype)
            place = order - 1
            # The pivot is 1 over the last entry of the leading minor's inverse.
            pivot = 1 / torch.linalg.inv(matrix[:order, :order].double())[-1, -1]
            matrix[place, place] -= 2 * pivot
            if order < size:
                matrix[-1, -1] = -1
            assert _run(emulated, [matrix], 0.0).info.item() == order


def test_bad_entries_off_the_diagonal_are_found(emulated: ctypes.CDLL) -> None:
    for value in (math.nan, math.inf):
        for size, row, column in ((40, 39, 0), (40, 20, 19), (200, 199, 0), (200, 100, 50)):
            matrix = covariance(size)
            matrix[row, column] = value
            assert 0 < _run(emulated, [matrix]).info.item() <= row + 1


def test_mixed_sizes_share_launches(emulated: ctypes.CDLL) -> None:
    upload, load, finish = 1, 1, 1

    def launches(*sizes: int) -> tuple[int, int]:
        counts = _launch(emulated, [torch.eye(n) for n in sizes])[1]
        return counts.launches, counts.thread_blocks

    def large(*sizes: int) -> tuple[int, int]:
        """A matrix has thread blocks in its own phases only, which are those of the largest."""
        thread_blocks = 0
        for size in sizes:
            blocks = math.ceil(size / 64)
            tiles = blocks * (blocks + 1) // 2
            thread_blocks += 2 * tiles + blocks * (1 + blocks + tiles)
        return upload + load + 3 * math.ceil(max(sizes) / 64) + finish, upload + thread_blocks

    assert launches(3, 32, 9) == (upload + 1, upload + 3)
    assert launches(3, 100, 96, 33, 70) == (upload + 4, upload + 5)
    assert launches(300) == large(300)
    assert launches(130, 256) == large(130, 256)
    count, thread_blocks = large(130, 300)
    assert launches(130, 1, 300) == (count + 1, thread_blocks + 1)


def test_stacks_are_one_row_of_the_table(emulated: ctypes.CDLL) -> None:
    stack = torch.eye(5).expand(7, 5, 5).contiguous()
    assert _launch(emulated, [stack])[1].table_rows == 1
    assert _launch(emulated, [stack, torch.eye(6), stack[0]])[1].table_rows == 3
    # More rows than one launch uploads.
    matrices = [torch.eye(n % 60 + 1) for n in range(100)]
    result, launches = _launch(emulated, matrices, 3.0)
    assert launches.table_rows == 100 and not result.info.any()
    for matrix, inverse in zip(matrices, result.matrices, strict=True):
        assert torch.equal(inverse, matrix / 4)


def test_every_barrier_is_needed(emulated: ctypes.CDLL) -> None:
    matrices = [covariance(size) for size in (20, 30, 129, 140)]

    def run(descending: bool) -> Tensor:
        result = _launch(emulated, matrices, descending=descending)[0]
        return torch.cat([*(m.flatten() for m in result.matrices), result.logdet])

    assert_every_barrier_is_needed(emulated, run, "damped_inverse.cuh", "task_table.cuh")


def test_loads_where_torch_has_no_cuda() -> None:
    refuses_lists_on_the_cpu = """
matrix, out, info = torch.eye(3), torch.zeros(3, 3), torch.zeros(1, dtype=torch.int32)
op = torch.ops.kfac_fast_native.damped_inverse.default
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for logdet in (None, torch.zeros(1)):
    assert op.redispatch(cuda, [matrix], [torch.tensor(0.1)], [out], info, logdet) is False
assert not out.any()
"""
    assert_loads_where_torch_has_no_cuda(
        "damped_inverse", "damped_inverse", refuses_lists_on_the_cpu
    )


def test_compiles_without_spills(record_property: Callable[[str, str], None]) -> None:
    of_each_dtype, large_tiles = 10, 1
    kernels = 2 * of_each_dtype + large_tiles
    assert_compiles_without_spills("damped_inverse", kernels, record_property)
