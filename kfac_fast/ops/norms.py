"""The factors of normalisations."""

from __future__ import annotations

from torch import Tensor

from kfac_fast import schema
from kfac_fast.backends import public, quick
from kfac_fast.ops.accumulation import accumulate


@public
def feature_norm_gram(
    x: Tensor,
    gradient: Tensor,
    *,
    eps: float = 1e-5,
    center: bool = True,
    bias: bool = True,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    num_segments: int | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Blocks of the scale and shift of each feature that ``nn.LayerNorm`` or ``nn.RMSNorm`` has.

    .. math::

        F_j \leftarrow \beta F_j + \alpha \sum_n v_{n,j} v_{n,j}^\top, \qquad
        v_{n,j} = \sum_s g_{n,s,j} (z_{n,s,j}, 1)

    with the normalised inputs :math:`z`, which are not stored.

    Equivalent to::

        z = F.layer_norm(x, x.shape[-1:], eps=eps)
        v = torch.stack([gradient * z, gradient], -1)
        v = v.reshape(len(x), -1, x.shape[-1], 2).sum(1)
        return torch.einsum("nji,njk->jik", v, v)

    Args:
        x: Input of the normalisation, ``[N, *shared, D]``, any strides; with ``segments``,
            ``[R, D]``.
        gradient: Gradient of the loss with respect to its output, of the same shape and dtype.
        eps: Added to the variance of each row, or to its mean square.
        center: Whether the mean of each row is taken away, as by ``nn.LayerNorm``.
        bias: Whether there are shifts.
        mask: Bool ``[N, *shared]`` (``[R]``); positions that are False do not count.
        segments: int64 ``[R]``, the example (graph) that each row (node or edge) belongs to, in any
            order.
        num_segments: Number of examples; required with ``segments``.
        alpha: Weight of the sum.
        beta: Weight of ``out``; with 0, ``out`` is not read; otherwise only its lower triangles
            are.
        out: Contiguous result to accumulate into.

    Returns:
        Symmetric ``[D, 1 (+ 1), 1 (+ 1)]``.

    Raises:
        ValueError: If a shape, an option, a device or the memory of ``out`` is refused, or on the
            CPU a segment that is none of ``num_segments``.
        TypeError: If a dtype is refused.

    Source: Osawa et al. (2020), whose unit-wise Fisher of batch normalisations this is.
    """
    op = "feature_norm_gram"
    count = -1 if num_segments is None else num_segments
    inputs = (x, gradient, mask, segments, count, eps, center, bias)
    result: Tensor | None = quick(op, (*inputs, alpha, beta, out))
    if result is not None:
        return result
    schema.check_types(op, x=x, gradient=gradient, eps=eps, center=center, bias=bias, mask=mask)
    schema.check_types(op, segments=segments, num_segments=num_segments)
    return accumulate(op, inputs, alpha, beta, out)


@public
def channel_norm_gram(
    x: Tensor,
    gradient: Tensor,
    *,
    eps: float = 1e-5,
    bias: bool = True,
    num_groups: int | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Blocks of the scale and shift of each channel of ``nn.BatchNorm2d``, ``nn.GroupNorm``, etc.

    .. math::

        F_c \leftarrow \beta F_c + \alpha \sum_n v_{n,c} v_{n,c}^\top, \qquad
        v_{n,c} = \sum_s g_{n,c,s} (z_{n,c,s}, 1)

    with the normalised inputs :math:`z`, which are not stored. They are taken as known: that an
    example of a batch moves the statistics of the others is left out.

    Equivalent to::

        z = F.batch_norm(x, None, None, training=True, eps=eps)
        v = torch.stack([gradient * z, gradient], -1)
        v = v.reshape(len(x), x.shape[1], -1, 2).sum(2)
        return torch.einsum("nci,nck->cik", v, v)

    Args:
        x: Input of the normalisation, ``[N, C, *spatial]``, any strides.
        gradient: Gradient of the loss with respect to its output, of the same shape and dtype.
        eps: Added to the variances.
        bias: Whether there are shifts.
        num_groups: Of channels that are normalised together in each example; None if each channel
            is over the whole batch.
        mean: Running means ``[C]`` that are taken instead of the batch's; not with groups.
        variance: Running variances ``[C]``; with ``mean``.
        alpha: Weight of the sum.
        beta: Weight of ``out``; with 0, ``out`` is not read; otherwise only its lower triangles
            are.
        out: Contiguous result to accumulate into.

    Returns:
        Symmetric ``[C, 1 (+ 1), 1 (+ 1)]``.

    Raises:
        ValueError: If a shape, an option, a device or the memory of ``out`` is refused.
        TypeError: If a dtype is refused.

    Source: Osawa et al. (2020), whose unit-wise Fisher of batch normalisations this is.
    """
    op = "channel_norm_gram"
    groups = -1 if num_groups is None else num_groups
    inputs = (x, gradient, mean, variance, groups, eps, bias)
    result: Tensor | None = None if num_groups == -1 else quick(op, (*inputs, alpha, beta, out))
    if result is not None:
        return result
    schema.check_types(op, x=x, gradient=gradient, eps=eps, bias=bias, num_groups=num_groups)
    schema.check_types(op, mean=mean, variance=variance)
    if num_groups is not None and num_groups < 1:
        raise ValueError(f"{op}: num_groups must be positive or None, got {num_groups}")
    return accumulate(op, inputs, alpha, beta, out)
