"""Sums and means of all patches of an example, in one pass over the input.

``line_sums_kernel`` adds the lines of a cell, those that the same taps read equally often along all
dimensions but the last, and then the pixels that each tap of the last dimension reads.
``window_sum_kernel`` adds the cells for the taps of the other dimensions, applies alpha and beta
and writes the bias entries. Pixels that a tap does not read never enter its sum, not even times 0.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_fast.kernels import launch
from kfac_fast.kernels.gram import gram
from kfac_fast.kernels.triangle import accumulate

COLUMNS = tl.constexpr(launch.Line.COLUMNS)
ROWS = tl.constexpr(launch.Line.ROWS)

# Entries of the result that one program writes.
ENTRIES = 256
# Lines whose loads are under way at once.
LINES = tl.constexpr(4)
STEPS_PER_SUM = tl.constexpr(launch.STEPS_PER_SUM)

# A dimension of one pixel and one tap, in place of those that an input lacks.
POINT = ((0,), ((1,),))


@dataclass(frozen=True, eq=False)
class Tables:
    """The plans of a convolution on a device; all dimensions but the last are joined.

    Attributes:
        lines: int32 ``[lines, 2]``, the pixels in the first two dimensions, one cell after the
            other.
        starts: int32 ``[cells + 1]``, the first line of each cell, and their number.
        weights: float32 ``[taps, cells]``, how often a tap reads each line of a cell.
        pixel_weights: float32 ``[taps, pixels]``, the same of the last dimension's pixels.
    """

    lines: Tensor
    starts: Tensor
    weights: Tensor
    pixel_weights: Tensor


def tables(plans: Sequence[Any], device: torch.device) -> Tables:
    """Build the tables of a geometry, which take a copy to the device: keep them.

    Args:
        plans: (cells, weights) of each spatial axis, 1 to 3 of them: the cell of each pixel, -1 for
            none, and for each tap how often it reads the pixels of each cell.
        device: Where the kernels run.

    Returns:
        What :func:`conv_window_sum` and :func:`conv_reduce_gram` take.
    """
    plane, line, last = [POINT] * (3 - len(plans)) + [tuple(plan) for plan in plans]
    lines: list[tuple[int, int]] = []
    starts = [0]
    (cells_z, weights_z), (cells_y, weights_y) = plane, line
    for z, y in itertools.product(range(len(weights_z[0])), range(len(weights_y[0]))):
        own = (
            [pixel for pixel, cell in enumerate(cells) if cell == index]
            for cells, index in ((cells_z, z), (cells_y, y))
        )
        lines.extend(itertools.product(*own))
        starts.append(len(lines))
    weights = [
        [z * y for z, y in itertools.product(tap_z, tap_y)]
        for tap_z, tap_y in itertools.product(weights_z, weights_y)
    ]
    pixel_weights = [[tap[cell] if cell >= 0 else 0 for cell in last[0]] for tap in last[1]]
    return Tables(
        torch.tensor(lines, dtype=torch.int32).reshape(-1, 2).to(device),
        torch.tensor(starts, dtype=torch.int32).to(device),
        torch.tensor(weights, dtype=torch.float32).to(device),
        torch.tensor(pixel_weights, dtype=torch.float32).to(device),
    )


@triton.jit(
    do_not_specialize=[
        "channels", "pixels", "cells", "taps", "batch_stride", "channel_stride", "z_stride",
        "y_stride", "x_stride",
    ]
)  # fmt: skip
def line_sums_kernel(
    x, lines, starts, pixel_weights, sums, channels, pixels, cells, taps, batch_stride,
    channel_stride, z_stride, y_stride, x_stride,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, LINE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum a cell of lines for each tap of the last dimension; grid (N * blocks of a cell's sums).

    ``sums`` is ``[N, pixel blocks, cells, taps, channels]``. Where ``CHUNK``, the elements of 16
    bytes, divides the sizes and strides, these come divided by it.
    """
    if LINE == COLUMNS:
        channel_stride = 1
        channels = channels * CHUNK
        x_stride = x_stride.to(tl.int64) * CHUNK
    elif LINE == ROWS:
        x_stride = 1
        pixels = pixels * CHUNK
        channel_stride = channel_stride.to(tl.int64) * CHUNK
    z_stride = z_stride.to(tl.int64) * CHUNK
    y_stride = y_stride.to(tl.int64) * CHUNK
    channel_blocks = tl.cdiv(channels, CHANNELS)
    pixel_blocks = tl.cdiv(pixels, PIXELS)
    block = tl.program_id(0)
    channel = block % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    block = block // channel_blocks
    cell = block % cells
    block = block // cells
    pixel = block % pixel_blocks * PIXELS + tl.arange(0, PIXELS)
    example = (block // pixel_blocks).to(tl.int64)
    exists = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    first = x + example * (batch_stride.to(tl.int64) * CHUNK)
    first += pixel.to(tl.int64)[:, None] * x_stride + channel.to(tl.int64)[None, :] * channel_stride
    begin = tl.load(starts + cell)
    end = tl.load(starts + cell + 1)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    chain = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for start in range(begin, end, LINES):
        for ahead in tl.static_range(LINES):
            line = lines + (start + ahead) * 2
            inside = start + ahead < end
            z = tl.load(line, mask=inside, other=0)
            y = tl.load(line + 1, mask=inside, other=0)
            offset = z * z_stride + y * y_stride
            chain += tl.load(first + offset, mask=exists & inside, other=0.0).to(tl.float32)
        if (start - begin) % STEPS_PER_SUM == STEPS_PER_SUM - LINES:
            total += chain
            chain = tl.zeros((PIXELS, CHANNELS), tl.float32)
    total += chain
    out = sums + (block.to(tl.int64) * cells + cell) * taps * channels + channel
    for tap in range(taps):
        weight = tl.load(pixel_weights + tap * pixels + pixel, mask=pixel < pixels, other=0.0)
        read = tl.where((weight != 0)[:, None], total * weight[:, None], 0.0)
        tl.store(out + tap * channels, tl.sum(read, 0), mask=channel < channels)


@triton.jit(
    do_not_specialize=["count", "channels", "cells", "taps", "last_taps", "pixel_blocks", "groups"]
)
def window_sum_kernel(
    sums, weights, out, alpha, beta, count, channels, cells, taps, last_taps, pixel_blocks, groups,
    ENTRIES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Finish some entries of an example; grid (N * blocks of entries).

    ``weights`` is ``[taps, cells]``; each example has ``[groups, channels * taps * last_taps]``
    entries, with a bias one more a group, ``count``.
    """
    features = channels * taps * last_taps
    edge = features + 1 if BIAS else features
    entries = groups * edge
    blocks = tl.cdiv(entries, ENTRIES)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * ENTRIES + tl.arange(0, ENTRIES)
    feature = entry % edge
    exists = entry < entries
    read = exists & (feature < features)
    last_tap = feature % last_taps
    line = feature // last_taps
    tap = line % taps
    channel = entry // edge * channels + line // taps
    all_channels = groups * channels
    total = tl.zeros((ENTRIES,), tl.float32)
    for cell in range(cells):
        weight = tl.load(weights + tap * cells + cell, mask=read, other=0.0)
        cell_total = tl.zeros((ENTRIES,), tl.float32)
        for block in range(pixel_blocks):
            row = ((example * pixel_blocks + block) * cells + cell) * last_taps + last_tap
            place = sums + row * all_channels + channel
            cell_total += tl.load(place, mask=read & (weight != 0), other=0.0)
        total += weight * cell_total
    if BIAS:
        total = tl.where(feature == features, count, total)
    accumulate(out + example * entries + entry, alpha * total, beta, exists)


def conv_window_sum(
    x: Tensor,
    tables: Tables,
    outputs: int,
    groups: int,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
) -> None:
    """``out <- beta out + alpha`` sums of the patches of each example.

    Args:
        x: Input of shape ``[N, C, *spatial]``, of any strides.
        tables: The geometry's, from :func:`tables`.
        outputs: Number of output positions, the bias entry.
        groups: Groups of channels.
        bias: Whether the patches end with a 1.
        alpha: Weight of the sums.
        beta: Weight of ``out``.
        out: Contiguous ``[N, (groups,) D]``.
    """
    if out.numel() == 0:
        return
    batch, channels = x.shape[:2]
    image = launch.Image.of(x, channels)
    taps, cells = tables.weights.shape
    last_taps, pixels = tables.pixel_weights.shape
    block = launch.adding_block(pixels, channels, image.line)
    pixel_blocks = -(-pixels // block.rows)
    blocks = pixel_blocks * cells * -(-channels // block.columns)
    sums = out.new_empty(batch * pixel_blocks * cells * last_taps * channels)
    along_channels = image.line == launch.Line.COLUMNS
    along_pixels = image.line == launch.Line.ROWS
    strides = image.pixel_strides
    with torch.cuda.device_of(x):
        if sums.numel():
            line_sums_kernel[(batch * blocks,)](
                x,
                tables.lines,
                tables.starts,
                tables.pixel_weights,
                sums,
                channels // image.chunk if along_channels else channels,
                pixels // image.chunk if along_pixels else pixels,
                cells,
                last_taps,
                image.batch_stride // image.chunk,
                image.channel_stride // image.chunk if along_pixels else image.channel_stride,
                strides[0] // image.chunk,
                strides[1] // image.chunk,
                strides[2] // image.chunk if along_channels else strides[2],
                PIXELS=block.rows,
                CHANNELS=block.columns,
                LINE=image.line,
                CHUNK=image.chunk,
            )
        window_sum_kernel[(batch * -(-math.prod(out.shape[1:]) // ENTRIES),)](
            sums,
            tables.weights,
            out,
            float(alpha),
            float(beta),
            float(outputs),
            channels // groups,
            cells,
            taps,
            last_taps,
            pixel_blocks,
            groups,
            ENTRIES=ENTRIES,
            BIAS=bias,
        )


def conv_reduce_gram(
    x: Tensor,
    tables: Tables,
    outputs: int,
    groups: int,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
    precision: str,
) -> None:
    """``out <- beta out + alpha`` Gram of each example's mean patch; see :func:`conv_window_sum`.

    The means are float32, multiplied at the matmul precision ``precision``.
    """
    taps = len(tables.weights) * len(tables.pixel_weights)
    means = out.new_empty(len(x), x.shape[1] * taps)
    conv_window_sum(x, tables, outputs, groups, False, 1 / outputs, 0.0, means)
    gram(means, None, groups, bias, alpha, beta, out, precision)
