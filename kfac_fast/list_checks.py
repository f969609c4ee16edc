"""The checks of operators on lists of tensors of mixed shapes; see :mod:`kfac_fast.schema`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_fast.checks import check_apart, check_device, check_out, refused, refused_dtype


def _check_entry(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != like.dtype:
        raise refused_dtype(op, argument, "float32 or float64 like the others", tensor.dtype)
    check_device(op, argument, tensor, like)


def _check_squares(op: str, argument: str, matrices: Sequence[Tensor], like: Tensor) -> None:
    for i, matrix in enumerate(matrices):
        if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise refused(op, f"{argument}[{i}]", "[*, n, n]", tuple(matrix.shape))
        _check_entry(op, f"{argument}[{i}]", matrix, like)


def _check_matrices(op: str, matrices: Sequence[Tensor]) -> Tensor:
    """Check the matrices that an operator works on; the first of them."""
    if not matrices:
        raise refused(op, "matrices", "at least one matrix", "an empty list")
    _check_squares(op, "matrices", matrices, matrices[0])
    for i, matrix in enumerate(matrices):
        if matrix.shape[-1] == 0:
            raise refused(op, f"matrices[{i}]", "of at least one row", tuple(matrix.shape))
    return matrices[0]


def _check_length(op: str, argument: str, values: Sequence[object], expected: int) -> None:
    if len(values) != expected:
        kind = "numbers" if argument == "terms" else "tensors"
        raise refused(op, argument, f"{expected} {kind}", len(values))


def check_averages(
    op: str,
    sums: Sequence[Tensor],
    terms: Sequence[float],
    decay: float,
    covariances: bool,
    out: Sequence[Tensor],
    weights: Sequence[Tensor],
    skipped: Sequence[Tensor],
) -> None:
    """Check the arguments of ``update_averages``."""
    lists = {"sums": sums, "terms": terms, "weights": weights, "skipped": skipped}
    for argument, values in lists.items():
        _check_length(op, argument, values, len(out))
    if not 0 <= decay < 1:
        raise refused(op, "decay", "in [0, 1)", decay)
    for i, (average, total) in enumerate(zip(out, sums, strict=True)):
        if covariances:
            _check_covariance(op, f"out[{i}]", average, out[0])
        _check_entry(op, f"out[{i}]", average, out[0])
        _check_entry(op, f"sums[{i}]", total, out[0])
        if total.shape != average.shape:
            raise refused(op, f"sums[{i}]", f"of shape {tuple(average.shape)}", tuple(total.shape))
        if total.numel() == 0:
            raise refused(op, f"sums[{i}]", "not empty", tuple(total.shape))
        if not total.is_contiguous():
            raise refused(op, f"sums[{i}]", "contiguous", f"strides {total.stride()}")
        check_out(op, f"out[{i}]", average, average.shape, average.dtype, [])
        check_out(op, f"weights[{i}]", weights[i], (), average.dtype, [average])
        check_out(op, f"skipped[{i}]", skipped[i], (), torch.int64, [average])
    check_apart(op, [*out, *weights, *skipped], sums)


def check_mean_eigenvalues(op: str, matrices: Sequence[Tensor], out: Tensor) -> None:
    """Check the arguments of ``mean_eigenvalues``."""
    if not matrices:
        raise refused(op, "matrices", "at least one matrix", "an empty list")
    for i, matrix in enumerate(matrices):
        _check_covariance(op, f"matrices[{i}]", matrix, matrices[0])
    check_out(op, "out", out, (number_of_matrices(matrices),), matrices[0].dtype, matrices)


def check_tensors(op: str, lists: Mapping[str, Sequence[object]]) -> None:
    """Check that lists hold tensors, which the dispatcher says less plainly.

    Args:
        op: Name of the operator.
        lists: Its lists by name.

    Raises:
        TypeError: If an entry is none.
    """
    for argument, entries in lists.items():
        for i, entry in enumerate(entries):
            if not isinstance(entry, Tensor):
                kind = type(entry).__name__
                raise TypeError(f"{op}: {argument}[{i}] must be a tensor, got {kind}")


def number_of_matrices(matrices: Sequence[Tensor]) -> int:
    """How many matrices a list of stacked batches ``[*, n, n]`` and of diagonals ``[n]`` holds."""
    if max([0, *map(Tensor.dim, matrices)]) <= 2:
        return len(matrices)
    return sum(math.prod(matrix.shape[:-2]) for matrix in matrices)


def of_each(damping: Sequence[Tensor], matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """One damping for each entry of ``matrices``; a single one may be that of all, or hold all."""
    if len(damping) != 1:
        return damping
    if damping[0].dim() != 1 or len(damping[0]) != number_of_matrices(matrices):
        return [damping[0]] * len(matrices)
    parts = damping[0].split([math.prod(matrix.shape[:-2]) for matrix in matrices])
    return [part.view(matrix.shape[:-2]) for part, matrix in zip(parts, matrices, strict=True)]


def _check_covariance(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    """Check a covariance ``[*, n, n]``, or one given by its diagonal ``[n]``."""
    square = tensor.dim() > 1 and tensor.shape[-2] == tensor.shape[-1]
    if not square and tensor.dim() != 1:
        raise refused(op, argument, "[*, n, n] or [n]", tuple(tensor.shape))
    if tensor.numel() == 0:
        raise refused(op, argument, "not empty", tuple(tensor.shape))
    _check_entry(op, argument, tensor, like)


def check_damped(
    op: str,
    matrices: Sequence[Tensor],
    damping: Sequence[Tensor],
    out: Sequence[Tensor],
    info: Tensor,
    logdet: Tensor | None,
) -> None:
    """Check the arguments of ``damped_inverse`` and ``damped_cholesky``."""
    if len(damping) != 1:
        _check_length(op, "damping", damping, len(matrices))
    _check_length(op, "out", out, len(matrices))
    like = _check_matrices(op, matrices)
    for i, (matrix, shift) in enumerate(zip(matrices, of_each(damping, matrices), strict=True)):
        batch = tuple(matrix.shape[:-2])
        if shift.dim() != 0 and tuple(shift.shape) != batch:
            raise refused(op, f"damping[{i}]", f"a scalar or of shape {batch}", tuple(shift.shape))
        if shift.dtype != matrix.dtype:
            raise refused_dtype(op, f"damping[{i}]", matrix.dtype, shift.dtype)
        check_device(op, f"damping[{i}]", shift, like)
        check_out(op, f"out[{i}]", out[i], matrix.shape, matrix.dtype, [])
        check_device(op, f"out[{i}]", out[i], like)
    vectors = [info] if logdet is None else [info, logdet]
    check_apart(op, [*out, *vectors], [*matrices, *damping])
    total = (number_of_matrices(matrices),)
    check_out(op, "info", info, total, torch.int32, [like])
    if logdet is not None:
        check_out(op, "logdet", logdet, total, like.dtype, [like])


def check_eigh(
    op: str,
    matrices: Sequence[Tensor],
    values: Sequence[Tensor],
    vectors: Sequence[Tensor],
    info: Tensor,
) -> None:
    """Check the arguments of ``eigh``."""
    results = {"values": values, "vectors": vectors}
    for argument, tensors in results.items():
        _check_length(op, argument, tensors, len(matrices))
    like = _check_matrices(op, matrices)
    for i, matrix in enumerate(matrices):
        for argument, shape in (("values", matrix.shape[:-1]), ("vectors", matrix.shape)):
            result = results[argument][i]
            check_out(op, f"{argument}[{i}]", result, shape, matrix.dtype, [])
            check_device(op, f"{argument}[{i}]", result, like)
    check_apart(op, [*values, *vectors, info], matrices)
    check_out(op, "info", info, (number_of_matrices(matrices),), torch.int32, [like])


def check_symmetric(
    op: str, matrices: Sequence[Tensor], damping: Sequence[Tensor], *_: object
) -> None:
    """Check symmetry up to rounding; differences that are not finite pass."""
    for i, (matrix, shift) in enumerate(zip(matrices, of_each(damping, matrices), strict=True)):
        if not matrix.is_cpu:
            return  # the host would wait for the device
        # Whatever the compiled kernel refuses must be refused here, where roots may be an ulp off.
        eps = torch.finfo(matrix.dtype).eps
        relative = eps**0.5 * (1 - 8 * eps)
        scale = ((matrix.diagonal(dim1=-2, dim2=-1) + shift[..., None]) * relative).sqrt()
        distance = (matrix - matrix.mT).abs()
        differ = (distance > scale[..., None] * scale[..., None, :]) & distance.isfinite()
        if differ.any():
            where = differ.nonzero()[0].tolist()
            got = f"an entry {distance[tuple(where)]:.3g} away from its mirror image at {where}"
            raise refused(op, f"matrices[{i}]", "symmetric up to rounding", got)


def check_precondition(
    op: str,
    grads: Sequence[Tensor],
    input_sides: Sequence[Tensor],
    gradient_sides: Sequence[Tensor],
    out: Sequence[Tensor],
    inner: Tensor,
) -> None:
    """Check the arguments of ``precondition`` and ``cholesky_precondition``."""
    sides = {"the input side": input_sides, "the gradient side": gradient_sides}
    for argument, values in {**sides, "out": out}.items():
        _check_length(op, argument, values, len(grads))
    if not grads:
        return
    like = grads[0]
    for i, grad in enumerate(grads):
        if grad.dim() < 2:
            raise refused(op, f"grads[{i}]", "[*, out, in]", f"{grad.dim()}-d")
        _check_entry(op, f"grads[{i}]", grad, like)
    for argument, values in sides.items():
        _check_squares(op, argument, values, like)
    for i, (grad, right, left) in enumerate(zip(grads, input_sides, gradient_sides, strict=True)):
        *batch, rows, columns = grad.shape
        for argument, side, size in (("input", right, columns), ("gradient", left, rows)):
            if tuple(side.shape) != (*batch, size, size):
                expected = f"of shape {(*batch, size, size)}"
                raise refused(op, f"the {argument} side[{i}]", expected, tuple(side.shape))
        check_out(op, f"out[{i}]", out[i], grad.shape, grad.dtype, [])
        check_device(op, f"out[{i}]", out[i], like)
    check_apart(op, [*out, inner], [*grads, *input_sides, *gradient_sides])
    check_out(op, "inner", inner, (), like.dtype, [like])
