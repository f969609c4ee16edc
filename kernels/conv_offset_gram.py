"""The Gram of all patches by offset correlation: the input times its shifted self, never unfolded.

Two taps read pixels that lie a fixed distance apart in the lines of an offset plan, so all pairs of
taps at the same distance share their products. ``pack_kernel`` copies the pixels of the lines to
rows of channels, the batch innermost: a run of pixels of all examples is a run of rows, and a shift
by a pixel is a shift by as many rows as there are examples. ``offset_partial_kernel`` multiplies
the rows of a cell, a stretch over which every pair of taps either has the whole or nothing, with
the shifted ones; of two opposite shifts one suffices. The pairs then add up their cells, as in
:mod:`kfac_fast.kernels.tap_blocks`. No sum depends on the order in which thread blocks run.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_fast.kernels import launch
from kfac_fast.kernels.product import PRODUCTS, flush, product
from kfac_fast.kernels.tap_blocks import Pairs, Parts, Strips, finish

# Positions and channels that one program packs.
POSITIONS, CHANNELS = 64, 64

# An axis of one pixel and one tap, in place of those that an input of fewer dimensions lacks.
POINT = ((0,), ((0, 0, ((0, 1),)),), ((0, 0, 1),))


class Cell(NamedTuple):
    """Positions whose products with those ``shift`` further on are summed.

    ``runs`` runs of ``run`` positions start at ``first``: ``runs_per_plane`` of them a line apart,
    then as many in the next plane. ``symmetric`` if the shift is none.
    """

    first: int
    run: int
    runs: int
    runs_per_plane: int
    shift: int
    symmetric: bool


@dataclass(frozen=True, eq=False)
class Tables:
    """The plans of a convolution on a device.

    Attributes:
        sizes: Positions of the three lines.
        lines: int64, the input pixels at the positions of the lines, one line after the other.
        cells: The cells of all shifts.
        cell_numbers: int32 ``[cells, 6]``, their numbers.
        pairs: The cells of each pair of taps.
    """

    sizes: tuple[int, int, int]
    lines: Tensor
    cells: tuple[Cell, ...]
    cell_numbers: Tensor
    pairs: Pairs

    def position(self, cell: int, run: float) -> float:
        """Where the run ``run`` of a cell starts; between two runs if it is not whole."""
        _, size_y, size_x = self.sizes
        first, length, _, runs_per_plane, _, _ = self.cells[cell]
        plane, line = divmod(int(run), runs_per_plane)
        return first + (plane * size_y + line) * size_x + run % 1 * length


def tables(plans: Sequence[Any], device: torch.device) -> Tables:
    """Build the tables of a geometry, which take a copy to the device: keep them.

    Args:
        plans: (line, shifts, pairs) of each spatial axis, 1 to 3 of them; each shift is (distance,
            mirror, ((first, length), ...)), each pair (shift, first cell, one after the last).
        device: Where the kernels run.

    Returns:
        What :func:`conv_offset_gram` takes.
    """
    plans = [POINT] * (3 - len(plans)) + [tuple(plan) for plan in plans]
    lines, shifts, _ = zip(*plans, strict=True)
    sizes = tuple(len(line) for line in lines)
    cells: list[Cell] = []
    first_cells = {}
    for indices in itertools.product(*(range(len(own)) for own in shifts)):
        chosen = [own[index] for own, index in zip(shifts, indices, strict=True)]
        mirror = tuple(shift[1] for shift in chosen)
        if indices <= mirror:
            first_cells[indices] = len(cells)
            cells.extend(_cells(chosen, sizes, symmetric=indices == mirror))
    numbers = torch.tensor(cells, dtype=torch.int32).reshape(-1, len(Cell._fields))
    flat = torch.tensor([*itertools.chain(*lines)], dtype=torch.int64)
    pairs = _pairs(plans, first_cells, device)
    return Tables(sizes, flat.to(device), tuple(cells), numbers.to(device), pairs)


def _cells(
    shifts: Sequence[tuple[int, int, Sequence[tuple[int, int]]]],
    sizes: Sequence[int],
    symmetric: bool,
) -> Iterator[Cell]:
    """The cells of one shift of each axis, those of the last axis fastest."""
    _, size_y, size_x = sizes
    z, y, x = (distance for distance, _, _ in shifts)
    shift = (z * size_y + y) * size_x + x
    for (z, planes), (y, rows), (x, run) in itertools.product(*(own for _, _, own in shifts)):
        first = (z * size_y + y) * size_x + x
        yield Cell(first, run, planes * rows, rows, shift, symmetric)


def _pairs(
    plans: Sequence[Any], first_cells: dict[tuple[int, ...], int], device: torch.device
) -> Pairs:
    """The cells of each pair of taps, from those of the pairs of each axis' taps."""
    taps = [math.isqrt(len(pairs)) for _, _, pairs in plans]
    kernel = [*itertools.product(*(range(n) for n in taps))]
    lengths = [[len(cells) for _, _, cells in shifts] for _, shifts, _ in plans]
    runs, members, most = [], [], 0
    for tap, other in itertools.product(kernel, kernel):
        own = _axis_runs(plans, taps, tap, other)
        # The cells of a shift that was left out are those of its mirror, transposed.
        transposed = tuple(shift for shift, _, _ in own) not in first_cells
        if transposed:
            own = _axis_runs(plans, taps, other, tap)
        indices = tuple(shift for shift, _, _ in own)
        _, count_y, count_x = (own[i] for own, i in zip(lengths, indices, strict=True))
        start = len(members)
        for z, y, x in itertools.product(*(range(first, end) for _, first, end in own)):
            members.append(first_cells[indices] + (z * count_y + y) * count_x + x)
        runs.append((start, len(members) - start, int(transposed)))
        most = max(most, len(members) - start)
    return Pairs(
        torch.tensor(runs, dtype=torch.int32, device=device),
        torch.tensor(members, dtype=torch.int32, device=device),
        most,
        len(kernel),
    )


def _axis_runs(
    plans: Sequence[Any], taps: Sequence[int], tap: Sequence[int], other: Sequence[int]
) -> list[tuple[int, int, int]]:
    """(Shift, first cell, one after the last) on each axis of a pair of taps."""
    return [
        pairs[count * k + m]
        for (_, _, pairs), count, k, m in zip(plans, taps, tap, other, strict=True)
    ]


class Tasks(NamedTuple):
    """Which part of which cell each program sums.

    Attributes:
        numbers: int32 ``[tasks, 4]``: cell, first step, one after the last, part.
        starts: int32 ``[cells + 1]``: first part of each cell, and the number of parts.
        count: Number of parts.
    """

    numbers: Tensor
    starts: Tensor
    count: int


@functools.cache
def _tasks(tables: Tables, batch: int, tiling: launch.Tiling, tiles: int, slots: int) -> Tasks:
    """Cut the cells into parts; kept for repeated calls and for graphs captured with them."""
    steps_per_run = [-(-cell.run * batch // tiling.depth) for cell in tables.cells]
    steps = [cell.runs * own for cell, own in zip(tables.cells, steps_per_run, strict=True)]
    length = launch.choose_part(steps, tiles, 4 * tiling.block**2, slots)
    parts = [
        (cell, begin, min(begin + length, own))
        for cell, own in enumerate(steps)
        for begin in range(0, own, length)
    ]
    counts = [-(-own // length) for own in steps]
    tasks = [(*part, number) for number, part in enumerate(parts)]
    # Parts that read the same rows, of all shifts, run together: one read serves them all.
    tasks.sort(key=lambda task: tables.position(task[0], task[1] / steps_per_run[task[0]]))
    device = tables.lines.device
    return Tasks(
        torch.tensor(tasks, dtype=torch.int32).reshape(-1, 4).to(device),
        torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32).to(device),
        len(tasks),
    )


@triton.jit(
    do_not_specialize=[
        "positions", "batch", "channels", "strips", "width", "packed_width", "size_z", "size_y",
        "size_x", "batch_stride", "channel_stride", "z_stride", "y_stride", "x_stride",
    ]
)  # fmt: skip
def pack_kernel(
    x, lines, packed, positions, batch, channels, strips, width, packed_width, size_z, size_y,
    size_x, batch_stride, channel_stride, z_stride, y_stride, x_stride,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    CHUNK: tl.constexpr, PACKED_CHUNK: tl.constexpr,
):  # fmt: skip
    """Copy some positions and channels of an example; grid (positions, channels, strips, batch).

    ``packed`` is ``[positions, batch, strips, packed_width]``; each strip of ``width`` channels is
    filled up with zeros. ``packed_width`` comes divided by ``PACKED_CHUNK``, the elements of 16
    bytes; where these divide the rest, sizes and strides come divided by ``CHUNK``.
    """
    if CHANNELS_LAST:
        channel_stride = 1
    packed_width = packed_width * PACKED_CHUNK
    channels = channels * CHUNK
    width = width * CHUNK
    position_blocks = tl.cdiv(positions, POSITIONS)
    channel_blocks = tl.cdiv(packed_width, CHANNELS)
    program = tl.program_id(0)
    position = program % position_blocks * POSITIONS + tl.arange(0, POSITIONS)
    program = program // position_blocks
    column = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    program = program // channel_blocks
    strip = program % strips
    example = (program // strips).to(tl.int64)
    exists = position < positions
    line = position // size_x
    pixel_z = tl.load(lines + line // size_y, mask=exists, other=0)
    pixel_y = tl.load(lines + size_z + line % size_y, mask=exists, other=0)
    pixel_x = tl.load(lines + size_z + size_y + position % size_x, mask=exists, other=0)
    pixel = (pixel_z * z_stride + pixel_y * y_stride + pixel_x * x_stride) * CHUNK
    channel = strip * width + column
    real = (column < width) & (channel < channels)
    first = x + example * batch_stride * CHUNK
    if CHANNELS_LAST:
        values = tl.load(
            first + (pixel[:, None] + channel[None, :]),
            mask=exists[:, None] & real[None, :],
            other=0.0,
        )
    else:
        # Neighbouring threads read neighbouring pixels.
        offset = channel.to(tl.int64)[:, None] * channel_stride + pixel[None, :]
        values = tl.load(first + offset, mask=real[:, None] & exists[None, :], other=0.0)
        values = tl.trans(values)
    row = (position.to(tl.int64) * batch + example) * strips + strip
    written = exists[:, None] & (column < packed_width)[None, :]
    tl.store(packed + row[:, None] * packed_width + column[None, :], values, mask=written)


@triton.jit
def _sum_rows(
    left_first, right_first, left_exists, right_exists, begin, end, run, runs_per_plane,
    line_stride, plane_stride, row_stride,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, FLUSH: tl.constexpr, PRODUCTS: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
):  # fmt: skip
    """Sums over the steps ``[begin, end)`` of a cell of one tile, and of the right columns."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    chain = tl.zeros((BLOCK, BLOCK), tl.float32)
    column_sums = tl.zeros((BLOCK,), tl.float32)
    steps_per_run = tl.cdiv(run, DEPTH).to(tl.int32)
    for step in range(begin, end):
        line = step // steps_per_run
        row = (step % steps_per_run).to(tl.int64) * DEPTH
        plane = line // runs_per_plane
        offset = plane * plane_stride + line % runs_per_plane * line_stride + row * row_stride
        exists = tl.arange(0, DEPTH) < tl.minimum(run - row, DEPTH).to(tl.int32)
        # The left operand is read transposed: on compute capability 8 a transposition in registers
        # would keep its loads from running ahead.
        left = tl.load(left_first + offset, mask=left_exists & exists[None, :], other=0.0)
        right = tl.load(right_first + offset, mask=right_exists & exists[:, None], other=0.0)
        chain = product(left, right, chain, PRODUCTS)
        due = (step - begin) % FLUSH == FLUSH - 1
        total, chain = flush(total, chain, due, COLUMN_SUMS and right.dtype != tl.float32)
        if COLUMN_SUMS:
            column_sums += tl.sum(right.to(tl.float32), 0)
    return total + chain, column_sums


@triton.jit(do_not_specialize=["batch", "strips", "side", "width", "size_y", "size_x"])
def offset_partial_kernel(
    packed, cells, tasks, partials, column_sums, batch, strips, side, width, size_y, size_x,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, FLUSH: tl.constexpr, PRODUCTS: tl.constexpr,
    CHUNK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Sum one part of one tile of a cell; grid (tasks * strips * side * side).

    ``partials`` is ``[parts, strips, side, side, BLOCK, BLOCK]``, ``column_sums`` ``[parts, strips,
    side, BLOCK]``. ``width``, of a packed strip, comes divided by ``CHUNK``, the elements of 16
    bytes, so that the compiler knows that it may read 16 bytes at once.
    """
    width = width * CHUNK
    tiles = strips * side * side
    tile = tl.program_id(0) % tiles
    task = tasks + (tl.program_id(0) // tiles) * 4
    cell = cells + tl.load(task) * 6
    begin = tl.load(task + 1)
    end = tl.load(task + 2)
    part = tl.load(task + 3).to(tl.int64)
    symmetric = tl.load(cell + 5)
    strip = tile // (side * side)
    i = tile // side % side
    j = tile % side
    if symmetric != 0 and i < j:
        return  # never read
    row_stride = strips.to(tl.int64) * width
    position_stride = batch * row_stride
    run = tl.load(cell + 1).to(tl.int64) * batch
    left_column = i * BLOCK + tl.arange(0, BLOCK)
    right_column = j * BLOCK + tl.arange(0, BLOCK)
    row_offset = tl.arange(0, DEPTH) * row_stride
    first = packed + (tl.load(cell) * position_stride + strip * width)
    left_first = first + (left_column[:, None] + row_offset[None, :])
    shift = tl.load(cell + 4) * position_stride
    right_first = first + shift + (row_offset[:, None] + right_column[None, :])
    left_exists = left_column[:, None] < width
    right_exists = right_column[None, :] < width
    runs_per_plane = tl.load(cell + 3)
    line_stride = size_x * position_stride
    plane_stride = size_y * line_stride
    if BIAS and symmetric != 0 and i == j:
        total, sums = _sum_rows(
            left_first, right_first, left_exists, right_exists, begin, end, run, runs_per_plane,
            line_stride, plane_stride, row_stride, BLOCK, DEPTH, FLUSH, PRODUCTS, True,
        )  # fmt: skip
        tl.store(column_sums + (part * strips + strip) * side * BLOCK + right_column, sums)
    else:
        total, sums = _sum_rows(
            left_first, right_first, left_exists, right_exists, begin, end, run, runs_per_plane,
            line_stride, plane_stride, row_stride, BLOCK, DEPTH, FLUSH, PRODUCTS, False,
        )  # fmt: skip
    entry = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partials + (part * tiles + tile) * (BLOCK * BLOCK) + entry, total)


def _pack(x: Tensor, tables: Tables, strips: Strips) -> tuple[Tensor, int]:
    """The pixels of the lines as rows ``[positions, N, strips, width]``, and that width."""
    batch, channels = x.shape[:2]
    width = strips.together * strips.width
    packed_chunk = 16 // x.element_size()
    packed_width = -(-width // packed_chunk) * packed_chunk
    positions = math.prod(tables.sizes)
    packed = x.new_empty(positions * batch * strips.strips * packed_width)
    image = launch.Image.of(x, math.gcd(width, channels))  # the last strip may be narrower
    channels_last = image.line == launch.Line.COLUMNS
    chunk = image.chunk if channels_last else 1
    blocks = -(-positions // POSITIONS) * -(-packed_width // CHANNELS)
    if packed.numel():
        pack_kernel[(blocks * strips.strips * batch,)](
            x,
            tables.lines,
            packed,
            positions,
            batch,
            channels // chunk,
            strips.strips,
            width // chunk,
            packed_width // packed_chunk,
            *tables.sizes,
            image.batch_stride // chunk,
            image.channel_stride,
            *(stride // chunk for stride in image.pixel_strides),
            POSITIONS=POSITIONS,
            CHANNELS=CHANNELS,
            CHANNELS_LAST=channels_last,
            CHUNK=chunk,
            PACKED_CHUNK=packed_chunk,
        )
    return packed, packed_width


def conv_offset_gram(
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
    """``out <- beta out + alpha`` Gram of the patches, float32 at precision ``precision``.

    Args:
        x: Input of shape ``[N, C, *spatial]``, of any strides.
        tables: The geometry's, from :func:`tables`.
        outputs: Number of output positions.
        groups: Groups of channels.
        bias: Whether the patches end with a 1.
        alpha: Weight of the sum.
        beta: Weight of ``out``.
        out: Contiguous ``[(groups,) D, D]``.
        precision: As of :func:`torch.get_float32_matmul_precision`.
    """
    if out.numel() == 0:
        return
    batch, width = len(x), x.shape[1] // groups
    products = PRODUCTS[precision] if x.dtype == torch.float32 else 1
    device = launch.device(x.get_device())
    tiling = launch.block_tiling(width, products, x.element_size(), device.capability)
    strips = Strips.of(groups, width, tiling, max(1, tiling.block // max(1, width)))
    slots = device.slots(tiling)
    with torch.cuda.device_of(x):
        packed, packed_width = _pack(x, tables, strips)
        tasks = _tasks(tables, batch, tiling, strips.tiles, slots)
        parts = Parts.empty(out, strips, tasks.starts, tasks.count, bias)
        chunk = 16 // x.element_size()
        if tasks.count:
            offset_partial_kernel[(tasks.count * strips.tiles,)](
                packed,
                tables.cell_numbers,
                tasks.numbers,
                parts.tiles,
                parts.column_sums,
                batch,
                strips.strips,
                strips.side,
                packed_width // chunk,
                *tables.sizes[1:],
                BLOCK=tiling.block,
                DEPTH=tiling.depth,
                FLUSH=tiling.flush,
                PRODUCTS=products,
                CHUNK=chunk,
                BIAS=bias,
                num_warps=tiling.warps,
                num_stages=tiling.stages,
            )
        rows = batch * outputs
        finish(parts, strips, tables.pairs, groups, rows, bias, alpha, beta, out)
