"""Gram matrices on tensor cores: the lower triangle of tiles, rows split over thread blocks.

``gram_partial_kernel`` sums a part of the rows of one tile into a workspace;
``gram_finish_kernel`` adds the parts, applies alpha and beta, and writes the tile, its mirror image
and the bias entries. No sum depends on the order in which thread blocks run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_fast.kernels import launch

# bfloat16 products that stand for one float32 product, by torch.get_float32_matmul_precision().
PRODUCTS = {"highest": 6, "high": 3, "medium": 1}

COLUMNS = tl.constexpr(launch.Line.COLUMNS)
ROWS = tl.constexpr(launch.Line.ROWS)

# Rows of a tile that one program finishes.
SLAB = 32

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def triangle_row(tile):
    """Row of blocks that tile ``tile`` of a lower triangle, counted row by row, lies in."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The rounding of the square root is off by one at most.
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)


@triton.jit
def _dot(left, right, total):
    if INTERPRETED:  # its product of bfloat16 multiplies their bit patterns
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return tl.dot(left, right, total)


@triton.jit
def _leading(x):
    """The leading bfloat16 of float32 values, and what is left of them."""
    high = x.to(tl.bfloat16)
    return high, x - high.to(tl.float32)


@triton.jit
def _product(left, right, total, PRODUCTS: tl.constexpr):
    """``total + left @ right``; float32 as sums of bfloat16, the smallest products first."""
    if left.dtype != tl.float32:
        return _dot(left, right, total)
    left_high, left_rest = _leading(left)
    right_high, right_rest = _leading(right)
    if PRODUCTS > 1:
        left_middle, left_rest = _leading(left_rest)
        right_middle, right_rest = _leading(right_rest)
        if PRODUCTS == 6:
            total = _dot(left_rest.to(tl.bfloat16), right_high, total)
            total = _dot(left_high, right_rest.to(tl.bfloat16), total)
            total = _dot(left_middle, right_middle, total)
        total = _dot(left_middle, right_high, total)
        total = _dot(left_high, right_middle, total)
    return _dot(left_high, right_high, total)


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
        chain = _product(left, right, chain, PRODUCTS)
        if (step - begin) % FLUSH == FLUSH - 1:
            total += chain
            chain = tl.zeros((BLOCK, BLOCK), tl.float32)
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
        row_stride = row_stride * CHUNK
        width = width * CHUNK
    elif LINE == ROWS:
        row_stride = 1
        column_stride = column_stride * CHUNK
        inner = inner * CHUNK
    outer_stride = outer_stride * CHUNK
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


@triton.jit
def _accumulate(place, value, beta, exists):
    """``out <- value + beta out``, returned; with ``beta`` 0 it does not read ``out``."""
    if beta != 0.0:
        value += beta * tl.load(place, mask=exists)
    tl.store(place, value, mask=exists)
    return value


@triton.jit(do_not_specialize=["rows", "width", "tiles", "split"])
def gram_finish_kernel(
    partials, column_sums, counted, out, alpha, beta, rows, width, tiles, split,
    BLOCK: tl.constexpr, SLAB: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """``out <- beta out + alpha sum of the parts``; grid (groups * tiles, BLOCK / SLAB).

    ``counted`` points to the number of rows that a mask leaves; without one it is ``rows``.
    """
    program = tl.program_id(0).to(tl.int64)
    group = program // tiles
    tile = (program % tiles).to(tl.int32)
    i = triangle_row(tile)
    j = tile - i * (i + 1) // 2
    slab_row = tl.program_id(1) * SLAB + tl.arange(0, SLAB)
    entry = slab_row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((SLAB, BLOCK), tl.float32)
    for part in range(split):
        first = (part * tl.num_programs(0) + program) * (BLOCK * BLOCK)
        total += tl.load(partials + first + entry)
    width = width.to(tl.int64)
    edge = width + 1 if BIAS else width
    out += group * edge * edge
    row = (i * BLOCK + slab_row).to(tl.int64)
    column = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    lower = (row[:, None] >= column[None, :]) & (row[:, None] < width)
    place = out + row[:, None] * edge + column[None, :]
    total = _accumulate(place, alpha * total, beta, lower)
    # The mirror image is copied, not computed, so that it has the same bits.
    upper = (column[:, None] <= row[None, :]) & (row[None, :] < width)
    tl.store(out + column[:, None] * edge + row[None, :], tl.trans(total), mask=upper)
    if BIAS and i == j and tl.program_id(1) == 0:
        exists = column < width
        sums = tl.zeros((BLOCK,), tl.float32)
        for part in range(split):
            first = (part * (tl.num_programs(0) // tiles) + group) * width
            sums += tl.load(column_sums + first + column, mask=exists, other=0.0)
        sums = _accumulate(out + width * edge + column, alpha * sums, beta, exists)
        tl.store(out + column * edge + width, sums, mask=exists)
        if i == 0:
            count = tl.load(counted) if MASKED else rows
            _accumulate(out + width * edge + width, alpha * count.to(tl.float32), beta, True)


def refuses(
    x: Tensor, mask: Tensor | None, groups: int, bias: bool, alpha: float, beta: float, out: Tensor
) -> str | None:
    """Say why these kernels cannot serve a call, or None."""
    if x.dtype == torch.float64:
        return "x is float64, which the Triton kernel's bfloat16 products do not make up"
    capability = launch.device(x.get_device()).capability
    if capability < 80:
        return f"the Triton kernel needs compute capability 8.0 or newer, got {capability / 10}"
    return None


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
    tiles = tiling.tiles(width)
    programs = groups * tiles
    tile_size = tiling.block**2
    split = launch.choose_split(
        programs, rows.steps(tiling.depth), 4 * tile_size, device.multiprocessors * tiling.resident
    )
    partials = out.new_empty(split * programs * tile_size)
    column_sums = out.new_empty(split * groups * width if bias else 0)
    counted = mask.sum() if bias and mask is not None else column_sums
    masked = mask is not None
    along_columns, along_rows = rows.line == launch.Line.COLUMNS, rows.line == launch.Line.ROWS
    with torch.cuda.device_of(x):
        gram_partial_kernel[programs, split](
            rows.x,
            rows.x if rows.mask is None else rows.mask,
            partials,
            column_sums,
            rows.outer,
            rows.inner // rows.chunk if along_rows else rows.inner,
            width // rows.chunk if along_columns else width,
            tiles,
            split,
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
            MASKED=masked,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        gram_finish_kernel[programs, tiling.block // SLAB](
            partials,
            column_sums,
            counted,
            out,
            float(alpha),
            float(beta),
            rows.outer * rows.inner,
            width,
            tiles,
            split,
            BLOCK=tiling.block,
            SLAB=SLAB,
            BIAS=bias,
            MASKED=masked,
            num_warps=8,
        )
