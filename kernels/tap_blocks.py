"""From products of channels to the Gram of patches: each pair of taps adds up its block.

A *cell* is a sum of products ``left right^T`` of channels over some rows. The channels lie in
*strips*: a group, or as many narrow groups as fill a tile. The kernels before these two leave a
cell's sum as tiles ``[strips, side, side, BLOCK, BLOCK]``, in parts; ``add_parts_kernel`` adds the
parts. ``tap_finish_kernel`` adds the cells of each pair of taps, some of them transposed, applies
alpha and beta and writes the lower triangle, its mirror image and the bias entries.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kfac_fast.kernels.launch import Tiling
from kfac_fast.kernels.triangle import accumulate, triangle_row

# Entries of a tile whose parts one program adds.
ENTRIES = 1024
# The result's tiles, and the rows of one that one program finishes.
EDGE = 64
SLAB = 16


class Strips(NamedTuple):
    """How the channels lie in tiles.

    Attributes:
        block: Rows and columns of a tile.
        width: Channels of a group.
        together: Groups in a strip.
        strips: Strips that hold all groups.
        side: Tiles along a strip.
    """

    block: int
    width: int
    together: int
    strips: int
    side: int

    @staticmethod
    def of(groups: int, width: int, tiling: Tiling, together: int = 1) -> "Strips":
        """Lay out ``groups`` of ``width`` channels, up to ``together`` of them in a strip."""
        together = min(together, groups)
        side = tiling.side(width * together)
        return Strips(tiling.block, width, together, -(-groups // together), side)

    @property
    def tiles(self) -> int:
        """Tiles of a cell."""
        return self.strips * self.side**2

    @property
    def columns(self) -> int:
        """Columns of all strips, each filled up to whole tiles."""
        return self.strips * self.side * self.block


class Pairs(NamedTuple):
    """The cells of each pair of taps.

    Attributes:
        runs: int32 ``[taps * taps, 3]``: the first of its members, their number, and 1 if the block
            is the transpose of their sum. The cells of a tap with itself are symmetric and have
            column sums.
        members: int32, cells.
        most: The largest number of members.
        taps: Number of taps.
    """

    runs: Tensor
    members: Tensor
    most: int
    taps: int


class Parts(NamedTuple):
    """Sums of the cells, in parts.

    Attributes:
        tiles: float32 ``[parts, tiles, BLOCK, BLOCK]``; above the diagonal of symmetric cells the
            tiles may hold anything.
        column_sums: float32 ``[parts, columns]`` if there is a bias; only of symmetric cells.
        starts: int32 ``[cells + 1]``, the first part of each cell, and their number.
        count: Their number.
    """

    tiles: Tensor
    column_sums: Tensor
    starts: Tensor
    count: int

    @staticmethod
    def empty(out: Tensor, strips: Strips, starts: Tensor, count: int, bias: bool) -> "Parts":
        """Workspace beside ``out``."""
        tiles = out.new_empty(count * strips.tiles * strips.block**2)
        column_sums = out.new_empty(count * strips.columns if bias else 0)
        return Parts(tiles, column_sums, starts, count)


@triton.jit(do_not_specialize=["tiles", "column_blocks"])
def add_parts_kernel(
    partials, partial_columns, starts, sums, column_sums, tiles, column_blocks,
    BLOCK: tl.constexpr, ENTRIES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Add the parts of each cell in order; grid (cells * tiles, BLOCK * BLOCK / ENTRIES)."""
    program = tl.program_id(0).to(tl.int64)
    cell = program // tiles
    tile = program % tiles
    begin = tl.load(starts + cell)
    end = tl.load(starts + cell + 1)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    total = tl.zeros((ENTRIES,), tl.float32)
    for part in range(begin, end):
        total += tl.load(partials + (part * tiles + tile) * (BLOCK * BLOCK) + entry)
    tl.store(sums + program * (BLOCK * BLOCK) + entry, total)
    if BIAS and tl.program_id(1) == 0 and tile < column_blocks:
        column = tile * BLOCK + tl.arange(0, BLOCK)
        column_total = tl.zeros((BLOCK,), tl.float32)
        for part in range(begin, end):
            first = column_blocks.to(tl.int64) * part * BLOCK
            column_total += tl.load(partial_columns + first + column)
        tl.store(column_sums + cell * column_blocks * BLOCK + column, column_total)


@triton.jit
def _place(left, right, side, BLOCK: tl.constexpr):
    """Where the tiles of a strip hold the product of two channels."""
    tile = (left // BLOCK) * side + right // BLOCK
    return (tile.to(tl.int64) * BLOCK + left % BLOCK) * BLOCK + right % BLOCK


@triton.jit
def _sum_members(first, cell_stride, members, start, count, most):
    """Sums of what ``first`` points to over cells: ``count`` members from ``start`` on."""
    total = tl.zeros(count.shape, tl.float32)
    for t in range(most):
        exists = t < count
        cell = tl.load(members + start + t, mask=exists, other=0)
        total += tl.load(first + cell * cell_stride, mask=exists, other=0.0)
    return total


@triton.jit(
    do_not_specialize=["rows", "width", "taps", "most", "together", "strips", "side", "tiles"]
)
def tap_finish_kernel(
    sums, column_sums, runs, members, out, alpha, beta, rows, width, taps, most, together, strips,
    side, tiles,
    BLOCK: tl.constexpr, EDGE: tl.constexpr, SLAB: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Finish a tile of ``out``; grid (groups * tiles, EDGE / SLAB).

    Entries are ordered (channel, tap). Neighbours along a row of ``out`` come from the cells of
    different taps, which reads short runs of many tiles so that whole rows are written.
    """
    program = tl.program_id(0).to(tl.int64)
    group = (program // tiles).to(tl.int32)
    tile = (program % tiles).to(tl.int32)
    i = triangle_row(tile)
    j = tile - i * (i + 1) // 2
    row = i * EDGE + tl.program_id(1) * SLAB + tl.arange(0, SLAB)
    column = j * EDGE + tl.arange(0, EDGE)
    features = width * taps
    first_channel = (group % together) * width
    left = (first_channel + row // taps)[:, None]
    right = (first_channel + column // taps)[None, :]
    lower = (row[:, None] >= column[None, :]) & (row[:, None] < features)
    run = runs + ((row % taps)[:, None] * taps + (column % taps)[None, :]) * 3
    start = tl.load(run, mask=lower, other=0)
    count = tl.load(run + 1, mask=lower, other=0)
    transposed = tl.load(run + 2, mask=lower, other=0)
    straight = _place(left, right, side, BLOCK)
    place = tl.where(transposed != 0, _place(right, left, side, BLOCK), straight)
    strip_size = side.to(tl.int64) * side * (BLOCK * BLOCK)
    strip = group // together
    first = sums + strip * strip_size + place
    total = _sum_members(first, strips * strip_size, members, start, count, most)
    edge = (features + 1 if BIAS else features).to(tl.int64)
    out += group * edge * edge
    entry = row.to(tl.int64)[:, None] * edge + column[None, :]
    total = accumulate(out + entry, alpha * total, beta, lower)
    # The mirror image is copied, not computed, so that it has the same bits.
    upper = (column[:, None] <= row[None, :]) & (row[None, :] < features)
    entry = column.to(tl.int64)[:, None] * edge + row[None, :]
    tl.store(out + entry, tl.trans(total), mask=upper)
    if BIAS and i == j and tl.program_id(1) == 0:
        exists = column < features
        own_run = runs + (column % taps) * (taps + 1) * 3
        own_start = tl.load(own_run, mask=exists, other=0)
        own_count = tl.load(own_run + 1, mask=exists, other=0)
        strip_width = side.to(tl.int64) * BLOCK
        own_first = column_sums + (strip * strip_width + first_channel + column // taps)
        own_sums = _sum_members(
            own_first, strips * strip_width, members, own_start, own_count, most
        )  # fmt: skip
        own_sums = accumulate(out + features * edge + column, alpha * own_sums, beta, exists)
        tl.store(out + column * edge + features, own_sums, mask=exists)
        if i == 0:
            accumulate(out + features * edge + features, alpha * rows.to(tl.float32), beta, True)


def _add_parts(parts: Parts, strips: Strips, bias: bool) -> tuple[Tensor, Tensor]:
    """The cells' sums and column sums; the parts themselves if every cell has one."""
    cells = len(parts.starts) - 1
    if parts.count == cells:
        return parts.tiles, parts.column_sums
    sums = Parts.empty(parts.tiles, strips, parts.starts, cells, bias)
    add_parts_kernel[cells * strips.tiles, strips.block**2 // ENTRIES](
        parts.tiles,
        parts.column_sums,
        parts.starts,
        sums.tiles,
        sums.column_sums,
        strips.tiles,
        strips.strips * strips.side,
        BLOCK=strips.block,
        ENTRIES=ENTRIES,
        BIAS=bias,
    )
    return sums.tiles, sums.column_sums


def finish(
    parts: Parts,
    strips: Strips,
    pairs: Pairs,
    groups: int,
    rows: int,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
) -> None:
    """``out <- beta out + alpha`` Gram of ``rows`` patches, from the cells' sums."""
    sums, column_sums = _add_parts(parts, strips, bias)
    side = max(1, -(-strips.width * pairs.taps // EDGE))
    tiles = side * (side + 1) // 2
    tap_finish_kernel[groups * tiles, EDGE // SLAB](
        sums,
        column_sums,
        pairs.runs,
        pairs.members,
        out,
        float(alpha),
        float(beta),
        rows,
        strips.width,
        pairs.taps,
        pairs.most,
        strips.together,
        strips.strips,
        strips.side,
        tiles,
        BLOCK=strips.block,
        EDGE=EDGE,
        SLAB=SLAB,
        BIAS=bias,
    )
