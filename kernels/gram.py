"""Gram matrices on tensor cores: the lower triangle of tiles, rows split over thread blocks.

``gram_partial_kernel`` sums a part of the rows of one tile into a workspace; the parts are added as
in :mod:`kfac_fast.kernels.triangle`. No sum depends on the order in which thread blocks run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_fast.kernels import launch
from kfac_fast.kernels.product import PRODUCTS, flush, product
from kfac_fast.kernels.triangle import TriangleParts, triangle_row

COLUMNS = tl.constexpr(launch.Line.COLUMNS)
ROWS = tl.constexpr(launch.Line.ROWS)


@triton.jit
def _counts(mask, row, inner, mask_stride, MASKED: tl.constexpr):
    """Whether rows exist and are not masked."""
    counts = row < inner
    if MASKED:
        counts &= tl.load(mask + row * mask_stride, mask=counts, other=0)
    return counts


@triton.jit
def _sum_rows(
    left_first, right_first, left_exists, right_exists, mask, begin, end,
    inner, outer_stride, row_stride, mask_outer_stride, mask_row_stride,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, FLUSH: tl.constexpr, PRODUCTS: tl.constexpr,
    MASKED: tl.constexpr, COLUMN_SUMS: tl.constexpr,
):  # fmt: skip
    """Sums over the steps ``[begin, end)`` of one tile, ``[BLOCK, BLOCK]``, and of its columns."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    chain = tl.zeros((BLOCK, BLOCK), tl.float32)
    column_sums = tl.zeros((BLOCK,), tl.float32)
    steps_per_outer = tl.cdiv(inner, DEPTH)
    for step in range(begin, end):
        outer = (step // steps_per_outer).to(tl.int64)
        row = (step % steps_per_outer).to(tl.int64) * DEPTH
        offset = outer * outer_stride + row * row_stride
        rows = row + tl.arange(0, DEPTH)
        first_mask = mask + outer * mask_outer_stride
        left_counts = _counts(first_mask, rows[None, :], inner, mask_row_stride, MASKED)
        right_counts = _counts(first_mask, rows[:, None], inner, mask_row_stride, MASKED)
        # The left operand is read transposed: on compute capability 8 a transposition in registers
        # would keep its loads from running ahead.
        left = tl.load(left_first + offset, mask=left_exists & left_counts, other=0.0)
        right = tl.load(right_first + offset, mask=right_exists & right_counts, other=0.0)
        chain = product(left, right, chain, PRODUCTS)
        due = (step - begin) % FLUSH == FLUSH - 1
        total, chain = flush(total, chain, due, COLUMN_SUMS and right.dtype != tl.float32)
        if COLUMN_SUMS:
            column_sums += tl.sum(right.to(tl.float32), 0)
    return total + chain, column_sums


@triton.jit(
    do_not_specialize=[
        "outer", "inner", "width", "tiles", "split", "outer_stride", "row_stride", "column_stride",
        "mask_outer_stride", "mask_row_stride",
    ]
)  # fmt: skip
def gram_partial_kernel(
    x, mask, partials, column_sums, outer, inner, width, tiles, split,
    outer_stride, row_stride, column_stride, mask_outer_stride, mask_row_stride,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, FLUSH: tl.constexpr, PRODUCTS: tl.constexpr,
    LINE: tl.constexpr, CHUNK: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sum one part of the rows of one tile; grid (groups * tiles, split).

    ``partials`` is ``[split, groups * tiles, BLOCK, BLOCK]``, ``column_sums`` ``[split, groups,
    width]``. Where ``CHUNK``, the elements of 16 bytes, divides the sizes and strides, these come
    divided by it, so that the compiler knows that it may read 16 bytes at once.
    """
    if LINE == COLUMNS:
        column_stride = 1
        row_stride = row_stride.to(tl.int64) * CHUNK
        width = width * CHUNK
    elif LINE == ROWS:
        row_stride = 1
        column_stride = column_stride.to(tl.int64) * CHUNK
        inner = inner * CHUNK
    outer_stride = outer_stride.to(tl.int64) * CHUNK
    program = tl.program_id(0)
    group = (program // tiles).to(tl.int64)
    tile = program % tiles
    i = triangle_row(tile)
    j = tile - i * (i + 1) // 2
    left_column = i * BLOCK + tl.arange(0, BLOCK)
    right_column = j * BLOCK + tl.arange(0, BLOCK)
    steps = outer * tl.cdiv(inner, DEPTH)
    steps_per_part = tl.cdiv(steps, split)
    begin = tl.program_id(1) * steps_per_part
    end = tl.minimum(begin + steps_per_part, steps)
    x += group * width * column_stride
    row_offset = tl.arange(0, DEPTH).to(tl.int64) * row_stride
    left_first = x + (left_column.to(tl.int64)[:, None] * column_stride + row_offset[None, :])
    right_first = x + (row_offset[:, None] + right_column.to(tl.int64)[None, :] * column_stride)
    left_exists = left_column[:, None] < width
    right_exists = right_column[None, :] < width
    if BIAS and i == j:
        total, sums = _sum_rows(
            left_first, right_first, left_exists, right_exists, mask, begin, end,
            inner, outer_stride, row_stride, mask_outer_stride, mask_row_stride,
            BLOCK, DEPTH, FLUSH, PRODUCTS, MASKED, True,
        )  # fmt: skip
        first_sum = (tl.program_id(1) * (tl.num_programs(0) // tiles) + group) * width
        tl.store(column_sums + first_sum + right_column, sums, mask=right_column < width)
    else:
        total, sums = _sum_rows(
            left_first, right_first, left_exists, right_exists, mask, begin, end,
            inner, outer_stride, row_stride, mask_outer_stride, mask_row_stride,
            BLOCK, DEPTH, FLUSH, PRODUCTS, MASKED, False,
        )  # fmt: skip
    first = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + program) * (BLOCK * BLOCK)
    entry = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partials + first + entry, total)


def gram(
    x: Tensor,
    mask: Tensor | None,
    groups: int,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
    precision: str,
) -> None:
    """``out <- beta out + alpha sum x~ x~^T``; float32 ``x`` at the matmul precision ``precision``.

    Arguments are the checked ones of the operator. Rows that more than two strides describe are
    copied first. An infinity in float32 ``x`` may come out as NaN.
    """
    if out.numel() == 0:
        return
    width = x.shape[-1] // groups
    products = PRODUCTS[precision] if x.dtype == torch.float32 else 1
    rows = launch.Rows.of(x, mask, width)
    device = launch.device(x.get_device())
    tiling = launch.gram_tiling(
        width, products, x.element_size(), rows.chunk > 1, device.capability
    )
    parts = TriangleParts.empty(out, groups, width, rows.steps(tiling.depth), bias, tiling, device)
    counted = mask.sum() if bias and mask is not None else None
    along_columns, along_rows = rows.line == launch.Line.COLUMNS, rows.line == launch.Line.ROWS
    with torch.cuda.device_of(x):
        gram_partial_kernel[parts.programs, parts.split](
            rows.x,
            rows.x if rows.mask is None else rows.mask,
            parts.tiles,
            parts.column_sums,
            rows.outer,
            rows.inner // rows.chunk if along_rows else rows.inner,
            width // rows.chunk if along_columns else width,
            tiling.tiles(width),
            parts.split,
            rows.outer_stride // rows.chunk,
            rows.row_stride // rows.chunk if along_columns else rows.row_stride,
            rows.x.stride(-1) // rows.chunk if along_rows else rows.x.stride(-1),
            rows.mask_outer_stride,
            rows.mask_row_stride,
            BLOCK=tiling.block,
            DEPTH=tiling.depth,
            FLUSH=tiling.flush,
            PRODUCTS=products,
            LINE=rows.line,
            CHUNK=rows.chunk,
            BIAS=bias,
            MASKED=mask is not None,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        parts.finish(rows.outer * rows.inner, counted, bias, alpha, beta, out)
