"""Gram matrices of rows."""

from __future__ import annotations

from torch import Tensor

from kfac_fast import schema
from kfac_fast.backends import public, quick
from kfac_fast.ops.accumulation import accumulate


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
    result: Tensor | None = quick("gram", (x, mask, groups, bias, alpha, beta, out))
    if result is not None:
        return result
    schema.check_types("gram", x=x, bias=bias, groups=groups, mask=mask)
    return accumulate("gram", (x, mask, groups, bias), alpha, beta, out)


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

        means = x.reshape(len(x), -1, x.shape[-1]).mean(1)
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
        ValueError: If a shape, an option, a device or the memory of ``out`` is refused, or on the
            CPU a segment that is none of ``num_segments``; a GPU's host does not wait to see it,
            and such rows do not count there.
        TypeError: If a dtype is refused.

    Source: Eschenhagen et al. (2023), section 3.3.
    """
    count = -1 if num_segments is None else num_segments
    inputs = (x, mask, segments, count, reduction, groups, bias)
    result: Tensor | None = quick("shared_gram", (*inputs, alpha, beta, out))
    if result is not None:
        return result
    schema.check_types("shared_gram", x=x, bias=bias, groups=groups, mask=mask, segments=segments)
    schema.check_types("shared_gram", num_segments=num_segments, reduction=reduction)
    return accumulate("shared_gram", inputs, alpha, beta, out)
