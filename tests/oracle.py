"""What the tests compare with: slow and obvious definitions, and the bound on a result's error."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """An output full of NaN: whatever is left unwritten shows."""
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def whole_numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Small whole numbers: sums of their products are exact in any order."""
    return torch.randint(-4, 5, shape).to(dtype)


def spread(x: Tensor) -> Tensor:
    """The same values with gaps between them in memory and the dimensions in reverse order."""
    buffer = x.new_full((*reversed(x.shape), 2), math.nan if x.is_floating_point() else 1)
    view = buffer[..., 1].permute(tuple(reversed(range(x.dim()))))
    return view.copy_(x)


def bits(x: Tensor) -> Tensor:
    """The bit pattern, so that NaN and the sign of zero compare."""
    return x.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    )


def assert_symmetric(out: Tensor) -> None:
    """Check that the matrices are bit for bit symmetric."""
    assert torch.equal(out, out.mT)


def _norms(error: Tensor) -> Tensor:
    """Frobenius and max norm of each matrix."""
    flat = error.reshape(*error.shape[:-2], -1) if error.dim() > 2 else error.reshape(-1)
    orders = (2, math.inf)
    return torch.stack([torch.linalg.vector_norm(flat, order, dim=-1) for order in orders])


def assert_within_budget(out: Tensor, torch_result: Tensor, ref64: Tensor) -> None:
    """Check that each matrix is at most twice as far from float64 as PyTorch's own result.

    The bound is ``2 |torch - ref64| + 4 eps |ref64|`` in the Frobenius and in the max norm.

    Args:
        out: The result under test, ``[*, n, m]``, or a vector or scalar.
        torch_result: PyTorch's result in the same dtype and at the same matmul precision.
        ref64: The result in float64.
    """
    assert out.shape == ref64.shape and out.dtype == torch_result.dtype
    if not out.numel():
        return
    eps = torch.finfo(out.dtype).eps
    error = _norms(out.double() - ref64)
    allowed = 2 * _norms(torch_result.double() - ref64) + 4 * eps * _norms(ref64)
    assert (error <= allowed).all(), f"error {error} is above the budget {allowed}"


def assert_same(out: Tensor, expected: Tensor) -> None:
    """Check that two float64 results differ by no more than the order of their sums explains."""
    assert out.shape == expected.shape and out.dtype == expected.dtype == torch.float64
    if out.numel():
        bound = 64 * torch.finfo(torch.float64).eps * _norms(expected)
        error = _norms(out - expected)
        assert (error <= bound).all(), f"error {error} is above {bound}"


def gram(x: Tensor, mask: Tensor | None = None, groups: int = 1, bias: bool = False) -> Tensor:
    """Gram matrix in float64; of float64 rows in extended precision, rounded to float64."""
    rows = x.double().reshape(math.prod(x.shape[:-1]), groups, x.shape[-1] // groups)
    rows = with_bias(rows, bias)
    if mask is not None:
        rows = rows[mask.reshape(-1)]
    precision = np.longdouble if x.dtype == torch.float64 else np.float64
    # Columns side by side, [groups, d, rows]: NumPy is slow at sums over numbers that lie apart.
    columns = np.ascontiguousarray(rows.permute(1, 2, 0).cpu().numpy(), precision)
    result = torch.from_numpy((columns @ columns.transpose(0, 2, 1)).astype(np.float64))
    return result[0] if groups == 1 else result


def convolution(
    dimensions: int,
    channels: int,
    out_channels: int,
    options: dict[str, Any],
    bias: bool = False,
) -> nn.Module:
    """PyTorch's float64 module of the options of :func:`kfac_fast.conv_expand_gram`."""
    options = dict(options)
    kinds = TRANSPOSED if options.pop("transposed", False) else CONVOLUTIONS
    kind = kinds[dimensions - 1]
    return kind(channels, out_channels, bias=bias, dtype=torch.float64, **options)


def patches(x: Tensor, **options: Any) -> Tensor:
    """Patches ``[N, S, groups, d]`` by PyTorch's own convolution with one-hot kernels.

    Output channel ``(j, c, k...)`` copies the input that tap ``k`` of channel ``c`` of group ``j``
    reads. A transposed convolution's weight is the flipped kernel.
    """
    dimensions = x.dim() - 2
    groups = options.get("groups", 1)
    spatial = tuple(range(2, x.dim()))
    per_group = x.shape[1] // groups
    kernel = options["kernel_size"]
    kernel = (kernel,) * dimensions if isinstance(kernel, int) else kernel
    taps = per_group * math.prod(kernel)
    one_hot = torch.eye(taps, dtype=torch.float64).reshape(taps, per_group, *kernel)
    module = convolution(dimensions, x.shape[1], groups * taps, options)
    if options.get("transposed", False):
        weight = one_hot.transpose(0, 1).flip(spatial).repeat(groups, *(1,) * (dimensions + 1))
    else:
        weight = one_hot.repeat(groups, *(1,) * (dimensions + 1))
    with torch.no_grad():
        module.weight.copy_(weight)
        read = module(x.double())
    return read.flatten(2).transpose(1, 2).unflatten(2, (groups, taps))


def with_bias(rows: Tensor, bias: bool) -> Tensor:
    """Append 1 to each row if there is a bias."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1) if bias else rows


def outer_sum(rows: Tensor) -> Tensor:
    """Sum of the outer products of rows ``[R, groups, d]``; a single group has no axis."""
    total = torch.zeros(rows.shape[1], rows.shape[2], rows.shape[2], dtype=rows.dtype)
    for row in rows:
        total += row[:, :, None] * row[:, None, :]
    return total[0] if rows.shape[1] == 1 else total


def shared_rows(x: Tensor, mask: Tensor, groups: int, bias: bool, reduction: str) -> Tensor:
    """Each example's counted rows reduced one by one: ``[N, *shared, D]`` to ``[N, groups, d]``."""
    results = [x.new_zeros(0, groups, x.shape[-1] // groups + bias)]
    for example, counts in zip(x.flatten(1, -2), mask.flatten(1), strict=True):
        rows = with_bias(example.reshape(len(example), groups, x.shape[-1] // groups), bias)
        total = torch.zeros_like(results[0].sum(0))
        for row in rows[counts]:
            total = total + row
        average = reduction == "mean" and counts.any()
        results.append((total / counts.sum() if average else total)[None])
    return torch.cat(results)


def positive_definite(*shape: int) -> Tensor:
    """Well conditioned symmetric positive definite float64 matrices ``[*, n, n]``."""
    rows = torch.randn(*shape[:-1], 2 * shape[-1] + 1, dtype=torch.float64)
    matrix = rows @ rows.mT / (2 * shape[-1] + 1)
    return (matrix + matrix.mT) / 2 + 0.5 * torch.eye(shape[-1], dtype=torch.float64)


def lower_only(matrix: Tensor) -> Tensor:
    """The matrix with NaN above its diagonal."""
    above = torch.ones_like(matrix, dtype=torch.bool).triu(1)
    return matrix.masked_fill(above, math.nan)
