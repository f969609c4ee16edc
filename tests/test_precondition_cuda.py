"""The CUDA C++ preconditioning without a GPU: compiled by nvcc, and run on the CPU by emulation."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import chain

import pytest
import torch
from cuda_sources import (
    Launches,
    assert_compiles_without_spills,
    assert_every_barrier_is_needed,
    assert_loads_where_torch_has_no_cuda,
    emulation,
)
from guard_page import before_a_guard_page
from oracle import assert_within_budget, bits, poisoned, positive_definite, spread
from steps import Lists, assert_steps_within_budget, layers
from torch import Tensor

import kfac_fast
from kfac_fast import ops
from kfac_fast.backends import TABLE

# A forked process, which a barrier's test needs, cannot use the threads of its parent.
pytestmark = pytest.mark.usefixtures("one_thread")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# About the edges of tiles and of the steps of their sums.
SIZES = (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200)
TILES = {torch.float32: (32, 64, 128), torch.float64: (32, 64)}


class Layer(ctypes.Structure):
    """The struct of the same name in ``csrc/layer.h``."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        *(
            (f"{matrix}_{field}", kind)
            for matrix in ("grad", "left", "right")
            for field, kind in (
                ("data", ctypes.c_void_p),
                ("row_stride", ctypes.c_int64),
                ("column_stride", ctypes.c_int64),
            )
        ),
        ("out", ctypes.c_void_p),
    )


class Arguments(ctypes.Structure):
    """The struct of the same name in ``emulate_precondition.cpp``."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("count", ctypes.c_int64),
        ("multiprocessors", ctypes.c_int64),
        ("tile", ctypes.c_int64),
        ("descending", ctypes.c_int64),
        ("inner", ctypes.c_void_p),
    )


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    return emulation("precondition")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _matrices(stacks: Iterable[Tensor]) -> Iterable[Tensor]:
    """The matrices of stacked batches one by one, where they lie."""
    for stack in stacks:
        yield from [stack] if stack.dim() == 2 else _matrices(stack)


def _launch(
    library: ctypes.CDLL,
    lists: Lists,
    *,
    multiprocessors: int = 132,
    tile: int = 0,
    descending: bool = False,
    out: list[Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[ops.Preconditioned, Launches]:
    grads, rights, lefts = lists
    # What lies beyond a result shows if it is written.
    places = [poisoned(g.numel() + 64, dtype=dtype) for g in grads]
    if out is None:
        out = [place[: g.numel()].view(g.shape) for g, place in zip(grads, places, strict=True)]
    each = zip(*map(_matrices, (grads, lefts, rights, out)), strict=True)
    structs = [
        Layer(*v.shape, *chain(*((m.data_ptr(), *m.stride()) for m in (v, g, a))), p.data_ptr())
        for v, g, a, p in each
        if v.numel()
    ]
    inner = poisoned(3, dtype=dtype)
    arguments = Arguments(
        (Layer * len(structs))(*structs),
        len(structs),
        multiprocessors,
        tile,
        descending,
        inner[1:].data_ptr(),
    )
    launches = Launches()
    name = "float" if dtype == torch.float32 else "double"
    getattr(library, f"precondition_{name}")(ctypes.byref(arguments), ctypes.byref(launches))
    assert launches.bytes >= 0
    assert all(place[g.numel() :].isnan().all() for g, place in zip(grads, places, strict=True))
    assert inner[0].isnan() and inner[2].isnan()
    return ops.Preconditioned(out, inner[1]), launches


def _same(first: ops.Preconditioned, second: ops.Preconditioned) -> bool:
    pairs = zip(first.grads, second.grads, strict=True)
    return all(torch.equal(bits(a), bits(b)) for a, b in pairs)


def _run(
    library: ctypes.CDLL, lists: Lists, dtype: torch.dtype = torch.float32
) -> ops.Preconditioned:
    """The result, after checking that steps depend neither on tiles nor on the threads' order."""
    results = []
    for tile in (0, *TILES[dtype]):
        first, second = (
            _launch(library, lists, tile=tile, descending=descending, dtype=dtype)[0]
            for descending in (False, True)
        )
        assert _same(first, second)
        assert torch.equal(bits(first.inner_product), bits(second.inner_product))
        results.append(first)
    assert all(_same(results[0], other) for other in results)
    return results[0]


@dtypes
@pytest.mark.parametrize("rows", SIZES)
def test_every_size(emulated: ctypes.CDLL, rows: int, dtype: torch.dtype) -> None:
    # All together, each size meets some others on either side.
    lists = layers([(rows, columns) for columns in SIZES[SIZES.index(rows) % 6 :: 6]], dtype)
    for tile in TILES[dtype]:
        result = _launch(emulated, lists, tile=tile, dtype=dtype)[0]
        assert_steps_within_budget(result, lists)


@dtypes
def test_mixed_sizes_and_empty_layers(emulated: ctypes.CDLL, dtype: torch.dtype) -> None:
    lists = layers([(9, 200), (0, 3), (65, 130), (1, 1), (130, 64), (3, 0), (33, 40)], dtype)
    assert_steps_within_budget(_run(emulated, lists, dtype), lists)


@pytest.mark.parametrize("shape", [(40, 700), (300, 97)])
def test_deep_products(emulated: ctypes.CDLL, shape: tuple[int, int]) -> None:
    lists = layers([shape])
    assert_steps_within_budget(_launch(emulated, lists)[0], lists)


@dtypes
def test_stacks_and_strides(emulated: ctypes.CDLL, dtype: torch.dtype) -> None:
    contiguous = layers([(2, 3, 33, 70), (0, 5, 4), (3, 1, 9, 2)], dtype)
    expected = _run(emulated, contiguous, dtype)
    assert_steps_within_budget(expected, contiguous)
    for layout in (spread, lambda x: x.mT.contiguous().mT):
        lists = [[layout(x) for x in stacks] for stacks in contiguous]
        result = _run(emulated, lists, dtype)
        assert _same(result, expected)
    alone = [[stack[1, 2] for stack in stacks[:1]] for stacks in contiguous]
    assert torch.equal(_run(emulated, alone, dtype).grads[0], expected.grads[0][1, 2])


def test_sides_without_memory_of_their_own(emulated: ctypes.CDLL) -> None:
    (grad,), (right,), (left,) = layers([(6, 40, 33)])
    lists = [[grad], [right[:1].expand(6, -1, -1)], [left[0, :1].expand(6, 40, -1)]]
    assert_steps_within_budget(_run(emulated, lists), lists)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("argument", range(3))
def test_bad_entries_touch_only_their_own_layer(
    emulated: ctypes.CDLL, argument: int, value: float
) -> None:
    good = layers([(9, 33), (40, 70), (33, 9)])
    expected = _run(emulated, good)
    bad = [[x.clone() for x in tensors] for tensors in good]
    bad[argument][1][-1, 3] = value
    result = _run(emulated, bad)
    assert not result.grads[1].isfinite().all() and not result.inner_product.isfinite()
    for i in (0, 2):
        assert torch.equal(bits(result.grads[i]), bits(expected.grads[i]))


@dtypes
def test_inner_product_of_positive_sides(emulated: ctypes.CDLL, dtype: torch.dtype) -> None:
    shapes = [(20, 130), (65, 33), (7, 7)] * 30  # more tiles than a block has threads
    lists = [
        [torch.randn(shape, dtype=dtype) for shape in shapes],
        [positive_definite(k, k).to(dtype) for _, k in shapes],
        [positive_definite(m, m).to(dtype) for m, _ in shapes],
    ]
    with kfac_fast.use("reference"):
        theirs = ops.precondition(*lists).inner_product
        exact = ops.precondition(*([x.double() for x in each] for each in lists)).inner_product
    for tile in TILES[dtype]:
        result = _launch(emulated, lists, tile=tile, dtype=dtype)[0]
        assert_within_budget(result.inner_product, theirs, exact)


@dtypes
def test_nothing_past_the_ends_is_read_or_written(
    emulated: ctypes.CDLL, dtype: torch.dtype
) -> None:
    for shape in ((3, 21), (64, 32), (100, 130)):
        lists = layers([shape], dtype)
        expected = _run(emulated, lists, dtype)
        with ExitStack() as guarded:
            tensors = [*chain(*lists), poisoned(*shape, dtype=dtype)]
            *ends, out = (guarded.enter_context(before_a_guard_page(x)) for x in tensors)
            for tile in TILES[dtype]:
                ended = [[x] for x in ends]
                result, _ = _launch(emulated, ended, tile=tile, out=[out.fill_(0)], dtype=dtype)
                assert _same(result, expected)


def test_lists_of_nothing(emulated: ctypes.CDLL) -> None:
    for lists in ([[], [], []], layers([(0, 3), (2, 0), (0, 2, 2)])):
        result, launches = _launch(emulated, lists)
        assert launches.launches == 1 and result.inner_product == 0


def test_mixed_sizes_share_launches(emulated: ctypes.CDLL) -> None:
    upload, products, inner = 1, 2, 1

    def launches(*shapes: tuple[int, int], tile: int) -> tuple[int, int]:
        counts = _launch(emulated, layers(shapes), tile=tile)[1]
        return counts.launches, counts.thread_blocks

    count = upload + products + inner
    for tile in TILES[torch.float32]:
        assert launches((1, 1), tile=tile) == (count, upload + products * 1 + inner)
        tiles = 2 * 1 + 1 * 3 + 1
        shapes = (tile + 1, tile), (1, 2 * tile + 1), (3, 3)
        assert launches(*shapes, tile=tile) == (count, upload + products * tiles + inner)


def test_stacks_are_one_row_of_the_table(emulated: ctypes.CDLL) -> None:
    stack = layers([(7, 5, 4)])
    assert _launch(emulated, stack)[1].table_rows == 1
    assert _launch(emulated, layers([(7, 5, 4), (6, 4)]))[1].table_rows == 2
    # More rows than one launch uploads.
    shapes = [(n % 20 + 1, n % 23 + 1) for n in range(70)]
    many = layers(shapes)
    result, launches = _launch(emulated, many)
    assert launches.table_rows == len(shapes) and launches.launches > 1 + 2 + 1
    assert_steps_within_budget(result, many)


def test_layers_that_are_not_evenly_apart_are_another_row(emulated: ctypes.CDLL) -> None:
    for argument in range(4):
        *lists, out = ([*stack] for stack in (*chain(*layers([(4, 9, 17)])), poisoned(4, 9, 17)))
        moved = (*lists, out)[argument]
        moved[2:] = reversed(moved[2:])
        result, launches = _launch(emulated, lists, out=out)
        assert launches.table_rows == 2
        assert_steps_within_budget(result, lists)


def test_tiles_fill_the_device_before_they_grow(emulated: ctypes.CDLL) -> None:
    def tiles(shapes: list[tuple[int, int]], multiprocessors: int) -> int:
        counts = _launch(emulated, layers(shapes), multiprocessors=multiprocessors)[1]
        return (counts.thread_blocks - 2) // 2

    wide, one = (256, 256), 1
    assert tiles([wide], 132) == 8 * 8
    assert tiles([wide] * 2, 2 * 8) == 2 * 4 * 4
    assert tiles([wide] * 2, one) == 2 * 2 * 2
    # Tiles wider than the layers would multiply zeros.
    assert tiles([(20, 20)] * 9, one) == 9
    assert tiles([(65, 20)] * 9, one) == 9 * 3


def test_every_barrier_is_needed(emulated: ctypes.CDLL) -> None:
    lists = layers([(40, 50), (5, 33), (33, 70)])

    def run(descending: bool) -> Tensor:
        result = _launch(emulated, lists, tile=32, descending=descending)[0]
        return torch.cat([*(g.flatten() for g in result.grads), result.inner_product[None]])

    assert_every_barrier_is_needed(emulated, run, "precondition.cuh", "task_table.cuh")


def test_large_layers_and_tensor_cores_are_left_to_matmuls() -> None:
    (refuses,) = (i.refuses for i in TABLE["precondition", "cuda"] if i.name == "cuda")

    def reason(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str | None:
        return refuses([torch.empty(shape, dtype=dtype, device="meta") for shape in shapes])

    assert reason() is None
    assert reason((9, 9), (100_000, 64, 64), (645, 645), (1, 23169)) is None
    # Not matrices, which the check says better.
    assert reason((9,), (), (0, 3)) is None
    expected = "PyTorch's matmuls are expected to be faster for a gradient of "
    assert reason((9, 9), (2, 646, 646), (3, 3)) == expected + "(646, 646)"
    assert reason((1, 23171), dtype=torch.float64) == expected + "(1, 23171)"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert reason((9, 9)) == "at matmul precision 'high' PyTorch's matmuls use tensor cores"
        assert reason((9, 9), dtype=torch.float64) is None
    finally:
        torch.set_float32_matmul_precision(before)


def test_loads_where_torch_has_no_cuda() -> None:
    refuses_lists_on_the_cpu = """
matrix, out, inner = torch.eye(3), torch.zeros(3, 3), torch.ones(())
op = torch.ops.kfac_fast_native.precondition.default
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
assert op.redispatch(cuda, [matrix], [matrix], [matrix], [out], inner) is False
assert op.redispatch(cuda, [], [], [], [], inner) is False
assert not out.any() and inner == 1
"""
    assert_loads_where_torch_has_no_cuda("precondition", "precondition", refuses_lists_on_the_cpu)


def test_compiles_without_spills(record_property: Callable[[str, str], None]) -> None:
    tiles = sum(map(len, TILES.values()))
    upload_and_inner_product = 2 * 2
    kernels = tiles + upload_and_inner_product
    assert_compiles_without_spills("precondition", kernels, record_property)
