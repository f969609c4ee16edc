"""Lower triangles of tiles: their order, and the end of a symmetric sum.

Kernels that sum products of columns leave the tiles of the lower triangle in parts;
``triangle_finish_kernel`` adds the parts, applies alpha and beta, and writes the tile, its mirror
image and the bias entries.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kfac_fast.kernels import launch

# Rows of a tile that one program finishes.
SLAB = 32


@triton.jit
def triangle_row(tile):
    """Row of blocks that tile ``tile`` of a lower triangle, counted row by row, lies in."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The rounding of the square root is off by one at most.
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)


@triton.jit
def accumulate(place, value, beta, exists):
    """``out <- value + beta out``, returned; with ``beta`` 0 it does not read ``out``."""
    if beta != 0.0:
        value += beta * tl.load(place, mask=exists)
    tl.store(place, value, mask=exists)
    return value


@triton.jit(do_not_specialize=["rows", "width", "tiles", "split"])
def triangle_finish_kernel(
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
    total = accumulate(place, alpha * total, beta, lower)
    # The mirror image is copied, not computed, so that it has the same bits.
    upper = (column[:, None] <= row[None, :]) & (row[None, :] < width)
    tl.store(out + column[:, None] * edge + row[None, :], tl.trans(total), mask=upper)
    if BIAS and i == j and tl.program_id(1) == 0:
        exists = column < width
        sums = tl.zeros((BLOCK,), tl.float32)
        for part in range(split):
            first = (part * (tl.num_programs(0) // tiles) + group) * width
            sums += tl.load(column_sums + first + column, mask=exists, other=0.0)
        sums = accumulate(out + width * edge + column, alpha * sums, beta, exists)
        tl.store(out + column * edge + width, sums, mask=exists)
        if i == 0:
            count = tl.load(counted) if MASKED else rows
            accumulate(out + width * edge + width, alpha * count.to(tl.float32), beta, True)


class TriangleParts(NamedTuple):
    """Workspace for the parts of ``groups`` matrices ``[width, width]``.

    Attributes:
        tiles: float32 ``[split, groups * tiles, BLOCK, BLOCK]``.
        column_sums: float32 ``[split, groups, width]`` if there is a bias.
        groups: Number of matrices.
        width: Rows and columns of a matrix, without the bias.
        split: Number of parts.
        tiling: Their tiles.
    """

    tiles: Tensor
    column_sums: Tensor
    groups: int
    width: int
    split: int
    tiling: launch.Tiling

    @staticmethod
    def empty(
        out: Tensor,
        groups: int,
        width: int,
        steps: int,
        bias: bool,
        tiling: launch.Tiling,
        device: launch.Device,
    ) -> "TriangleParts":
        """Split ``steps`` steps so that they fill the device; beside ``out``."""
        programs = groups * tiling.tiles(width)
        size = tiling.block**2
        split = launch.choose_split(programs, steps, 4 * size, device.slots(tiling))
        tiles = out.new_empty(split * programs * size)
        sums = out.new_empty(split * groups * width if bias else 0)
        return TriangleParts(tiles, sums, groups, width, split, tiling)

    @property
    def programs(self) -> int:
        """Tiles of all matrices."""
        return self.groups * self.tiling.tiles(self.width)

    def finish(
        self,
        rows: int,
        counted: Tensor | None,
        bias: bool,
        alpha: float,
        beta: float,
        out: Tensor,
    ) -> None:
        """``out <- beta out + alpha sum of the parts``; ``counted`` in place of ``rows``."""
        triangle_finish_kernel[self.programs, self.tiling.block // SLAB](
            self.tiles,
            self.column_sums,
            self.column_sums if counted is None else counted,
            out,
            float(alpha),
            float(beta),
            rows,
            self.width,
            self.tiling.tiles(self.width),
            self.split,
            BLOCK=self.tiling.block,
            SLAB=SLAB,
            BIAS=bias,
            MASKED=counted is not None,
            num_warps=8,
        )
