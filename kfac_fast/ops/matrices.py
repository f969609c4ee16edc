"""Operators on lists of matrices: eigendecompositions, damped inverses, preconditioning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_fast.backends import call, public, quick
from kfac_fast.checks import refused
from kfac_fast.list_checks import check_tensors, number_of_matrices
from kfac_fast.ops.accumulation import detached


def all_detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors apart from any graph."""
    return [detached(x) for x in tensors]


def first_of(tensors: Sequence[Tensor]) -> Tensor:
    """The tensor that results are like: the first one, or without any an empty one."""
    return tensors[0] if tensors else torch.empty(0)


class DampedInverses(NamedTuple):
    """Result of :func:`damped_inverse` and :func:`damped_cholesky`.

    Attributes:
        matrices: The inverses, or the lower Cholesky factors, one for each input; NaN where
            ``info`` is not zero.
        info: int32, one entry for each matrix in order: 0, or the order of the first leading minor
            that is not positive or not finite.
        logdet: Log-determinant of each damped matrix (natural logarithm), NaN where ``info`` is not
            zero; None if not asked for.
    """

    matrices: list[Tensor]
    info: Tensor
    logdet: Tensor | None


Damping = float | Tensor | Sequence[float | Tensor]


def _damping_tensors(op: str, damping: Damping, matrices: Sequence[Tensor]) -> list[Tensor]:
    """A damping tensor for all, for each entry, or with all in it; only numbers are checked."""
    like = first_of(matrices)
    if isinstance(damping, Tensor) and damping.dim() == 1:  # else nothing need be counted
        if len(damping) == number_of_matrices(matrices):
            return [_alone(damping, like)]
    # A tensor's value may still be on its way on the device. If it is not positive, at most its own
    # matrix fails.
    many = isinstance(damping, Sequence) or (isinstance(damping, Tensor) and damping.dim() > 0)
    values: list[Any] = list(damping) if many else [damping]  # type: ignore[arg-type]
    if many and len(values) != len(matrices):
        raise ValueError(
            f"{op}: damping must be one value, {len(matrices)} or a tensor of "
            f"{number_of_matrices(matrices)}, got {len(values)}"
        )
    for value in values:
        if not isinstance(value, int | float | Tensor):
            raise TypeError(f"{op}: damping must be numbers or tensors, got {value!r}")
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise refused(op, "damping", "positive and finite", value)
    if any(isinstance(value, Tensor) for value in values):
        return [_alone(value, like) for value in values]
    if len(set(values)) == 1:
        return [like.new_full((), values[0])]  # one for all is read faster than many
    if like.device.type == "cpu":
        joint = torch.tensor(values, dtype=like.dtype)
        return list(joint.unbind()) if any(m.dim() > 2 for m in matrices) else [joint]
    made = {value: like.new_full((), value) for value in set(values)}  # a copy would be waited for
    return [made[value] for value in values]


def _alone(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor of this device and dtype, apart from any graph."""
    if not isinstance(value, Tensor):
        return like.new_full((), value)
    if (value.device, value.dtype) == (like.device, like.dtype):
        return detached(value)
    return value.detach().to(like.device, like.dtype)


def _contiguous_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def _damped(
    op: str,
    matrices: Sequence[Tensor],
    damping: Damping,
    logdet: bool,
    out: Sequence[Tensor] | None,
) -> DampedInverses:
    matrices = list(matrices)  # the kernels' views live as long as this list holds the tensors
    results = _contiguous_like(matrices) if out is None else list(out)
    dampings = _damping_tensors(op, damping, matrices)
    if not logdet:  # the kernel makes info: it knows how many matrices there are
        info = quick(op, (matrices, dampings, results, None, None))
        if info is not None:
            return DampedInverses(results, info, None)
    check_tensors(op, {"matrices": matrices, "out": results})
    like = first_of(matrices)
    total = number_of_matrices(matrices)
    info = torch.empty(total, dtype=torch.int32, device=like.device)
    logdets = torch.empty(total, dtype=like.dtype, device=like.device) if logdet else None
    others = dampings, results, info, logdets
    if not logdet or quick(op, (matrices, *others)) is None:
        call(op, all_detached(matrices), *others)
    return DampedInverses(results, info, logdets)


@public
def damped_inverse(
    matrices: Sequence[Tensor],
    damping: Damping,
    *,
    logdet: bool = False,
    out: Sequence[Tensor] | None = None,
) -> DampedInverses:
    r"""Inverses of many damped symmetric positive definite matrices of mixed sizes.

    .. math:: X_i = (M_i + \lambda_i I)^{-1}

    Equivalent to::

        return [torch.cholesky_inverse(torch.linalg.cholesky(m + damping * torch.eye(len(m)))) for m
        in matrices]

    A matrix that is not positive definite or not finite after damping is reported in ``info`` and
    its result is NaN; the others are not touched by it. The host never waits for the device.

    Args:
        matrices: Matrices ``[n, n]`` or stacked batches ``[*, n, n]`` of any mix of sizes, all
            float32 or all float64. Results are of the lower triangles. On a CPU the upper ones are
            checked: each entry must be as its mirror image, to within ``sqrt(eps * d_i * d_j)``
            of the dtype's ``eps`` and the damped diagonal ``d``, unless their difference is not
            finite. On a GPU the host would wait.
        damping: One positive number or scalar tensor for all, or a sequence with one for each entry
            of ``matrices``; an entry for a stacked batch may be a tensor of its batch shape. Or one
            tensor with an entry for each matrix, those of a stack in its order. The values of
            tensors, which may be 0, are not checked.
        logdet: Also return the log-determinants of the damped matrices.
        out: Contiguous results, one like each entry of ``matrices``.

    Returns:
        The symmetric inverses, ``info`` and, if asked for, the log-determinants.

    Raises:
        ValueError: If the list is empty, a matrix on the CPU is not symmetric up to rounding, or a
            shape, a length, a device, a number for the damping that is not positive and finite or
            the memory of ``out`` is refused.
        TypeError: If a dtype is refused.

    Source: Martens & Grosse (2015), section 6.3.
    """
    return _damped("damped_inverse", matrices, damping, logdet, out)


@public
def damped_cholesky(
    matrices: Sequence[Tensor],
    damping: Damping,
    *,
    logdet: bool = False,
    out: Sequence[Tensor] | None = None,
) -> DampedInverses:
    r"""Lower Cholesky factors of many damped symmetric positive definite matrices of mixed sizes.

    .. math:: L_i L_i^\top = M_i + \lambda_i I

    Equivalent to::

        return [torch.linalg.cholesky(m + damping * torch.eye(len(m))) for m in matrices]

    Args:
        matrices: As in :func:`damped_inverse`.
        damping: As in :func:`damped_inverse`.
        logdet: Also return the log-determinants of the damped matrices.
        out: Contiguous results, one like each entry of ``matrices``.

    Returns:
        The factors with zeros above the diagonal, ``info`` and, if asked for, the log-determinants.

    Raises:
        ValueError: If the list is empty, a matrix on the CPU is not symmetric up to rounding, or a
            shape, a length, a device, a number for the damping that is not positive and finite or
            the memory of ``out`` is refused.
        TypeError: If a dtype is refused.

    Source: Martens & Grosse (2015), section 6.3.
    """
    return _damped("damped_cholesky", matrices, damping, logdet, out)


class Eigendecompositions(NamedTuple):
    """Result of :func:`eigh`.

    Attributes:
        values: Eigenvalues of each input, ascending, ``[*, n]``; NaN where ``info`` is not zero.
        vectors: Eigenvectors, one a column, ``[*, n, n]``; NaN where ``info`` is not zero.
        info: int32, one entry for each matrix in order: 0, or 1 if the matrix or an eigenvalue is
            not finite or the iteration does not converge.
    """

    values: list[Tensor]
    vectors: list[Tensor]
    info: Tensor


@public
def eigh(
    matrices: Sequence[Tensor],
    *,
    out: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Eigendecompositions:
    r"""Eigendecompositions of many symmetric matrices of mixed sizes.

    .. math:: M_i = Q_i \operatorname{diag}(s_i) \, Q_i^\top

    Equivalent to::

        return [torch.linalg.eigh(m) for m in matrices]

    On a CPU as many are found at the same time as there are threads. A matrix that fails is
    reported in ``info`` and its results are NaN; the others are not touched by it. On a GPU,
    PyTorch's eigensolver makes the host wait.

    Args:
        matrices: Matrices ``[n, n]`` or stacked batches ``[*, n, n]`` of any mix of sizes, all
            float32 or all float64; only lower triangles are read.
        out: Contiguous results, one for each entry of ``matrices``: eigenvalues and eigenvectors.

    Returns:
        The eigenvalues, the eigenvectors and ``info``.

    Raises:
        ValueError: If the list is empty, or a shape, a length, a device or the memory of ``out`` is
            refused.
        TypeError: If a dtype is refused.

    Source: George et al. (2018), section 3, for what they are for.
    """
    matrices = list(matrices)  # the kernels' views live as long as this list holds the tensors
    check_tensors("eigh", {"matrices": matrices})
    if out is None:
        values = [m.new_empty(m.shape[:-1]) for m in matrices]
        vectors = _contiguous_like(matrices)
    else:
        values, vectors = map(list, out)
        check_tensors("eigh", {"values": values, "vectors": vectors})
    info = first_of(matrices).new_empty(number_of_matrices(matrices), dtype=torch.int32)
    if quick("eigh", (matrices, values, vectors, info)) is None:
        call("eigh", all_detached(matrices), values, vectors, info)
    return Eigendecompositions(values, vectors, info)


class Preconditioned(NamedTuple):
    """Result of :func:`precondition` and :func:`cholesky_precondition`.

    Attributes:
        grads: The preconditioned gradients, one for each input.
        inner_product: Scalar tensor, the sum over all layers of the gradient times its
            preconditioned self.
    """

    grads: list[Tensor]
    inner_product: Tensor


def _preconditioned(
    op: str,
    grads: Sequence[Tensor],
    input_sides: Sequence[Tensor],
    gradient_sides: Sequence[Tensor],
    out: Sequence[Tensor] | None,
) -> Preconditioned:
    # The kernels' views live as long as these lists hold the tensors.
    grads, input_sides, gradient_sides = list(grads), list(input_sides), list(gradient_sides)
    results = _contiguous_like(grads) if out is None else list(out)
    like = first_of(grads)
    inner = torch.zeros((), dtype=like.dtype, device=like.device)
    if quick(op, (grads, input_sides, gradient_sides, results, inner)) is None:
        sides = {"the input side": input_sides, "the gradient side": gradient_sides}
        check_tensors(op, {"grads": grads, **sides, "out": results})
        call(op, all_detached(grads), input_sides, gradient_sides, results, inner)
    return Preconditioned(results, inner)


@public
def precondition(
    grads: Sequence[Tensor],
    input_inverses: Sequence[Tensor],
    gradient_inverses: Sequence[Tensor],
    *,
    out: Sequence[Tensor] | None = None,
) -> Preconditioned:
    r"""Apply Kronecker-factored inverses to the gradients of all layers, in one call.

    .. math:: P_i = G_i^{-1} V_i A_i^{-1}, \qquad p = \sum_i \langle V_i, P_i \rangle

    Equivalent to::

        results = [g @ v @ a for v, a, g in zip(grads, input_inverses, gradient_inverses)]
        return results, sum((v * p).sum() for v, p in zip(grads, results))

    Args:
        grads: Gradients ``[*, out, in]`` of any mix of shapes, all float32 or all float64.
        input_inverses: Inverses ``[*, in, in]`` of the input covariances.
        gradient_inverses: Inverses ``[*, out, out]`` of the gradient covariances.
        out: Contiguous results, one like each gradient.

    Returns:
        The preconditioned gradients and the scalar ``p`` on their device.

    Raises:
        ValueError: If a shape, a length, a device or the memory of ``out`` is refused.
        TypeError: If a dtype is refused.

    Source: Martens & Grosse (2015), section 4.
    """
    return _preconditioned("precondition", grads, input_inverses, gradient_inverses, out)


@public
def cholesky_precondition(
    grads: Sequence[Tensor],
    input_factors: Sequence[Tensor],
    gradient_factors: Sequence[Tensor],
    *,
    out: Sequence[Tensor] | None = None,
) -> Preconditioned:
    r"""As :func:`precondition`, from Cholesky factors instead of inverses.

    .. math:: P_i = (L_G L_G^\top)^{-1} V_i (L_A L_A^\top)^{-1}

    Equivalent to::

        halves = [torch.cholesky_solve(v, g) for v, g in zip(grads, gradient_factors)]
        results = [torch.cholesky_solve(h.mT, a).mT for h, a in zip(halves, input_factors)]
        return results, sum((v * p).sum() for v, p in zip(grads, results))

    Args:
        grads: Gradients ``[*, out, in]`` of any mix of shapes, all float32 or all float64.
        input_factors: Lower Cholesky factors ``[*, in, in]`` of the input covariances.
        gradient_factors: Lower Cholesky factors ``[*, out, out]`` of the gradient covariances.
        out: Contiguous results, one like each gradient.

    Returns:
        The preconditioned gradients and the sum of their inner products with the gradients.

    Raises:
        ValueError: If a shape, a length, a device or the memory of ``out`` is refused.
        TypeError: If a dtype is refused.

    Source: Martens & Grosse (2015), section 4.
    """
    return _preconditioned("cholesky_precondition", grads, input_factors, gradient_factors, out)
