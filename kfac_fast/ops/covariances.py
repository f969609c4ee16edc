"""Running averages of covariances, and their average eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kfac_fast import schema
from kfac_fast.backends import call, public, quick
from kfac_fast.list_checks import check_tensors, number_of_matrices
from kfac_fast.ops.matrices import all_detached, first_of


@public
def update_averages(
    sums: Sequence[Tensor],
    terms: Sequence[float],
    decay: float,
    *,
    out: Sequence[Tensor],
    weights: Sequence[Tensor],
    skipped: Sequence[Tensor],
    covariances: bool = True,
) -> list[Tensor]:
    r"""Average one batch each into the running averages of all factors, unless it is not finite.

    .. math::

        w_i \leftarrow \rho w_i + (1 - \rho), \qquad
        M_i \leftarrow M_i + \frac{1 - \rho}{w_i} \left(\frac{C_i}{m_i} - M_i\right)

    where :math:`C_i / m_i` is finite, of covariances on the diagonal; elsewhere no bit changes and
    the batch is counted. From a weight of zero on, :math:`M_i` is the weighted mean of all batches,
    without the bias towards zero that averages have at their start.

    Equivalent to::

        for total, count, average, weight, skips in zip(sums, terms, out, weights, skipped):
            mean = total / count
            whole = mean.dim() == 1 or not covariances
            witness = mean if whole else mean.diagonal(dim1=-2, dim2=-1)
            if witness.isfinite().all():
                weight.lerp_(torch.ones_like(weight), 1 - decay)
                average.lerp_(mean, (1 - decay) / weight)
            else:
                skips += 1

    Args:
        sums: What a batch has added up, all float32 or all float64; none is empty.
        terms: Number of terms that each is divided by.
        decay: Weight :math:`\rho` of the past, in [0, 1).
        out: Running averages :math:`M`, contiguous, of the shapes of ``sums``.
        weights: Their weights :math:`w`, scalars of the same dtype, zero before the first batch.
        skipped: Numbers of batches that were left out, int64 scalars.
        covariances: Whether these are covariances ``[*, n, n]``, or diagonals ``[n]`` of such: then
            only their diagonals are looked at, where NaN or infinity in any of the rows that a
            covariance is made of shows.

    Returns:
        ``out``.

    Raises:
        ValueError: If a shape, a length, a device, ``decay`` or the memory of an output is refused.
        TypeError: If a dtype is refused.

    Source: Martens & Grosse (2015), section 5; Kingma & Ba (2015), section 3, for the correction.
    """
    # The kernels' views live as long as these lists hold the tensors.
    op, sums, out = "update_averages", list(sums), list(out)
    options = tuple(terms), decay, covariances, out, list(weights), list(skipped)
    if quick(op, (sums, *options)) is None:
        for number in options[0]:
            schema.check_types(op, terms=number)
        schema.check_types(op, decay=decay, covariances=covariances)
        written = {"out": out, "weights": options[4], "skipped": options[5]}
        check_tensors(op, {"sums": sums, **written})
        call(op, [x.contiguous() for x in all_detached(sums)], *options)
    return out


@public
def mean_eigenvalues(matrices: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    r"""Average eigenvalue of each of many covariances, by which factored damping is split.

    .. math:: \mu_i = \operatorname{tr} M_i / n_i

    Equivalent to::

        return torch.stack([matrix.trace() / len(matrix) for matrix in matrices])  # no stacks

    Args:
        matrices: Square matrices ``[*, n, n]`` of any mix of sizes and strides, all float32 or all
            float64; one that is diagonal may be given by its diagonal ``[n]``.
        out: Contiguous result.

    Returns:
        One entry for each matrix, those of a stack in its order.

    Raises:
        ValueError: If a shape, a device or the memory of ``out`` is refused.
        TypeError: If a dtype is refused.

    Source: Martens & Grosse (2015), section 6.3.
    """
    matrices = list(matrices)  # the kernels' views live as long as this list holds the tensors
    if out is None:
        total = number_of_matrices(matrices)
        out = first_of(matrices).new_empty(total)
    if quick("mean_eigenvalues", (matrices, out)) is None:
        check_tensors("mean_eigenvalues", {"matrices": matrices})
        call("mean_eigenvalues", all_detached(matrices), out)
    return out
