"""How a Triton kernel is launched: its tiles, its walk through the rows, and their split."""

import enum
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Tensor cores round their running sum towards zero, a bias that grows with the number of sums; so
# after this many rows it is added, correctly rounded, to a second accumulator.
ROWS_PER_CHAIN = 512
# With six products each step's sum starts from zero, the smallest products first.
ROWS_PER_CHAIN_OF_SIX = 32

MAX_SPLIT = 64
MAX_WORKSPACE = 2**28  # bytes
# Estimates of what a tile costs beside its steps: steps to store it, and how many of them are read
# in the time of a step when the parts are added.
STEPS_PER_STORE = 8
READS_PER_STEP = 10


@dataclass(frozen=True)
class Tiling:
    """How the result is cut into tiles and the rows into steps.

    Attributes:
        block: Rows and columns of a tile of the result.
        depth: Rows of ``x`` that one step multiplies.
        flush: Steps until the running sum is added to the second accumulator.
        warps: Warps of a thread block.
        stages: Steps that are loaded ahead.
        resident: Thread blocks that a multiprocessor holds at once, limited by their registers.
    """

    block: int
    depth: int
    flush: int
    warps: int
    stages: int
    resident: int

    def tiles(self, width: int) -> int:
        """Tiles that cover the lower triangle of a ``[width, width]`` matrix, at least one."""
        side = max(1, -(-width // self.block))
        return side * (side + 1) // 2


class Device(NamedTuple):
    """Compute capability, as 90 for 9.0, and multiprocessors."""

    capability: int
    multiprocessors: int


# What the interpreter, which runs on CPU tensors, takes for its device.
INTERPRETED = Device(90, 4)


@functools.cache
def device(index: int) -> Device:
    """The CUDA device of an index; a negative one (a CPU tensor's) is the interpreter's."""
    if index < 0:
        return INTERPRETED
    properties = torch.cuda.get_device_properties(index)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


@functools.cache
def gram_tiling(
    width: int, products: int, element_size: int, aligned: bool, capability: int
) -> Tiling:
    """Choose the tiles of a Gram matrix.

    Args:
        width: Rows and columns of the matrix, without the bias.
        products: bfloat16 products per product: 1, 3 or 6.
        element_size: Bytes of an element of ``x``.
        aligned: Whether ``x`` can be read in chunks of 16 bytes.
        capability: Compute capability of the device, as 90 for 9.0.

    Returns:
        The largest tiles that waste little of the triangle and keep their sums in registers.
    """
    rows = ROWS_PER_CHAIN if products < 6 else ROWS_PER_CHAIN_OF_SIX
    side = -(-width // 128)
    waste = side * (side + 1) * 128**2 / max(1, width * (width + 1))
    if not aligned:
        return Tiling(64, 16, rows // 16, warps=4, stages=3, resident=2)
    if waste > 1.3:
        depth = 128 // element_size
        return Tiling(64, depth, rows // depth, warps=4, stages=3, resident=2)
    if capability < 90 or products == 6:
        depth = 64 // element_size
        return Tiling(128, depth, rows // depth, warps=8, stages=4, resident=1)
    depth = 128 // element_size
    return Tiling(128, depth, rows // depth, warps=8, stages=3, resident=1)


@functools.lru_cache(maxsize=4096)
def choose_split(tiles: int, steps: int, tile_bytes: int, slots: int) -> int:
    """Choose into how many parts the rows are cut, so that few tiles still fill the device evenly.

    Args:
        tiles: Tiles of all results.
        steps: Steps through all rows.
        tile_bytes: Bytes of a tile's partial sum.
        slots: Thread blocks that the device holds at once.

    Returns:
        The number with which the busiest slot and the addition of the parts have the least to do.
    """

    def cost(split: int) -> int:
        waves = -(-tiles * split // slots)
        return waves * (-(-steps // split) + STEPS_PER_STORE) + tiles * split // READS_PER_STEP

    limit = min(MAX_SPLIT, steps, MAX_WORKSPACE // (tiles * tile_bytes))
    return min(range(1, max(1, limit) + 1), key=cost)


class Line(enum.IntEnum):
    """Along what ``x`` is contiguous."""

    COLUMNS = 0
    ROWS = 1
    NEITHER = 2


class Rows(NamedTuple):
    """Rows ``[*, D]`` of any strides as ``[outer, inner, D]``; strides in elements.

    ``chunk`` elements can be read at once along ``line``: 16 bytes of them, or 1.
    """

    x: Tensor
    mask: Tensor | None
    outer: int
    inner: int
    outer_stride: int
    row_stride: int
    mask_outer_stride: int
    mask_row_stride: int
    line: Line
    chunk: int

    @staticmethod
    def of(x: Tensor, mask: Tensor | None, width: int) -> "Rows":
        """View ``x``, whose groups are ``width`` columns wide; a copy if it takes more strides."""
        if len(_levels(x)) > 2:
            x = x.contiguous()
        levels = _levels(x)
        mask_strides = [0] * len(levels)
        if mask is not None:
            mask = mask.permute(_by_stride(x)).reshape([size for size, _ in levels])
            mask_strides = list(mask.stride())
        walk = [(*level, step) for level, step in zip(levels, mask_strides, strict=True)]
        walk = [(1, 0, 0)] * (2 - len(walk)) + walk
        column_stride = x.stride(-1)
        # Chunks run along contiguous rows; else the longer level fills the steps better.
        walk.sort(key=lambda level: (level[1] == 1 and column_stride != 1, level[0]))
        (outer, outer_stride, mask_outer), (inner, row_stride, mask_row) = walk
        if column_stride == 1:
            line, multiples = Line.COLUMNS, (width, row_stride, outer_stride)
        elif row_stride == 1:
            line, multiples = Line.ROWS, (inner, column_stride, outer_stride)
        else:
            line, multiples = Line.NEITHER, (1,)
        chunk = 16 // x.element_size()
        aligned = x.data_ptr() % 16 == 0 and all(n % chunk == 0 for n in multiples)
        # A mask decides on each row, so it would tear chunks along them.
        if not aligned or (line == Line.ROWS and mask is not None):
            chunk = 1
        return Rows(
            x, mask, outer, inner, outer_stride, row_stride, mask_outer, mask_row, line, chunk
        )

    def steps(self, depth: int) -> int:
        """Steps of ``depth`` rows; none crosses the end of the inner level."""
        return self.outer * -(-self.inner // depth)


def _by_stride(x: Tensor) -> list[int]:
    """The leading dimensions from the longest stride: a sum may take the rows in any order."""
    return sorted(range(x.dim() - 1), key=lambda i: -x.stride(i))


def _levels(x: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the leading dimensions, those that together step evenly merged."""
    merged: list[tuple[int, int]] = []
    for i in _by_stride(x):
        size, stride = x.shape[i], x.stride(i)
        if size == 0:
            return [(0, 0)]
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        elif size > 1:
            merged.append((size, stride))
    return merged
