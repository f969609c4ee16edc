"""The C++ kernels on lists of matrices: inverses and Cholesky factors, and preconditioning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from guard_page import before_a_guard_page
from inverses import assert_as_accurate, covariance, random_rows, uncentred
from oracle import assert_within_budget, bits, lower_only, poisoned, spread
from steps import Precondition, assert_steps_within_budget, exact_steps
from torch import Tensor

import kfac_fast
from kfac_fast import backends, ops, schema
from kfac_fast.backends import native

pytestmark = pytest.mark.usefixtures("one_thread", "instruction_set", "seed")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

# About the edges of vectors, panels and blocks of every instruction set, and of levels of blocks.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 47, 48, 49, 96, 127, 128, 129, 145, 200)
LARGE = (300, 641)


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


Damped = Callable[..., ops.DampedInverses]
DAMPED: tuple[Damped, ...] = (ops.damped_inverse, ops.damped_cholesky)
damped = pytest.mark.parametrize("op", DAMPED, ids=lambda op: op.__name__)


def run(op: Damped, matrices: Sequence[Tensor], damping: float = 1e-3) -> ops.DampedInverses:
    with kfac_fast.use("cpp"):
        return op(matrices, damping, logdet=True)


def check(op: Damped, matrices: Sequence[Tensor], damping: float = 1e-3) -> None:
    assert_as_accurate(run(op, matrices, damping), matrices, damping, op)


@damped
@dtypes
@pytest.mark.parametrize("size", SIZES)
def test_every_size(op: Damped, size: int, dtype: torch.dtype) -> None:
    check(op, [covariance(size, dtype) for _ in range(8)])


@damped
def test_blocks_wider_than_a_vector(op: Damped, instruction_set: str) -> None:
    for size in LARGE if instruction_set != "portable" else LARGE[:1]:
        check(op, [covariance(size)])


@damped
@dtypes
@pytest.mark.parametrize("matrix", [uncentred, random_rows], ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [16, 33, 64, 100, 128, 136, 200, 640])
def test_what_cancels_and_what_does_not(
    op: Damped, size: int, matrix: Callable[..., Tensor], dtype: torch.dtype, instruction_set: str
) -> None:
    """The first pivots subtract a mean that is nearly all of the matrix; others subtract little."""
    # Without multiply-adds each product of the mean's size is rounded, too; PyTorch has them.
    times = 3 if instruction_set == "portable" else 2
    if size == 640 and dtype == torch.float64:
        return  # extended precision would take seconds
    matrices = [matrix(size, dtype) for _ in range(4 if size < 640 else 2)]
    assert_as_accurate(run(op, matrices), matrices, 1e-3, op, times)


@damped
@pytest.mark.parametrize("value", [math.nan, math.inf, -5.0])
@pytest.mark.parametrize(("size", "place"), [(1, 0), (4, 1), (100, 24), (300, 200)])
def test_implementations_agree_on_what_fails(
    op: Damped, size: int, place: int, value: float
) -> None:
    matrices = [torch.eye(size) for _ in range(3)]
    matrices[1][place, place] = value
    for implementation in ("cpp", "reference"):
        with kfac_fast.use(implementation):
            result = op(matrices, 0.1, logdet=True)
        assert result.info.tolist() == [0, place + 1, 0]
        assert result.matrices[1].isnan().all()
        assert result.logdet.isnan().tolist() == [False, True, False]


@damped
@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_the_first_of_several_failures_is_told(op: Damped, implementation: str) -> None:
    for first, second in ((math.inf, -5.0), (-5.0, math.inf), (math.inf, math.nan)):
        matrix = torch.eye(50)
        matrix[20, 20], matrix[40, 40] = first, second
        with kfac_fast.use(implementation):
            assert op([matrix], 0.1).info.tolist() == [21]


@damped
def test_the_widest_blocks(op: Damped) -> None:
    n = 1545
    matrix = torch.eye(n, dtype=torch.float64) + 1 / n  # in closed form
    found = run(op, [matrix], 1.0).matrices[0]
    if op is ops.damped_inverse:
        assert torch.allclose(found, torch.eye(n, dtype=torch.float64) / 2 - 1 / (6 * n), 0, 1e-15)
    else:
        assert torch.allclose(found @ found.mT, matrix + torch.eye(n), 0, 1e-14)


@damped
@pytest.mark.parametrize("size", [16, 32, 49, 64, 256])
@pytest.mark.parametrize("decades", [4, 6])
def test_ill_conditioned_matrices(op: Damped, size: int, decades: int) -> None:
    check(op, [covariance(size, decades=decades) for _ in range(20)], damping=1e-7)


@damped
@dtypes
def test_stacks_and_strides(op: Damped, dtype: torch.dtype) -> None:
    stack = torch.stack([covariance(19, dtype) for _ in range(6)]).view(2, 3, 19, 19)
    layouts = [stack, spread(stack), stack.transpose(0, 1), stack.mT, stack[0, 0], stack[:0]]
    for layout, result in zip(layouts, run(op, layouts).matrices, strict=True):
        plain = layout.reshape(-1, 19, 19)
        assert result.shape == layout.shape
        assert torch.equal(
            result.reshape(-1, 19, 19),
            torch.stack([*run(op, [plain]).matrices[0]]) if len(plain) else plain,
        )


@damped
def test_the_kernel_counts_the_matrices(op: Damped) -> None:
    """It makes info where there is none, for as many as the stacks hold."""
    stack = torch.stack([covariance(9) for _ in range(6)]).view(2, 3, 9, 9)
    failing = covariance(20)
    failing[17, 3] = math.nan
    matrices, kernel = [stack, failing, stack[:0]], getattr(native, op.__name__)
    arguments = matrices, [torch.tensor(0.1)], [torch.empty_like(m) for m in matrices]
    expected = torch.full((7,), -1, dtype=torch.int32)
    assert kernel(*arguments, expected, None) is True
    info = kernel(*arguments, None, None)
    assert info.dtype == torch.int32 and info.is_contiguous() and torch.equal(info, expected)
    assert not info[:6].any() and info[6] > 0
    assert kernel([], *arguments[1:], None, None) is None
    out = [poisoned(*m.shape) for m in matrices]
    assert kernel(matrices, arguments[1], [*out[:2], poisoned(2, 9, 9)], None, None) is None
    assert all(x.isnan().all() for x in out)


@damped
def test_results_are_of_the_lower_triangles(op: Damped) -> None:
    matrices = [covariance(size) for size in (5, 33, 150)]
    results = run(op, [lower_only(m) for m in matrices]).matrices
    for got, expected in zip(results, run(op, matrices).matrices, strict=True):
        assert torch.equal(got, expected)


@damped
@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_one_tensor_holds_the_damping_of_every_matrix(op: Damped, implementation: str) -> None:
    matrices = [
        torch.stack([covariance(9) for _ in range(4)]),
        covariance(33),
        torch.stack([covariance(5) for _ in range(6)]).view(2, 3, 5, 5),
    ]
    joint = torch.rand(22)[::2]
    first, middle, last = joint.split([4, 1, 6])
    with kfac_fast.use(implementation):
        expected = op(matrices, [first, middle[0], last.reshape(2, 3)], logdet=True)
        result = op(matrices, joint, logdet=True)
        for found, other in zip(result.matrices, expected.matrices, strict=True):
            assert torch.equal(bits(found), bits(other))
        assert torch.equal(result.logdet, expected.logdet)
        with pytest.raises(
            ValueError, match=r"damping must be one value, 3 or a tensor of 11, got 10"
        ):
            op(matrices, joint[1:])


@damped
@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_numbers_are_those_of_entries_even_if_there_are_as_many_matrices(
    op: Damped, implementation: str
) -> None:
    stack, nothing = torch.stack([covariance(9) for _ in range(2)]), torch.empty(0, 3, 3)
    with kfac_fast.use(implementation):
        expected = op([stack], 0.2).matrices[0]
        for damping in (
            [0.1, 0.2],
            [torch.tensor(0.1), torch.tensor(0.2)],
            [0.1, torch.tensor(0.2)],
        ):
            assert torch.equal(op([nothing, stack], damping).matrices[1], expected)
        of_matrices = op([nothing, stack], torch.tensor([0.1, 0.2])).matrices[1]
        assert torch.equal(of_matrices[1], expected[1])
        assert torch.equal(of_matrices[0], op([stack[0]], 0.1).matrices[0])


@damped
@pytest.mark.parametrize(
    "damping",
    [
        [0.1, 0.1],
        torch.tensor([0.1, 0.1]),
        [torch.tensor(0.1), 0.1],
        torch.tensor([0.1, 0.1]).double(),
    ],
    ids=["numbers", "entries", "both", "wider"],
)
def test_equal_dampings_are_one(op: Damped, damping: Any) -> None:
    matrices = [covariance(5), covariance(40)]
    for found, expected in zip(
        op(matrices, damping).matrices, op(matrices, 0.1).matrices, strict=True
    ):
        assert torch.equal(bits(found), bits(expected))


@damped
def test_one_damping_of_each_matrix_of_a_stack(op: Damped) -> None:
    stack = torch.stack([covariance(9) for _ in range(4)])
    damping = torch.rand(4)
    result = op([stack, stack[0]], [damping, 0.5])
    for i in range(4):
        alone = run(op, [stack[i]], damping[i].item())
        assert torch.equal(result.matrices[0][i], alone.matrices[0])
    assert torch.equal(result.matrices[1], run(op, [stack[0]], 0.5).matrices[0])


@damped
@pytest.mark.parametrize(
    ("size", "place"), [(1, 0), (16, 10), (40, 26), (129, 86), (129, 128), (161, 160), (300, 200)]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -5.0])
def test_a_failure_touches_only_its_own_matrix(
    op: Damped, size: int, place: int, value: float
) -> None:
    good = [covariance(n) for n in (7, size, 130)]
    expected = run(op, good)
    bad = [m.clone() for m in good]
    bad[1][place, place] = value
    result = run(op, bad)
    assert result.info.tolist() == [0, place + 1, 0]
    assert result.matrices[1].isnan().all() and result.logdet[1].isnan()
    for i in (0, 2):
        assert torch.equal(bits(result.matrices[i]), bits(expected.matrices[i]))


@damped
def test_a_bad_entry_off_the_diagonal_is_found(op: Damped) -> None:
    for value in (math.nan, math.inf):
        for row, column in ((39, 0), (20, 19), (39, 38)):
            matrix = covariance(40)
            matrix[row, column] = value
            assert run(op, [matrix]).info.item() > 0


@damped
@dtypes
@pytest.mark.parametrize("size", [2, 3, 7, 8, 9, 16, 17, 31, 33, 64, 70])
def test_an_entry_unlike_its_mirror_image_is_refused(
    op: Damped, size: int, dtype: torch.dtype
) -> None:
    places = {(0, 1), (0, size - 1), (size // 2 - 1, size // 2), (size - 2, size - 1)}
    for row, column in places:
        for i, j in ((row, column), (column, row)):
            stack = torch.stack([covariance(size, dtype) for _ in range(3)])
            stack[1, i, j] += 0.1 * (stack[1, i, i] * stack[1, j, j]).sqrt()
            for layout in (stack, spread(stack), stack.mT, spread(stack.mT).mT):
                out = poisoned(*stack.shape, dtype=dtype)
                with pytest.raises(ValueError, match=r"^\w+: matrices\[1\] must be symmetric"):
                    op([covariance(5, dtype), layout], 1e-3, out=[poisoned(5, 5, dtype=dtype), out])
                assert out.isnan().all()


@dtypes
def test_what_the_kernel_refuses_the_check_in_python_refuses(dtype: torch.dtype) -> None:
    """At the bound itself, give or take some roundings."""
    eps = torch.finfo(dtype).eps
    info = torch.empty(1, dtype=torch.int32)
    verdicts = []
    for size in (2, 5):
        for steps in range(-4, 5):
            for _ in range(100):
                matrix, damping = (
                    torch.diag(torch.rand(size, dtype=dtype)),
                    torch.rand(()).to(dtype),
                )
                d = matrix.diagonal() + damping
                matrix[0, 1] = (d[0] * d[1] * eps).sqrt() * (1 + steps * eps)
                arguments = [matrix], [damping], [poisoned(size, size, dtype=dtype)]
                verdicts.append(native.damped_inverse(*arguments, info, None) is True)
                if not verdicts[-1]:
                    with pytest.raises(ValueError, match="symmetric"):
                        schema.check_values("damped_inverse", *arguments, info, None)
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.8


@damped
def test_products_of_matmul_are_symmetric_up_to_rounding(op: Damped) -> None:
    rows = 1 + torch.randn(20000, 90)
    product = rows.mT @ rows / len(rows)
    product[0, 1] += 1e-5  # as sums in another order may be
    assert op([product], 1e-4).info.item() == 0


@damped
@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_a_matrix_that_is_not_finite_fails_alone_even_if_its_mirror_image_is(
    op: Damped, implementation: str
) -> None:
    for value in (math.nan, math.inf, -math.inf):
        matrices = [covariance(20) for _ in range(3)]
        matrices[1][19, 2] = value
        with kfac_fast.use(implementation):
            assert op(matrices, 1e-3).info.bool().tolist() == [False, True, False]


PRECONDITION: tuple[Precondition, ...] = (ops.precondition, ops.cholesky_precondition)
precondition = pytest.mark.parametrize("op", PRECONDITION, ids=lambda op: op.__name__)


def factors(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Lower Cholesky factors of well-conditioned matrices."""
    rows = torch.randn(shape, dtype=dtype)
    return torch.linalg.cholesky(rows @ rows.mT / max(shape[-1], 1) + torch.eye(shape[-1]))


def test_same_bits_for_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    matrices = [covariance(size) for size in (600, 16, 16, 100, 33)]
    grads = [torch.randn(40, 600), torch.randn(16, 16), torch.randn(600, 500)]
    sides = [factors(n, n) for n in (600, 16, 500)], [factors(n, n) for n in (40, 16, 600)]
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        found = [run(op, matrices) for op in DAMPED]
        steps = [op(grads, *sides) for op in PRECONDITION]
        results.append([x for result in (*found, *steps) for x in (*result[0], result[-1])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_past_the_ends_is_read_or_written() -> None:
    for size in (3, 16, 21, 100):
        tensors = (
            covariance(size),
            torch.zeros(size, size),
            torch.randn(size, 2 * size),
            factors(2 * size, 2 * size),
            torch.zeros(size, 2 * size),
        )
        with ExitStack() as guarded:
            matrix, out, grad, right, step = (
                guarded.enter_context(before_a_guard_page(tensor)) for tensor in tensors
            )
            for invert in DAMPED:
                invert([matrix], 1e-3, out=[out])
                assert torch.equal(out, run(invert, [matrix]).matrices[0])
            for apply in PRECONDITION:
                apply([grad], [right], [matrix], out=[step])
                assert torch.equal(step, apply([grad], [right], [matrix]).grads[0])


SHAPES = ((1, 1), (1, 9), (9, 1), (3, 5), (16, 16), (17, 47), (49, 33), (64, 100), (150, 20))


def sides_of(op: Precondition, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverses that are not symmetric, so that a transposed one shows; or factors."""
    if op is ops.precondition:
        return torch.randn(shape, dtype=dtype)
    return lower_only(factors(*shape, dtype=dtype))


@precondition
@dtypes
def test_precondition(op: Precondition, dtype: torch.dtype) -> None:
    shapes = [*SHAPES, (2, 3, 5, 4), (0, 3, 3), (3, 0)]
    grads = [torch.randn(shape, dtype=dtype) for shape in shapes]
    rights = [sides_of(op, *shape[:-2], shape[-1], shape[-1], dtype=dtype) for shape in shapes]
    lefts = [sides_of(op, *shape[:-1], shape[-2], dtype=dtype) for shape in shapes]
    for layout in (lambda x: x, spread, lambda x: x.mT.contiguous().mT):
        arguments = [[layout(x) for x in tensors] for tensors in (grads, rights, lefts)]
        with kfac_fast.use("cpp"):
            result = op(*arguments)
        assert_steps_within_budget(result, arguments, op)


@precondition
@pytest.mark.parametrize("shape", [(40, 700), (300, 97)])
def test_deep_products(op: Precondition, shape: tuple[int, int]) -> None:
    sides = [sides_of(op, n, n) for n in reversed(shape)]
    arguments = [[torch.randn(shape)], *([side] for side in sides)]
    with kfac_fast.use("reference"):
        theirs = op(*arguments).grads[0]
    assert_within_budget(op(*arguments).grads[0], theirs, *exact_steps(op, *arguments))


@pytest.mark.parametrize("decades", [4, 6])
def test_solves_with_ill_conditioned_factors(decades: int) -> None:
    sizes = (16, 40, 100, 200)
    rights, lefts = (
        [torch.linalg.cholesky(covariance(n, torch.float64, decades)).float() for n in sizes]
        for _ in range(2)
    )
    arguments = [torch.randn(n, n) for n in sizes], rights, lefts
    result = ops.cholesky_precondition(*arguments).grads
    with kfac_fast.use("reference"):
        theirs = ops.cholesky_precondition(*arguments).grads
    exact = exact_steps(ops.cholesky_precondition, *arguments)
    for out, torch_result, ref64 in zip(result, theirs, exact, strict=True):
        assert_within_budget(out, torch_result, ref64)


def test_a_bad_factor_touches_only_its_own_layer() -> None:
    grads = [torch.randn(20, 33) for _ in range(3)]
    rights, lefts = ([factors(n, n) for _ in grads] for n in (33, 20))
    expected = ops.cholesky_precondition(grads, rights, lefts).grads
    rights[1] = torch.full_like(rights[1], math.nan)
    result = ops.cholesky_precondition(grads, rights, lefts).grads
    assert result[1].isnan().all()
    for i in (0, 2):
        assert torch.equal(bits(result[i]), bits(expected[i]))


def test_refused_lists_are_not_touched() -> None:
    matrix, out = covariance(4), poisoned(4, 4)
    info = torch.empty(1, dtype=torch.int32)
    scalar = [torch.tensor(0.1)]
    refused = [
        ([matrix[:3]], scalar, [out], info),
        ([matrix], scalar, [out[:3]], info),
        ([matrix], scalar, [out.mT[:, :4]], info),
        ([matrix], [torch.tensor([0.1, 0.1])], [out], info),
        ([matrix], [torch.tensor([[0.1]])], [out], info),
        ([matrix], [torch.tensor([0.1]).double()], [out], info),
        ([matrix], [out[0, :1]], [out], info),
        ([matrix], [torch.tensor(0.1).double()], [out], info),
        ([matrix], scalar * 2, [out], info),
        ([matrix.half()], scalar, [out], info),
        ([matrix], scalar, [matrix], info),
        ([matrix], scalar, [out], info.long()),
        ([matrix, matrix], scalar, [out, out], torch.empty(2, dtype=torch.int32)),
        ([matrix], scalar, [out], torch.empty(2, dtype=torch.int32)),
    ]
    for arguments in refused:
        assert native.damped_inverse(*arguments, None) is None
        assert native.damped_cholesky(*arguments, None) is None
    inner = torch.zeros(())
    for sides in (([matrix[:3]], [matrix]), ([matrix], [matrix[None]]), ([matrix], [out])):
        assert native.precondition([matrix], *sides, [out], inner) is None
        assert native.cholesky_precondition([matrix], *sides, [out], inner) is None
    assert native.precondition([matrix], [matrix], [matrix], [out], inner[None]) is None
    assert native.precondition([matrix], [matrix], [matrix], [out], matrix[0, 0]) is None
    memory = poisoned(16)
    shared = ([matrix], scalar, [memory.view(4, 4)], info, memory[:1])
    assert native.damped_inverse(*shared) is None
    assert out.isnan().all() and memory.isnan().all()
    with pytest.raises(ValueError, match="apart from all other memory"):
        torch.ops.kfac_fast.damped_inverse(*shared)


def test_an_output_that_requires_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="detached"):
        ops.damped_inverse([torch.eye(3)], 0.1, out=[torch.empty(3, 3, requires_grad=True)])


def test_the_kernels_serve_the_cpu() -> None:
    for op in ("damped_inverse", "damped_cholesky", "precondition", "cholesky_precondition"):
        interpreted = ["triton"] if op in ("damped_inverse", "precondition") else []
        names = [i.name for i in backends.TABLE[op, "cpu"]]
        assert names == ["cpp", "reference", *interpreted]
