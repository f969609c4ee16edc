"""The C++ kernels on lists of matrices: damped inverses by block sweeps, and preconditioning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pytest
import torch
from guard_page import before_a_guard_page
from inverses import assert_as_accurate, covariance
from oracle import assert_within_budget, bits, lower_only, poisoned, spread
from torch import Tensor

import kfac_fast
from kfac_fast import backends, ops

pytestmark = pytest.mark.usefixtures("one_thread", "instruction_set", "seed")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

# About the edges of vectors, panels and blocks of every instruction set, and of levels of blocks.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 47, 48, 49, 96, 127, 128, 129, 145, 200)
LARGE = (300, 641)


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


def run(matrices: Sequence[Tensor], damping: float = 1e-3) -> ops.DampedInverses:
    with kfac_fast.use("cpp"):
        return ops.damped_inverse(matrices, damping, logdet=True)


def check(matrices: Sequence[Tensor], damping: float = 1e-3) -> None:
    assert_as_accurate(run(matrices, damping), matrices, damping)


@dtypes
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size: int, dtype: torch.dtype) -> None:
    check([covariance(size, dtype) for _ in range(8)])


def test_blocks_wider_than_a_vector(instruction_set: str) -> None:
    for size in LARGE if instruction_set != "portable" else LARGE[:1]:
        check([covariance(size)])


@pytest.mark.parametrize("size", [16, 32, 64, 256])
@pytest.mark.parametrize("decades", [4, 6])
def test_ill_conditioned_matrices(size: int, decades: int) -> None:
    check([covariance(size, decades=decades) for _ in range(20)], damping=1e-7)


@dtypes
def test_stacks_and_strides(dtype: torch.dtype) -> None:
    stack = torch.stack([covariance(19, dtype) for _ in range(6)]).view(2, 3, 19, 19)
    layouts = [stack, spread(stack), stack.transpose(0, 1), stack.mT, stack[0, 0], stack[:0]]
    for layout, inverse in zip(layouts, run(layouts).matrices, strict=True):
        plain = layout.reshape(-1, 19, 19)
        assert inverse.shape == layout.shape
        assert torch.equal(
            inverse.reshape(-1, 19, 19),
            torch.stack([*run([plain]).matrices[0]]) if len(plain) else plain,
        )


def test_only_lower_triangles_are_read() -> None:
    matrices = [covariance(size) for size in (5, 33, 150)]
    inverses = run([lower_only(m) for m in matrices]).matrices
    for got, expected in zip(inverses, run(matrices).matrices, strict=True):
        assert torch.equal(got, expected)


def test_one_damping_of_each_matrix_of_a_stack() -> None:
    stack = torch.stack([covariance(9) for _ in range(4)])
    damping = torch.rand(4)
    result = ops.damped_inverse([stack, stack[0]], [damping, 0.5])
    for i in range(4):
        assert torch.equal(result.matrices[0][i], run([stack[i]], damping[i].item()).matrices[0])
    assert torch.equal(result.matrices[1], run([stack[0]], 0.5).matrices[0])


@pytest.mark.parametrize("size", [1, 16, 40, 129, 300])
@pytest.mark.parametrize("value", [math.nan, math.inf, -5.0])
def test_a_failure_touches_only_its_own_matrix(size: int, value: float) -> None:
    good = [covariance(n) for n in (7, size, 130)]
    expected = run(good)
    bad = [m.clone() for m in good]
    place = 2 * size // 3
    bad[1][place, place] = value
    result = run(bad)
    assert result.info.tolist() == [0, place + 1, 0]
    assert result.matrices[1].isnan().all() and result.logdet[1].isnan()
    for i in (0, 2):
        assert torch.equal(bits(result.matrices[i]), bits(expected.matrices[i]))


def test_a_bad_entry_off_the_diagonal_is_found() -> None:
    for value in (math.nan, math.inf):
        for row, column in ((39, 0), (20, 19), (39, 38)):
            matrix = covariance(40)
            matrix[row, column] = value
            assert run([matrix]).info.item() > 0


def test_same_bits_for_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    matrices = [covariance(size) for size in (600, 16, 16, 100, 33)]
    grads = [torch.randn(40, 600), torch.randn(16, 16), torch.randn(600, 500)]
    sides = [torch.randn(n, n) for n in (600, 16, 500)], [torch.randn(n, n) for n in (40, 16, 600)]
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        inverses = run(matrices)
        steps = ops.precondition(grads, *sides)
        results.append([*inverses.matrices, inverses.logdet, *steps.grads, steps.inner_product])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_past_the_ends_is_read_or_written() -> None:
    for size in (3, 16, 21, 100):
        tensors = (
            covariance(size),
            torch.zeros(size, size),
            torch.randn(size, 2 * size),
            torch.randn(2 * size, 2 * size),
            torch.zeros(size, 2 * size),
        )
        with ExitStack() as guarded:
            matrix, out, grad, right, step = (
                guarded.enter_context(before_a_guard_page(tensor)) for tensor in tensors
            )
            ops.damped_inverse([matrix], 1e-3, out=[out])
            assert torch.equal(out, run([matrix]).matrices[0])
            ops.precondition([grad], [right], [matrix], out=[step])
            assert torch.equal(step, ops.precondition([grad], [right], [matrix]).grads[0])


SHAPES = ((1, 1), (1, 9), (9, 1), (3, 5), (16, 16), (17, 47), (49, 33), (64, 100), (150, 20))


@dtypes
def test_precondition(dtype: torch.dtype) -> None:
    shapes = [*SHAPES, (2, 3, 5, 4), (0, 3, 3), (3, 0)]
    grads = [torch.randn(shape, dtype=dtype) for shape in shapes]
    # Not symmetric, so that a transposed one shows.
    rights = [torch.randn(*shape[:-2], shape[-1], shape[-1], dtype=dtype) for shape in shapes]
    lefts = [torch.randn(*shape[:-1], shape[-2], dtype=dtype) for shape in shapes]
    for layout in (lambda x: x, spread, lambda x: x.mT.contiguous().mT):
        arguments = [[layout(x) for x in tensors] for tensors in (grads, rights, lefts)]
        with kfac_fast.use("cpp"):
            result = ops.precondition(*arguments)
        with kfac_fast.use("reference"):
            theirs = ops.precondition(*arguments)
            exact = ops.precondition(*[[x.double() for x in tensors] for tensors in arguments])
        for out, torch_result, ref64 in zip(result.grads, theirs.grads, exact.grads, strict=True):
            if out.numel():
                assert_within_budget(out, torch_result, ref64)
        scale = sum((g.double() * p).abs().sum() for g, p in zip(grads, exact.grads, strict=True))
        assert (result.inner_product - exact.inner_product).abs() <= 1e-6 * scale


def test_deep_products() -> None:
    grad, right, left = torch.randn(40, 700), torch.randn(700, 700), torch.randn(40, 40)
    result = ops.precondition([grad], [right], [left]).grads[0]
    exact = left.double() @ grad.double() @ right.double()
    assert_within_budget(result, left @ grad @ right, exact)


def test_refused_lists_are_not_touched() -> None:
    matrix, out = covariance(4), poisoned(4, 4)
    info = torch.empty(1, dtype=torch.int32)
    native = torch.ops.kfac_fast_native
    scalar = [torch.tensor(0.1)]
    refused = [
        ([matrix[:3]], scalar, [out], info),
        ([matrix], scalar, [out[:3]], info),
        ([matrix], scalar, [out.mT[:, :4]], info),
        ([matrix], [torch.tensor([0.1])], [out], info),
        ([matrix], [torch.tensor(0.1).double()], [out], info),
        ([matrix], scalar * 2, [out], info),
        ([matrix.half()], scalar, [out], info),
        ([matrix], scalar, [matrix], info),
        ([matrix], scalar, [out], info.long()),
        ([matrix, matrix], scalar, [out, out], torch.empty(2, dtype=torch.int32)),
        ([matrix], scalar, [out], torch.empty(2, dtype=torch.int32)),
    ]
    for arguments in refused:
        assert native.damped_inverse(*arguments, None) is False
    inner = torch.zeros(())
    for sides in (([matrix[:3]], [matrix]), ([matrix], [matrix[None]]), ([matrix], [out])):
        assert native.precondition([matrix], *sides, [out], inner) is False
    assert native.precondition([matrix], [matrix], [matrix], [out], inner[None]) is False
    assert native.precondition([matrix], [matrix], [matrix], [out], matrix[0, 0]) is False
    memory = poisoned(16)
    shared = ([matrix], scalar, [memory.view(4, 4)], info, memory[:1])
    assert native.damped_inverse(*shared) is False
    assert out.isnan().all() and memory.isnan().all()
    with pytest.raises(ValueError, match="apart from all other memory"):
        torch.ops.kfac_fast.damped_inverse(*shared)


def test_an_output_that_requires_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="detached"):
        ops.damped_inverse([torch.eye(3)], 0.1, out=[torch.empty(3, 3, requires_grad=True)])


def test_the_kernels_serve_the_cpu() -> None:
    for op in ("damped_inverse", "precondition"):
        assert [i.name for i in backends.TABLE[op, "cpu"]] == ["cpp", "reference"]
