"""The Gram of all patches by implicit patches: their rows are read straight from the input.

The input is framed already, so every tap of every output position reads a pixel of it. Where the
channels of a pixel are read 16 bytes at once, ``tap_partial_kernel`` multiplies the channels of one
tap with those of another over all patches, and the blocks are put together as in
:mod:`kfac_fast.kernels.tap_blocks`. Elsewhere ``patch_partial_kernel`` gathers the entries of the
patches one by one, in their final order, and ends as in :mod:`kfac_fast.kernels.triangle`. No sum
depends on the order in which thread blocks run.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_fast.kernels import launch
from kfac_fast.kernels.product import PRODUCTS, product
from kfac_fast.kernels.tap_blocks import Pairs, Parts, Strips, finish
from kfac_fast.kernels.triangle import TriangleParts, triangle_row

# Tiles of taps are chosen if they hold at most so many times the entries of a block of channels.
MOST_WASTE = 2.0


class Windows(NamedTuple):
    """How the rows of patches lie in the framed input; strides in elements.

    Attributes:
        patches: Number of patches, of all examples.
        outputs: Output positions along each dimension.
        kernel: Taps along each dimension.
        batch_stride: From an example to the next.
        moves: From an output position to the next along each dimension.
        steps: From a tap to the next along each dimension.
    """

    patches: int
    outputs: tuple[int, ...]
    kernel: tuple[int, ...]
    batch_stride: int
    moves: tuple[int, ...]
    steps: tuple[int, ...]

    @staticmethod
    def of(
        x: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        outputs: Sequence[int],
    ) -> "Windows":
        """Fill up to three dimensions."""
        missing = 5 - x.dim()
        pixel = x.stride()[2:]
        moves = [own * step for own, step in zip(pixel, stride, strict=True)]
        steps = [own * apart for own, apart in zip(pixel, dilation, strict=True)]
        ones, zeros = (1,) * missing, (0,) * missing
        return Windows(
            len(x) * math.prod(outputs),
            (*ones, *outputs),
            (*ones, *kernel),
            x.stride(0),
            (*zeros, *moves),
            (*zeros, *steps),
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the examples, then of the output positions, then of the taps."""
        return (self.batch_stride, *self.moves, *self.steps)


@triton.jit
def _patch_offsets(
    step, outputs_z, outputs_y, outputs_x, batch_stride, move_z, move_y, move_x, DEPTH: tl.constexpr
):
    """Where the patches of a step start, and how many patches come before it."""
    first = tl.cast(step, tl.int64) * DEPTH
    outputs = outputs_z * outputs_y * outputs_x
    example = first // outputs
    position = (first - example * outputs).to(tl.int32) + tl.arange(0, DEPTH)
    line = position // outputs_x
    plane = line // outputs_y
    example = example + plane // outputs_z
    offset = example * batch_stride + (plane % outputs_z).to(tl.int64) * move_z
    offset += (line % outputs_y).to(tl.int64) * move_y
    return offset + (position % outputs_x).to(tl.int64) * move_x, first


@triton.jit
def _tap_offset(tap, kernel_y, kernel_x, step_z, step_y, step_x):
    """Where a tap reads, from the start of its patch."""
    line = tap // kernel_x
    offset = (line // kernel_y).to(tl.int64) * step_z + (line % kernel_y).to(tl.int64) * step_y
    return offset + (tap % kernel_x).to(tl.int64) * step_x


@triton.jit
def _sum_patches(
    left_first, right_first, left_exists, right_exists, begin, end, patches,
    outputs_z, outputs_y, outputs_x, batch_stride, move_z, move_y, move_x,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, FLUSH: tl.constexpr, PRODUCTS: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
):  # fmt: skip
    """Sums over the steps ``[begin, end)`` of one tile, ``[BLOCK, BLOCK]``, and of its columns."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    chain = tl.zeros((BLOCK, BLOCK), tl.float32)
    column_sums = tl.zeros((BLOCK,), tl.float32)
    # Not pipelined where columns are summed, too, and operands are not of float32: Triton gives
    # them one buffer too few for a product that is left running.
    alone: tl.constexpr = COLUMN_SUMS and left_first.dtype.element_ty != tl.float32
    for step in tl.range(begin, end, num_stages=1 if alone else None):
        offsets, first = _patch_offsets(
            step, outputs_z, outputs_y, outputs_x, batch_stride, move_z, move_y, move_x, DEPTH
        )
        exists = tl.arange(0, DEPTH) < tl.minimum(patches - first, DEPTH).to(tl.int32)
        # The left operand is read transposed: on compute capability 8 a transposition in registers
        # would keep its loads from running ahead.
        left = tl.load(
            left_first + offsets[None, :], mask=left_exists & exists[None, :], other=0.0
        )  # fmt: skip
        right = tl.load(
            right_first + offsets[:, None], mask=right_exists & exists[:, None], other=0.0
        )  # fmt: skip
        chain = product(left, right, chain, PRODUCTS)
        if (step - begin) % FLUSH == FLUSH - 1:
            total += chain
            chain = tl.zeros((BLOCK, BLOCK), tl.float32)
        if COLUMN_SUMS:
            column_sums += tl.sum(right.to(tl.float32), 0)
    return total + chain, column_sums


@triton.jit(
    do_not_specialize=[
        "patches", "outputs_z", "outputs_y", "outputs_x", "kernel_y", "kernel_x", "batch_stride",
        "move_z", "move_y", "move_x", "step_z", "step_y", "step_x", "width", "strips", "side",
        "split",
    ]
)  # fmt: skip
def tap_partial_kernel(
    x, partials, column_sums, patches, outputs_z, outputs_y, outputs_x, kernel_y, kernel_x,
    batch_stride, move_z, move_y, move_x, step_z, step_y, step_x, width, strips, side, split,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, FLUSH: tl.constexpr, PRODUCTS: tl.constexpr,
    CHUNK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Sum one part of one tile of a pair of taps; grid (pairs * strips * side * side, split).

    ``partials`` is ``[pairs, split, strips, side, side, BLOCK, BLOCK]``, ``column_sums`` ``[pairs,
    split, strips, side, BLOCK]``. Strides and the ``width`` of a group come divided by ``CHUNK``,
    the elements of 16 bytes, so that the compiler knows that it may read 16 bytes at once.
    """
    width = width * CHUNK
    batch_stride = batch_stride.to(tl.int64) * CHUNK
    move_z = move_z.to(tl.int64) * CHUNK
    move_y = move_y.to(tl.int64) * CHUNK
    move_x = move_x.to(tl.int64) * CHUNK
    step_z = step_z.to(tl.int64) * CHUNK
    step_y = step_y.to(tl.int64) * CHUNK
    step_x = step_x.to(tl.int64) * CHUNK
    tiles = strips * side * side
    tile = tl.program_id(0) % tiles
    pair = tl.program_id(0) // tiles  # there may be more than the grid's other sides hold
    strip = (tile // (side * side)).to(tl.int64)
    i = tile // side % side
    j = tile % side
    left_tap = triangle_row(pair)
    right_tap = pair - left_tap * (left_tap + 1) // 2
    if left_tap == right_tap and i < j:
        return  # never read
    steps = tl.cdiv(patches, DEPTH).to(tl.int32)
    steps_per_part = tl.cdiv(steps, split)
    begin = tl.program_id(1) * steps_per_part
    end = tl.minimum(begin + steps_per_part, steps)
    left_column = i * BLOCK + tl.arange(0, BLOCK)
    right_column = j * BLOCK + tl.arange(0, BLOCK)
    x += strip * width
    left_offset = _tap_offset(left_tap, kernel_y, kernel_x, step_z, step_y, step_x)
    right_offset = _tap_offset(right_tap, kernel_y, kernel_x, step_z, step_y, step_x)
    left_first = x + left_offset + left_column
    right_first = x + right_offset + right_column
    left_exists = left_column[:, None] < width
    right_exists = right_column[None, :] < width
    part = pair.to(tl.int64) * split + tl.program_id(1)
    if BIAS and left_tap == right_tap and i == j:
        total, sums = _sum_patches(
            left_first[:, None], right_first[None, :], left_exists, right_exists, begin, end,
            patches, outputs_z, outputs_y, outputs_x, batch_stride, move_z, move_y, move_x,
            BLOCK, DEPTH, FLUSH, PRODUCTS, True,
        )  # fmt: skip
        tl.store(column_sums + (part * strips + strip) * side * BLOCK + right_column, sums)
    else:
        total, sums = _sum_patches(
            left_first[:, None], right_first[None, :], left_exists, right_exists, begin, end,
            patches, outputs_z, outputs_y, outputs_x, batch_stride, move_z, move_y, move_x,
            BLOCK, DEPTH, FLUSH, PRODUCTS, False,
        )  # fmt: skip
    entry = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = (part * tiles + tile) * (BLOCK * BLOCK)
    tl.store(partials + first + entry, total)


@triton.jit(
    do_not_specialize=[
        "patches", "outputs_z", "outputs_y", "outputs_x", "kernel_y", "kernel_x", "batch_stride",
        "move_z", "move_y", "move_x", "step_z", "step_y", "step_x", "channel_stride", "width",
        "taps", "tiles", "split",
    ]
)  # fmt: skip
def patch_partial_kernel(
    x, partials, column_sums, patches, outputs_z, outputs_y, outputs_x, kernel_y, kernel_x,
    batch_stride, move_z, move_y, move_x, step_z, step_y, step_x, channel_stride, width, taps,
    tiles, split,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, FLUSH: tl.constexpr, PRODUCTS: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Sum one part of the patches of one tile; grid (groups * tiles, split).

    The workspaces are those of ``gram_partial_kernel``, the columns (channel, tap).
    """
    program = tl.program_id(0)
    group = (program // tiles).to(tl.int64)
    tile = program % tiles
    i = triangle_row(tile)
    j = tile - i * (i + 1) // 2
    left_column = i * BLOCK + tl.arange(0, BLOCK)
    right_column = j * BLOCK + tl.arange(0, BLOCK)
    steps = tl.cdiv(patches, DEPTH).to(tl.int32)
    steps_per_part = tl.cdiv(steps, split)
    begin = tl.program_id(1) * steps_per_part
    end = tl.minimum(begin + steps_per_part, steps)
    x += group * width * channel_stride
    left_first = x + (left_column // taps).to(tl.int64) * channel_stride
    left_first += _tap_offset(left_column % taps, kernel_y, kernel_x, step_z, step_y, step_x)
    right_first = x + (right_column // taps).to(tl.int64) * channel_stride
    right_first += _tap_offset(right_column % taps, kernel_y, kernel_x, step_z, step_y, step_x)
    features = width * taps
    left_exists = left_column[:, None] < features
    right_exists = right_column[None, :] < features
    if BIAS and i == j:
        total, sums = _sum_patches(
            left_first[:, None], right_first[None, :], left_exists, right_exists, begin, end,
            patches, outputs_z, outputs_y, outputs_x, batch_stride, move_z, move_y, move_x,
            BLOCK, DEPTH, FLUSH, PRODUCTS, True,
        )  # fmt: skip
        first_sum = (tl.program_id(1) * (tl.num_programs(0) // tiles) + group) * features
        tl.store(column_sums + first_sum + right_column, sums, mask=right_column < features)
    else:
        total, sums = _sum_patches(
            left_first[:, None], right_first[None, :], left_exists, right_exists, begin, end,
            patches, outputs_z, outputs_y, outputs_x, batch_stride, move_z, move_y, move_x,
            BLOCK, DEPTH, FLUSH, PRODUCTS, False,
        )  # fmt: skip
    first = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + program) * (BLOCK * BLOCK)
    entry = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partials + first + entry, total)


def conv_patch_gram(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    outputs: Sequence[int],
    groups: int,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
    precision: str,
) -> None:
    """``out <- beta out + alpha`` Gram of the patches, float32 at precision ``precision``.

    Args:
        x: Framed input of shape ``[N, C, *spatial]``, of any strides. Where its channels fill tiles
            but are not contiguous, it is copied.
        kernel_size: Taps along each dimension.
        stride: Step of the window over the framed input.
        dilation: Distance between the taps.
        outputs: Output positions along each dimension.
        groups: Groups of channels.
        bias: Whether the patches end with a 1.
        alpha: Weight of the sum.
        beta: Weight of ``out``.
        out: Contiguous ``[(groups,) D, D]``.
        precision: As of :func:`torch.get_float32_matmul_precision`.
    """
    if out.numel() == 0:
        return
    width = x.shape[1] // groups
    products = PRODUCTS[precision] if x.dtype == torch.float32 else 1
    device = launch.device(x.get_device())
    tiling = launch.block_tiling(width, products, x.element_size(), device.capability)
    wide = (tiling.side(width) * tiling.block) ** 2 <= MOST_WASTE * width**2
    result = (groups, bias, float(alpha), float(beta), out, products, device)
    with torch.cuda.device_of(x):
        if wide and width % (16 // x.element_size()) == 0:
            image = launch.Image.of(x, width)
            if image.line != launch.Line.COLUMNS or image.chunk == 1:
                x = x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
            windows = Windows.of(x, kernel_size, stride, dilation, outputs)
            _gram_of_taps(x, windows, tiling, *result)
        else:
            windows = Windows.of(x, kernel_size, stride, dilation, outputs)
            _gram_of_entries(x, windows, *result)


@functools.cache
def _pairs(taps: int, device: torch.device) -> Pairs:
    """Each pair of taps has its own cell, that of the later tap with the earlier."""
    runs = [
        (max(tap, other) * (max(tap, other) + 1) // 2 + min(tap, other), 1, int(tap < other))
        for tap, other in itertools.product(range(taps), repeat=2)
    ]
    members = torch.arange(taps * (taps + 1) // 2, dtype=torch.int32, device=device)
    return Pairs(torch.tensor(runs, dtype=torch.int32, device=device), members, 1, taps)


def _gram_of_taps(
    x: Tensor,
    windows: Windows,
    tiling: launch.Tiling,
    groups: int,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
    products: int,
    device: launch.Device,
) -> None:
    """Tiles of the channels of two taps, which the channels fill well."""
    width = x.shape[1] // groups
    strips = Strips.of(groups, width, tiling)
    pairs = _pairs(math.prod(windows.kernel), x.device)
    cells = len(pairs.members)
    chunk = 16 // x.element_size()
    split = launch.choose_split(
        cells * strips.tiles,
        -(-windows.patches // tiling.depth),
        4 * tiling.block**2,
        device.slots(tiling),
    )
    starts = torch.arange(cells + 1, dtype=torch.int32, device=x.device) * split
    parts = Parts.empty(out, strips, starts, cells * split, bias)
    tap_partial_kernel[(cells * strips.tiles, split)](
        x,
        parts.tiles,
        parts.column_sums,
        windows.patches,
        *windows.outputs,
        *windows.kernel[1:],
        *(stride // chunk for stride in windows.strides),
        width // chunk,
        strips.strips,
        strips.side,
        split,
        BLOCK=tiling.block,
        DEPTH=tiling.depth,
        FLUSH=tiling.flush,
        PRODUCTS=products,
        CHUNK=chunk,
        BIAS=bias,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    finish(parts, strips, pairs, groups, windows.patches, bias, alpha, beta, out)


def _gram_of_entries(
    x: Tensor,
    windows: Windows,
    groups: int,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
    products: int,
    device: launch.Device,
) -> None:
    """Tiles of the patches' entries in their final order, gathered one by one."""
    channels, taps = x.shape[1] // groups, math.prod(windows.kernel)
    features = channels * taps
    tiling = launch.gram_tiling(features, products, x.element_size(), False, device.capability)
    steps = -(-windows.patches // tiling.depth)
    parts = TriangleParts.empty(out, groups, features, steps, bias, tiling, device)
    patch_partial_kernel[parts.programs, parts.split](
        x,
        parts.tiles,
        parts.column_sums,
        windows.patches,
        *windows.outputs,
        *windows.kernel[1:],
        *windows.strides,
        x.stride(1),
        channels,
        taps,
        tiling.tiles(features),
        parts.split,
        BLOCK=tiling.block,
        DEPTH=tiling.depth,
        FLUSH=tiling.flush,
        PRODUCTS=products,
        BIAS=bias,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    parts.finish(windows.patches, None, bias, alpha, beta, out)
