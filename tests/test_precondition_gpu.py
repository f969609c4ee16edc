"""The CUDA C++ preconditioning on a device, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from host import waits_refused
from oracle import assert_within_budget, bits, poisoned, positive_definite, spread
from steps import Lists, assert_steps_within_budget, layers
from torch import Tensor

import kfac_fast
from kfac_fast import backends, ops

pytestmark = pytest.mark.gpu
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SIZES = (1, 2, 9, 16, 31, 32, 33, 64, 65, 100, 128, 129, 200)


@pytest.fixture(autouse=True)
def kernel() -> None:
    torch.manual_seed(0)
    (implementation,) = (i for i in backends.TABLE["precondition", "cuda"] if i.name == "cuda")
    if implementation.missing is not None:
        pytest.skip(implementation.missing)


def _layers(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> list[list[Tensor]]:
    return [[x.cuda() for x in tensors] for tensors in layers(shapes, dtype)]


def _run(lists: Lists, out: list[Tensor] | None = None) -> ops.Preconditioned:
    """The kernel's result, also of layers that the table leaves to matmuls."""
    if out is None:
        out = [poisoned(*v.shape, dtype=v.dtype, device="cuda") for v in lists[0]]
    inner = poisoned(dtype=lists[0][0].dtype, device="cuda")
    assert torch.ops.kfac_fast_native.precondition(*lists, out, inner)
    return ops.Preconditioned(out, inner)


def _assert_same(first: ops.Preconditioned, second: ops.Preconditioned) -> None:
    for a, b in zip(first.grads, second.grads, strict=True):
        assert torch.equal(bits(a), bits(b))
    assert torch.equal(bits(first.inner_product), bits(second.inner_product))


@dtypes
@pytest.mark.parametrize("rows", SIZES)
def test_every_size(rows: int, dtype: torch.dtype) -> None:
    lists = _layers([(rows, columns) for columns in SIZES], dtype)
    assert_steps_within_budget(_run(lists), lists)


def test_sizes_for_every_tile() -> None:
    for shapes in ([(8, 8)], [(300, 300)], [(500, 520)] * 20, [(8192, 40)], [(40, 8192)]):
        lists = _layers(shapes)
        assert_steps_within_budget(_run(lists), lists)


@dtypes
def test_mixed_sizes_stacks_and_strides(dtype: torch.dtype) -> None:
    contiguous = _layers([(2, 3, 33, 70), (0, 5, 4), (3, 0), (140, 9), (2, 130, 200)], dtype)
    expected = _run(contiguous)
    assert_steps_within_budget(expected, contiguous)
    for layout in (spread, lambda x: x.mT.contiguous().mT):
        lists = [[layout(x) for x in stacks] for stacks in contiguous]
        for step, reference in zip(_run(lists).grads, expected.grads, strict=True):
            assert torch.equal(bits(step), bits(reference))


@dtypes
def test_the_public_function_and_its_inner_product(dtype: torch.dtype) -> None:
    shapes = [(20, 130), (65, 33), (7, 7)] * 30
    lists = [
        [torch.randn(shape, dtype=dtype) for shape in shapes],
        [positive_definite(k, k).to(dtype) for _, k in shapes],
        [positive_definite(m, m).to(dtype) for m, _ in shapes],
    ]
    lists = [[x.cuda() for x in tensors] for tensors in lists]
    with kfac_fast.use("cuda"):
        result = ops.precondition(*lists)
    with kfac_fast.use("reference"):
        theirs = ops.precondition(*lists).inner_product
        exact = ops.precondition(*([x.double() for x in each] for each in lists)).inner_product
    assert_within_budget(result.inner_product, theirs, exact)
    _assert_same(_run(lists), result)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("argument", range(3))
def test_bad_entries_touch_only_their_own_layer(argument: int, value: float) -> None:
    good = _layers([(9, 33), (400, 70), (33, 9)])
    expected = _run(good)
    bad = [[x.clone() for x in tensors] for tensors in good]
    bad[argument][1][-1, 3] = value
    result = _run(bad)
    assert not result.grads[1].isfinite().all() and not result.inner_product.isfinite()
    for i in (0, 2):
        assert torch.equal(bits(result.grads[i]), bits(expected.grads[i]))


def test_repeats_bit_for_bit() -> None:
    lists = _layers([(n, 2 * n) for n in (500, 300, 128, 90, 64, 10) for _ in range(5)])
    first = _run(lists)
    for _ in range(3):
        _assert_same(_run(lists), first)


def test_graph_capture_on_a_side_stream() -> None:
    # More rows of the table than one launch uploads.
    lists = _layers([(n % 97 + 1, n % 101 + 1) for n in range(7, 607, 7)])
    out = [poisoned(*v.shape, device="cuda") for v in lists[0]]
    _run(lists, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _run(lists, out)
    for grad in lists[0]:
        grad.mul_(2)
    graph.replay()
    _assert_same(captured, _run(lists))


def test_the_host_does_not_wait() -> None:
    lists = _layers([(40, 300), (5, 5)])
    with waits_refused():
        _run(lists)


@pytest.mark.large
def test_more_elements_than_int32_counts() -> None:
    grads = torch.zeros(2**21 + 3, 32, 32, device="cuda")
    grads[-3:] = torch.randn(3, 32, 32)
    sides = [torch.randn(32, 32, device="cuda") for _ in range(2)]
    result = _run([[grads], *([side.expand_as(grads)] for side in sides)])
    last = grads[-4:].clone()
    alone = _run([[last], *([side.expand_as(last)] for side in sides)])
    assert torch.equal(bits(result.grads[0][-4:]), bits(alone.grads[0]))
    assert not result.grads[0][:-3].any()
    products = last.double() * alone.grads[0]
    eps = torch.finfo(torch.float32).eps
    assert (result.inner_product - products.sum()).abs() <= 8 * eps * products.abs().sum()


def test_refused_lists_are_not_touched() -> None:
    (matrix,), _, _ = _layers([(4, 4)])
    out, inner = poisoned(4, 4, device="cuda"), poisoned(device="cuda")
    refused = [
        ([matrix[:3]], [matrix], [matrix], [out], inner),
        ([matrix], [matrix.cpu()], [matrix], [out], inner),
        ([matrix], [matrix], [matrix.double()], [out], inner),
        ([matrix], [matrix], [matrix], [out.cpu()], inner),
        ([matrix], [matrix], [matrix], [out.mT], inner),
        ([matrix], [matrix], [matrix], [matrix], inner),
        ([matrix], [matrix], [matrix], [out], inner.cpu()),
        ([matrix], [matrix], [matrix], [out], inner[None]),
    ]
    for arguments in refused:
        assert torch.ops.kfac_fast_native.precondition(*arguments) is False
    assert out.isnan().all() and inner.isnan()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_triton_kernel(precision: str) -> None:
    lists = _layers([(2, 3, 33, 70), (0, 5, 4), (64, 128), (140, 9), (700, 520)])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with kfac_fast.use("triton"):
            result = ops.precondition(*lists)
            repeated = ops.precondition(*lists)
        with waits_refused(), kfac_fast.use("triton"):
            ops.precondition(*lists)
        assert_steps_within_budget(result, lists)  # beside PyTorch's at the same precision
    finally:
        torch.set_float32_matmul_precision(before)
    _assert_same(result, repeated)


def test_the_triton_kernel_is_not_captured() -> None:
    lists = _layers([(8, 8)])
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with kfac_fast.use("triton"), pytest.raises(RuntimeError, match="captured graph"):
            ops.precondition(*lists)
