"""The public operators: Gram matrices, damped inverses, preconditioning.

The Gram operators accumulate, ``out <- beta * out + alpha * (...)``, so a fresh factor, one summed
over micro-batches and a running average are the same call. No operator is differentiable: they
detach their inputs. Geometry arguments are ints or tuples as in :mod:`torch.nn.functional`,
features are ordered as in :func:`torch.nn.functional.unfold`, and the bias entry comes last.
Results of float64 inputs are float64; of float32, bfloat16 and float16 inputs float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_fast import schema
from kfac_fast.backends import call, public, quick


def _detached(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def _all_detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach() if x.requires_grad else x for x in tensors]


def _accumulate(
    op: str, inputs: tuple[Any, ...], alpha: float, beta: float, out: Tensor | None
) -> Tensor:
    """Run an accumulating operator, into a new tensor if ``out`` is None."""
    schema.check_types(op, alpha=alpha, beta=beta, out=out)
    if out is None:
        out = _new_result(op, schema.result_shape(op, *inputs), inputs[0], beta)
        if quick(op, *inputs, alpha, beta, out):
            return out
    x, *options = inputs
    call(op, _detached(x), *options, alpha, beta, out)
    return out


def _new_result(op: str, shape: schema.Shape, x: Tensor, beta: float) -> Tensor:
    if beta != 0:
        raise ValueError(f"{op}: beta must be 0 without out, got {beta}")
    return torch.empty(shape, dtype=schema.result_dtype(x.dtype), device=x.device)


@public
def gram(
    x: Tensor,
    *,
    bias: bool = False,
    groups: int = 1,
    mask: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Sum of the outer products of all rows: a linear layer's factor under expand.

    .. math::

        C \leftarrow \beta C + \alpha \sum_r \tilde x_r \tilde x_r^\top, \qquad
        \tilde x = (x, 1) \text{ with a bias}

    Equivalent to::

        rows = x.flatten(0, -2)
        return rows.T @ rows

    Args:
        x: Rows of shape ``[*, D]``, any strides.
        bias: Append 1 to every row; the last entry of the result counts the rows.
        groups: Split the features into this many groups, each with its own matrix.
        mask: Bool of shape ``[*]``; rows that are False do not count, not even for the bias.
        alpha: Weight of the sum.
        beta: Weight of ``out``; with 0, ``out`` is not read; otherwise only its lower triangle is.
        out: Contiguous result to accumulate into.

    Returns:
        Symmetric ``[D (+ 1), D (+ 1)]``, or ``[groups, D / groups (+ 1), D / groups (+ 1)]`` for
        several groups.

    Raises:
        ValueError: If a shape, a device or the memory of ``out`` is refused.
        TypeError: If a dtype is refused.

    Source: Martens & Grosse (2015), section 3; Eschenhagen et al. (2023), section 3.
    """
    if out is not None and quick("gram", x, mask, groups, bias, alpha, beta, out):
        return out
    schema.check_types("gram", x=x, bias=bias, groups=groups, mask=mask)
    return _accumulate("gram", (x, mask, groups, bias), alpha, beta, out)


@public
def shared_gram(
    x: Tensor,
    *,
    reduction: str = "mean",
    bias: bool = False,
    groups: int = 1,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    num_segments: int | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Gram of the rows' sums or means over shared positions: a linear layer's factor under reduce.

    .. math::

        C \leftarrow \beta C + \alpha \sum_n \bar x_n \bar x_n^\top, \qquad
        \bar x_n = \tfrac1S \sum_s \tilde x_{n,s}

    Equivalent to::

        means = x.flatten(1, -2).mean(1)
        return means.T @ means

    Args:
        x: ``[N, *shared, D]``; with ``segments``, ``[R, D]``.
        reduction: ``"mean"`` or ``"sum"`` over the positions that count.
        bias: Append 1 to every row before the reduction: it becomes 1 under ``"mean"``, the number
            of positions under ``"sum"``.
        groups: Split the features into this many groups, each with its own matrix.
        mask: Bool ``[N, *shared]`` (``[R]``); positions that are False do not count. An example
            without any adds nothing.
        segments: int64 ``[R]``, the example (graph) that each row (node or edge) belongs to, in any
            order.
        num_segments: Number of examples; required with ``segments``.
        alpha: Weight of the sum.
        beta: Weight of ``out``; with 0, ``out`` is not read; otherwise only its lower triangle is.
        out: Contiguous result to accumulate into.

    Returns:
        Symmetric ``[D (+ 1), D (+ 1)]``, or ``[groups, D / groups (+ 1), D / groups (+ 1)]`` for
        several groups.

    Raises:
        ValueError: If a shape, an option, a device or the memory of ``out`` is refused.
        TypeError: If a dtype is refused.
        RuntimeError: On the CPU, if a segment is none of ``num_segments``; a GPU's host does not
            wait to see it, and such rows do not count there.

    Source: Eschenhagen et al. (2023), section 3.3.
    """
    count = -1 if num_segments is None else num_segments
    inputs = (x, mask, segments, count, reduction, groups, bias)
    if out is not None and quick("shared_gram", *inputs, alpha, beta, out):
        return out
    schema.check_types("shared_gram", x=x, bias=bias, groups=groups, mask=mask, segments=segments)
    schema.check_types("shared_gram", num_segments=num_segments, reduction=reduction)
    return _accumulate("shared_gram", inputs, alpha, beta, out)


def _conv(
    op: str,
    x: Tensor,
    geometry: tuple[Any, ...],
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor | None,
) -> Tensor:
    """Run a convolution operator."""
    if out is not None and quick(op, x, *geometry, bias, alpha, beta, out):
        return out
    schema.check_types(op, x=x)
    arguments = schema.conv_arguments(op, x.dim(), bias, *geometry)
    return _accumulate(op, (x, *arguments), alpha, beta, out)


@public
def conv_expand_gram(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    padding_mode: str = "zeros",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Sum of the outer products of all patches: a convolution's input factor under expand.

    .. math:: C \leftarrow \beta C + \alpha \sum_{n,s} \tilde a_{n,s} \tilde a_{n,s}^\top

    where the patch :math:`a_{n,s}` holds the inputs that output position ``s`` reads.

    Equivalent to::

        patches = F.unfold(x, kernel_size, ...).mT.flatten(0, 1)
        return patches.T @ patches

    Args:
        x: Input of the convolution, ``[N, C, *spatial]`` with 1 to 3 spatial dimensions, any
            strides.
        kernel_size: Taps along each spatial dimension.
        stride: Step of the convolution.
        padding: Pixels on both sides, or before and after each dimension in turn; or ``"valid"`` or
            ``"same"`` (where uneven, the odd pixel comes after).
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        dilation: Distance between the taps.
        groups: Groups of channels; each has its own factor, never averaged over the groups.
        transposed: The geometry is that of a transposed convolution. Its patches are taken from the
            zero-stuffed input with the kernel flipped: row ``(c, k...)`` of group ``j`` belongs to
            ``weight.flip(spatial)[j * C / groups + c, :, k...]``.
        output_padding: Extra output positions at the end of a transposed convolution.
        bias: Append 1 to every patch; the last entry of the result counts the patches.
        alpha: Weight of the sum.
        beta: Weight of ``out``; with 0, ``out`` is not read; otherwise only its lower triangle is.
        out: Contiguous result to accumulate into.

    Returns:
        Symmetric ``[D, D]`` with ``D = C / groups * prod(kernel_size) (+ 1)``, or ``[groups, D,
        D]`` for several groups.

    Raises:
        ValueError: If a shape, an option, a device or the memory of ``out`` is refused.
        TypeError: If a dtype is refused.

    Source: Grosse & Martens (2016), section 3; Eschenhagen et al. (2023), section 3.2.
    """
    conv = kernel_size, stride, padding, padding_mode, dilation, groups, transposed, output_padding
    return _conv("conv_expand_gram", x, conv, bias, alpha, beta, out)


@public
def conv_reduce_gram(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    padding_mode: str = "zeros",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Gram of the patches' means over the positions: a convolution's input factor under reduce.

    .. math::

        C \leftarrow \beta C + \alpha \sum_n \bar a_n \bar a_n^\top, \qquad
        \bar a_n = \tfrac1S \sum_s \tilde a_{n,s}

    Equivalent to::

        means = F.unfold(x, kernel_size, ...).mean(-1)
        return means.T @ means

    Args:
        x: Input of the convolution, ``[N, C, *spatial]`` with 1 to 3 spatial dimensions, any
            strides.
        kernel_size: Taps along each spatial dimension.
        stride: Step of the convolution.
        padding: As in :func:`conv_expand_gram`.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        dilation: Distance between the taps.
        groups: Groups of channels, each reduced on its own.
        transposed: The geometry is that of a transposed convolution, as in
            :func:`conv_expand_gram`.
        output_padding: Extra output positions at the end of a transposed convolution.
        bias: Append 1 to every patch; the mean keeps it 1.
        alpha: Weight of the sum.
        beta: Weight of ``out``; with 0, ``out`` is not read; otherwise only its lower triangle is.
        out: Contiguous result to accumulate into.

    Returns:
        Symmetric ``[D, D]`` with ``D = C / groups * prod(kernel_size) (+ 1)``, or ``[groups, D,
        D]`` for several groups.

    Raises:
        ValueError: If a shape, an option, a device or the memory of ``out`` is refused.
        TypeError: If a dtype is refused.

    Source: Eschenhagen et al. (2023), section 3.3.
    """
    conv = kernel_size, stride, padding, padding_mode, dilation, groups, transposed, output_padding
    return _conv("conv_reduce_gram", x, conv, bias, alpha, beta, out)


@public
def conv_window_sum(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    padding_mode: str = "zeros",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Sum of every example's patches over the output positions.

    .. math:: C_n \leftarrow \beta C_n + \alpha \sum_s \tilde a_{n,s}

    Equivalent to::

        return F.unfold(x, kernel_size, ...).sum(-1)

    Args:
        x: Input of the convolution, ``[N, C, *spatial]`` with 1 to 3 spatial dimensions, any
            strides.
        kernel_size: Taps along each spatial dimension.
        stride: Step of the convolution.
        padding: As in :func:`conv_expand_gram`.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        dilation: Distance between the taps.
        groups: Groups of channels, each reduced on its own.
        transposed: The geometry is that of a transposed convolution, as in
            :func:`conv_expand_gram`.
        output_padding: Extra output positions at the end of a transposed convolution.
        bias: Append 1 to every patch; the sum makes it the number of output positions.
        alpha: Weight of the sum.
        beta: Weight of ``out``; with 0, ``out`` is not read.
        out: Contiguous result to accumulate into.

    Returns:
        ``[N, D]`` with ``D = C / groups * prod(kernel_size) (+ 1)``, or ``[N, groups, D]`` for
        several groups.

    Raises:
        ValueError: If a shape, an option, a device or the memory of ``out`` is refused.
        TypeError: If a dtype is refused.

    Source: Eschenhagen et al. (2023), section 3.3.
    """
    conv = kernel_size, stride, padding, padding_mode, dilation, groups, transposed, output_padding
    return _conv("conv_window_sum", x, conv, bias, alpha, beta, out)


class DampedInverses(NamedTuple):
    """Result of :func:`damped_inverse` and :func:`damped_cholesky`.

    Attributes:
        matrices: The inverses, or the lower Cholesky factors, one for each input; NaN where
            ``info`` is not zero.
        info: int32, one entry for each matrix in order: 0, or the order of the leading minor that
            is not positive.
        logdet: Log-determinant of each damped matrix (natural logarithm), NaN where ``info`` is not
            zero; None if not asked for.
    """

    matrices: list[Tensor]
    info: Tensor
    logdet: Tensor | None


Damping = float | Tensor | Sequence[float | Tensor]


def _damping_tensors(op: str, damping: Damping, matrices: Sequence[Tensor]) -> list[Tensor]:
    """One damping tensor for all or for each entry of ``matrices``; only numbers are checked."""
    many = isinstance(damping, Sequence) or (isinstance(damping, Tensor) and damping.dim() > 0)
    values: list[Any] = list(damping) if many else [damping]  # type: ignore[arg-type]
    if many and len(values) != len(matrices):
        raise ValueError(f"{op}: damping must be one value or {len(matrices)}, got {len(values)}")
    for value in values:
        if not isinstance(value, int | float | Tensor):
            raise TypeError(f"{op}: damping must be numbers or tensors, got {value!r}")
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"{op}: damping must not be negative, got {value}")
    like = matrices[0] if matrices else torch.empty(0)
    if any(isinstance(value, Tensor) for value in values):
        return [_alone(value, like) for value in values]
    if values and values.count(values[0]) == len(values):
        return [like.new_full((), values[0])]  # one for all is read faster than many
    return list(torch.tensor(values, dtype=like.dtype, device=like.device).unbind())


def _alone(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor of this device and dtype, apart from any graph."""
    if isinstance(value, Tensor) and not value.requires_grad:
        if (value.device, value.dtype) == (like.device, like.dtype):
            return value
    return torch.as_tensor(value).detach().to(like.device, like.dtype)


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
    like = matrices[0] if matrices else torch.empty(0)
    total = schema.number_of_matrices(matrices)
    info = torch.empty(total, dtype=torch.int32, device=like.device)
    logdets = torch.empty(total, dtype=like.dtype, device=like.device) if logdet else None
    others = _damping_tensors(op, damping, matrices), results, info, logdets
    if not quick(op, matrices, *others):
        call(op, _all_detached(matrices), *others)
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

    A matrix that is not positive definite after damping is reported in ``info`` and its result is
    NaN; the others are not touched by it. The host never waits for the device.

    Args:
        matrices: Matrices ``[n, n]`` or stacked batches ``[*, n, n]`` of any mix of sizes, all
            float32 or all float64; only lower triangles are read.
        damping: One number or scalar tensor for all, or a sequence with one for each entry of
            ``matrices``; an entry for a stacked batch may be a tensor of its batch shape.
        logdet: Also return the log-determinants of the damped matrices.
        out: Contiguous results, one like each entry of ``matrices``.

    Returns:
        The symmetric inverses, ``info`` and, if asked for, the log-determinants.

    Raises:
        ValueError: If a shape, a length, a device, a negative damping or the memory of ``out`` is
            refused.
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
        ValueError: If a shape, a length, a device, a negative damping or the memory of ``out`` is
            refused.
        TypeError: If a dtype is refused.

    Source: Martens & Grosse (2015), section 6.3.
    """
    return _damped("damped_cholesky", matrices, damping, logdet, out)


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
    like = grads[0] if grads else torch.empty(0)
    inner = torch.zeros((), dtype=like.dtype, device=like.device)
    if not quick(op, grads, input_sides, gradient_sides, results, inner):
        call(op, _all_detached(grads), input_sides, gradient_sides, results, inner)
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
        return [torch.cholesky_solve(h.mT, a).mT for h, a in zip(halves, input_factors)]

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
