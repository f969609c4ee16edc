"""The pure-PyTorch version of every operator: oracle, last resort, baseline of the benchmarks.

Each function takes the dispatcher arguments of its row in :mod:`kfac_fast.schema`, already checked,
and writes its outputs. Sums are taken in the result's dtype, float32 or float64.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fast.conv import ConvGeometry
from kfac_fast.host_copy import known_true
from kfac_fast.list_checks import of_each

LARGEST_BATCHED = 128
"""Matrices of up to this size are stacked into batched calls."""

LARGEST_DECOMPOSED = 256
"""The same of eigendecompositions."""


def diagonal_of(covariance: Tensor) -> Tensor:
    """The diagonals ``[*, n]`` of matrices ``[*, n, n]``, or of one given by its diagonal."""
    return covariance if covariance.dim() == 1 else covariance.diagonal(dim1=-2, dim2=-1)


# Gram matrices of rows


def _accumulate_symmetric(out: Tensor, product: Tensor, alpha: float, beta: float) -> None:
    """``out <- beta out + alpha product``: reads lower triangles only, writes a mirrored result."""
    product = product.reshape(out.shape)
    if alpha != 1:
        product = float(alpha) * product
    torch.tril(product if beta == 0 else torch.add(product, out, alpha=float(beta)), out=out)
    out += out.tril(-1).mT


def _outer_sum(rows: Tensor) -> Tensor:
    """``sum_n r[n] r[n]^T`` for rows ``[R, groups, d]``: ``[groups, d, d]``."""
    if rows.shape[1] == 1:
        matrix = rows[:, 0]
        return matrix.mT @ matrix
    by_group = rows.transpose(0, 1)
    return by_group.mT @ by_group


def _rows(x: Tensor, mask: Tensor | None, groups: int, bias: bool, dtype: torch.dtype) -> Tensor:
    """Rows ``[*, groups, D / groups (+ 1)]`` in ``dtype``, a bias 1 appended, masked ones zero."""
    rows = x.to(dtype).reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    if bias:
        rows = F.pad(rows, (0, 1), value=1.0)
    return rows if mask is None else torch.where(mask[..., None, None], rows, 0)


def gram(
    x: Tensor, mask: Tensor | None, groups: int, bias: bool, alpha: float, beta: float, out: Tensor
) -> None:
    """``out <- beta out + alpha sum x~ x~^T``; see :func:`kfac_fast.ops.gram`."""
    rows = _rows(x, mask, groups, bias, out.dtype)
    rows = rows.reshape(math.prod(x.shape[:-1]), *rows.shape[-2:])
    _accumulate_symmetric(out, _outer_sum(rows), alpha, beta)


def shared_gram(
    x: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    reduction: str,
    groups: int,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
) -> None:
    """Gram of the rows' sums or means; see :func:`kfac_fast.ops.shared_gram`."""
    rows = x.to(out.dtype).reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
    counted = rows.new_ones(rows.shape[:2])
    if mask is not None:
        counted = mask.to(out.dtype).reshape(rows.shape[:2])
        rows = torch.where(counted[..., None] > 0, rows, 0)
    if segments is None:
        total = rows.sum(1)
        count = counted.sum(1)
    else:
        total = rows.new_zeros(num_segments, 1, x.shape[-1]).index_add_(0, segments, rows)
        count = rows.new_zeros(num_segments).index_add_(0, segments, counted[:, 0])
    total = total.reshape(len(count), groups, x.shape[-1] // groups)
    if bias:
        total = torch.cat([total, count[:, None, None].expand(-1, groups, 1)], -1)
    if reduction == "mean":
        total = total / count.clamp(min=1)[:, None, None]
    _accumulate_symmetric(out, _outer_sum(total), alpha, beta)


# Normalisations


def _accumulate_blocks(
    products: Tensor, sums: Tensor, bias: bool, alpha: float, beta: float, out: Tensor
) -> None:
    """The Gram of each unit's gradients ``[N, units]`` of its scale and, with a bias, its shift."""
    gradients = torch.stack([products, sums] if bias else [products], -1)
    _accumulate_symmetric(out, _outer_sum(gradients), alpha, beta)


def feature_norm_gram(
    x: Tensor,
    gradient: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    eps: float,
    center: bool,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
) -> None:
    """Blocks of scales and shifts; see :func:`kfac_fast.ops.feature_norm_gram`."""
    x, g = (
        tensor.to(out.dtype).reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
        for tensor in (x, gradient)
    )
    normalize = F.layer_norm if center else F.rms_norm
    products = normalize(x, x.shape[-1:], eps=eps).mul_(g)
    if mask is not None:
        counts = mask.reshape(*g.shape[:2], 1)
        products, g = torch.where(counts, products, 0), torch.where(counts, g, 0)
    sums = [products.sum(1), g.sum(1)]
    if segments is not None:
        sums = [s.new_zeros(num_segments, s.shape[1]).index_add_(0, segments, s) for s in sums]
    _accumulate_blocks(sums[0], sums[1], bias, alpha, beta, out)


def channel_norm_gram(
    x: Tensor,
    gradient: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    num_groups: int,
    eps: float,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
) -> None:
    """Blocks of scales and shifts; see :func:`kfac_fast.ops.channel_norm_gram`."""
    x, g = (
        tensor.to(out.dtype).reshape(*x.shape[:2], math.prod(x.shape[2:]))
        for tensor in (x, gradient)
    )
    if num_groups == -1:
        if mean is None:
            mean = x.mean((0, 2))
            variance = (x - mean[:, None]).square().mean((0, 2))
        z = F.batch_norm(x, mean, variance, eps=eps)
    else:
        z = torch.group_norm(x, num_groups, eps=eps)  # also of a single entry
    _accumulate_blocks(z.mul_(g).sum(2), g.sum(2), bias, alpha, beta, out)


# Convolutions: x, the geometry's arguments, bias, alpha, beta, out


def _split(arguments: Sequence[Any]) -> tuple[ConvGeometry, bool, float, float, Tensor]:
    *geometry, bias, alpha, beta, out = arguments
    return ConvGeometry.from_arguments(*geometry), bias, alpha, beta, out


def _window_sums(x: Tensor, geometry: ConvGeometry, bias: bool, dtype: torch.dtype) -> Tensor:
    """Patches summed over the output positions, ``[N, groups, d (+ 1)]``; a bias counts them."""
    positions = tuple(range(2 + geometry.dimensions, 2 + 2 * geometry.dimensions))
    sums = geometry.windows(x.to(dtype)).sum(positions)
    sums = sums.reshape(len(x), geometry.groups, geometry.features(x.shape[1]))
    return F.pad(sums, (0, 1), value=math.prod(geometry.output_size(x.shape[2:]))) if bias else sums


def conv_expand_gram(x: Tensor, *arguments: Any) -> None:
    """Gram of every patch; see :func:`kfac_fast.ops.conv_expand_gram`."""
    geometry, bias, alpha, beta, out = _split(arguments)
    windows = geometry.windows(x.to(out.dtype))
    kernel = range(2, 2 + geometry.dimensions)
    positions = range(2 + geometry.dimensions, 2 + 2 * geometry.dimensions)
    features = geometry.features(x.shape[1])
    count = len(x) * math.prod(geometry.output_size(x.shape[2:]))
    # Features first: unfolding then copies whole rows of pixels, the fastest of the layouts on a
    # CPU.
    patches = windows.permute(1, *kernel, 0, *positions).reshape(geometry.groups, features, count)
    if bias:
        patches = torch.cat([patches, patches.new_ones(geometry.groups, 1, count)], 1)
    patches = patches[0] if geometry.groups == 1 else patches
    _accumulate_symmetric(out, patches @ patches.mT, alpha, beta)


def conv_reduce_gram(x: Tensor, *arguments: Any) -> None:
    """Gram of the patches averaged over positions; see :func:`kfac_fast.ops.conv_reduce_gram`."""
    geometry, bias, alpha, beta, out = _split(arguments)
    means = _window_sums(x, geometry, bias, out.dtype) / math.prod(
        geometry.output_size(x.shape[2:])
    )
    _accumulate_symmetric(out, _outer_sum(means), alpha, beta)


def conv_window_sum(x: Tensor, *arguments: Any) -> None:
    """Patches summed over positions; see :func:`kfac_fast.ops.conv_window_sum`."""
    geometry, bias, alpha, beta, out = _split(arguments)
    sums = alpha * _window_sums(x, geometry, bias, out.dtype).reshape(out.shape)
    out.copy_(sums if beta == 0 else torch.add(sums, out, alpha=float(beta)))


# Lists of matrices of mixed sizes


def _batches(
    sizes: Sequence[tuple[int, ...]], largest: int = LARGEST_BATCHED
) -> Iterator[list[int]]:
    """Indices to compute in one call: the small ones of a size; large ones gain nothing by it."""
    small = defaultdict(list)
    for index, size in enumerate(sizes):
        small[size if max(size, default=0) <= largest else index].append(index)
    yield from small.values()


def _damped_factors(
    matrices: Sequence[Tensor],
    damping: Sequence[Tensor],
    out: Sequence[Tensor],
    info: Tensor,
    logdet: Tensor | None,
    finish: Callable[[Tensor], Tensor],
) -> None:
    """Write ``finish`` of each Cholesky factor of ``M + damping I``, NaN where there is none."""
    damping = of_each(damping, matrices)
    counts = [math.prod(matrix.shape[:-2]) for matrix in matrices]
    infos = info.split(counts)
    logdets = logdet.split(counts) if logdet is not None else ()
    for indices in _batches([matrix.shape[-1:] for matrix in matrices]):
        size = matrices[indices[0]].shape[-1]
        damped = torch.cat([matrices[i].reshape(counts[i], size, size) for i in indices])
        shift = torch.cat([damping[i].expand(matrices[i].shape[:-2]).reshape(-1) for i in indices])
        damped.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
        factor, status = torch.linalg.cholesky_ex(damped)  # reads the lower triangle only
        # LAPACK takes an infinite pivot for a positive one, and some versions NaN, too.
        odd = ~factor.diagonal(dim1=-2, dim2=-1).isfinite()
        first = torch.where(odd.any(-1), odd.int().argmax(-1) + 1, 0).to(status.dtype)
        status = torch.where((first > 0) & ((status == 0) | (first < status)), first, status)
        failed = (status != 0)[:, None, None]
        # A failed factor may hold a zero pivot, which cholesky_inverse refuses for the whole batch.
        result = finish(factor.masked_fill(failed, 1)).masked_fill_(failed, math.nan)
        lengths = [counts[i] for i in indices]
        for i, part, state in zip(
            indices, result.split(lengths), status.split(lengths), strict=True
        ):
            out[i].copy_(part.reshape(out[i].shape))
            infos[i].copy_(state)
        if logdets:
            diagonal = factor.masked_fill(failed, math.nan).diagonal(dim1=-2, dim2=-1)
            values = 2 * diagonal.log().sum(-1)
            for i, part in zip(indices, values.split(lengths), strict=True):
                logdets[i].copy_(part)


def damped_inverse(
    matrices: Sequence[Tensor],
    damping: Sequence[Tensor],
    out: Sequence[Tensor],
    info: Tensor,
    logdet: Tensor | None,
) -> None:
    """Inverses of ``M + damping I`` by Cholesky; see :func:`kfac_fast.ops.damped_inverse`."""
    _damped_factors(matrices, damping, out, info, logdet, torch.cholesky_inverse)


def damped_cholesky(
    matrices: Sequence[Tensor],
    damping: Sequence[Tensor],
    out: Sequence[Tensor],
    info: Tensor,
    logdet: Tensor | None,
) -> None:
    """Cholesky factors of ``M + damping I``; see :func:`kfac_fast.ops.damped_cholesky`."""
    _damped_factors(matrices, damping, out, info, logdet, torch.clone)


def eigh(
    matrices: Sequence[Tensor], values: Sequence[Tensor], vectors: Sequence[Tensor], info: Tensor
) -> None:
    """Eigenvalues and eigenvectors of ``M``; see :func:`kfac_fast.ops.eigh`."""
    counts = [math.prod(matrix.shape[:-2]) for matrix in matrices]
    infos = info.split(counts)
    for indices in _batches([matrix.shape[-1:] for matrix in matrices], LARGEST_DECOMPOSED):
        stacks = [matrices[i].reshape(counts[i], *matrices[i].shape[-2:]) for i in indices]
        results = [part.split([counts[i] for i in indices]) for part in _eigh(torch.cat(stacks))]
        for i, own_values, own_vectors, failed in zip(indices, *results, strict=True):
            values[i].copy_(own_values.reshape(values[i].shape))
            vectors[i].copy_(own_vectors.reshape(vectors[i].shape))
            infos[i].copy_(failed)


def _eigh(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors of ``[count, n, n]``, and where there are none: NaN is there."""
    lower = stack.tril()
    failed = ~lower.isfinite().flatten(1).all(1)
    try:  # one that fails, fails for all
        values, vectors = torch.linalg.eigh(lower.masked_fill(failed[:, None, None], 0))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(stack) > 1:
            each = zip(*map(_eigh, stack.split(1)), strict=True)
            values, vectors, failed = (torch.cat(parts) for parts in each)
            return values, vectors, failed
        values, vectors, failed = lower[..., 0], lower, torch.ones_like(failed)
    failed = failed | ~values.isfinite().all(-1)  # too large
    values = values.masked_fill(failed[:, None], math.nan)
    return values, vectors.masked_fill(failed[:, None, None], math.nan), failed


# Covariances


def mean_eigenvalues(matrices: Sequence[Tensor], out: Tensor) -> None:
    """``tr M / n`` of each matrix; see :func:`kfac_fast.ops.mean_eigenvalues`."""
    torch.cat([diagonal_of(matrix).mean(-1).reshape(-1) for matrix in matrices], out=out)


def update_averages(
    sums: Sequence[Tensor],
    terms: Sequence[float],
    decay: float,
    covariances: bool,
    out: Sequence[Tensor],
    weights: Sequence[Tensor],
    skipped: Sequence[Tensor],
) -> None:
    """Finite means averaged in; see :func:`kfac_fast.ops.update_averages`."""
    if not out:
        return
    numbers = list(terms)
    witnesses = [diagonal_of(total) if covariances else total for total in sums]
    largest = torch._foreach_norm(witnesses, math.inf)
    finite = torch.stack(torch._foreach_div(largest, numbers)).isfinite()
    means = list(torch._foreach_div(list(sums), numbers))
    before = torch.stack(list(weights))
    after = decay * before + (1 - decay)
    rates = list(((1 - decay) / after).unbind())
    if known_true(finite):
        torch._foreach_lerp_(list(out), means, rates)
    else:
        moved = torch._foreach_lerp(list(out), means, rates)
        for flag, new, average in zip(finite.unbind(), moved, out, strict=True):
            torch.where(flag, new, average, out=average)
    torch._foreach_copy_(list(weights), list(torch.where(finite, after, before).unbind()))
    torch._foreach_add_(list(skipped), list((~finite).to(torch.int64).unbind()))


# Preconditioning


def _inner_product(
    grads: Sequence[Tensor], preconditioned: Sequence[Tensor], inner: Tensor
) -> None:
    inner.zero_()
    for grad, result in zip(grads, preconditioned, strict=True):
        inner += torch.dot(grad.flatten(), result.flatten())


def precondition(
    grads: Sequence[Tensor],
    input_sides: Sequence[Tensor],
    gradient_sides: Sequence[Tensor],
    out: Sequence[Tensor],
    inner: Tensor,
) -> None:
    """``G^-1 V A^-1`` from inverses; see :func:`kfac_fast.ops.precondition`."""
    for indices in _batches([grad.shape for grad in grads]):
        if len(indices) == 1:
            i = indices[0]
            torch.matmul(gradient_sides[i] @ grads[i], input_sides[i], out=out[i])
            continue
        lists = (gradient_sides, grads, input_sides)
        left, grad, right = (torch.stack([tensors[i] for i in indices]) for tensors in lists)
        for i, result in zip(indices, left @ grad @ right, strict=True):
            out[i].copy_(result)
    _inner_product(grads, out, inner)


def cholesky_precondition(
    grads: Sequence[Tensor],
    input_sides: Sequence[Tensor],
    gradient_sides: Sequence[Tensor],
    out: Sequence[Tensor],
    inner: Tensor,
) -> None:
    """``G^-1 V A^-1`` from Cholesky factors; see :func:`kfac_fast.ops.cholesky_precondition`."""
    for grad, right, left, result in zip(grads, input_sides, gradient_sides, out, strict=True):
        half = torch.cholesky_solve(grad, left)
        result.copy_(torch.cholesky_solve(half.mT, right).mT)
    _inner_product(grads, out, inner)
