"""Gram matrices and sums of a convolution's patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kfac_fast import schema
from kfac_fast.backends import public, quick
from kfac_fast.ops.accumulation import accumulate


def _routed(op: str, x: Tensor, *arguments: Any) -> Tensor:
    """Run a call that the compiled kernel has not taken."""
    *geometry, bias, alpha, beta, out = arguments
    schema.check_types(op, x=x)
    inputs = schema.conv_arguments(op, x.dim(), bias, *geometry)
    return accumulate(op, (x, *inputs), alpha, beta, out)


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
    arguments = x, *conv, bias, alpha, beta, out
    result: Tensor | None = quick("conv_expand_gram", arguments)
    if result is not None:
        return result
    return _routed("conv_expand_gram", *arguments)


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
    arguments = x, *conv, bias, alpha, beta, out
    result: Tensor | None = quick("conv_reduce_gram", arguments)
    if result is not None:
        return result
    return _routed("conv_reduce_gram", *arguments)


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
    arguments = x, *conv, bias, alpha, beta, out
    result: Tensor | None = quick("conv_window_sum", arguments)
    if result is not None:
        return result
    return _routed("conv_window_sum", *arguments)
