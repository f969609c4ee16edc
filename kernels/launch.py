"""How a Triton kernel is launched: its tiles, its walk through the input, and how that is split."""

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

# Tensor cores round their running sum towards zero, a bias that grows with the number of sums; so
# after this many rows it is added, correctly rounded, to a second accumulator.
ROWS_PER_CHAIN = 512
# With six products each step's sum starts from zero, the smallest products first.
ROWS_PER_CHAIN_OF_SIX = 32

# Kernels that only add start a new sum after so many steps: errors grow with the chain of sums.
STEPS_PER_SUM = 64

MAX_SPLIT = 64
MAX_WORKSPACE = 2**28  # bytes
# Estimates of what a tile costs beside its steps: steps to store it, and how many of them are read
# in the time of a step when the parts are added.
STEPS_PER_STORE = 8
READS_PER_STEP = 10
# Thread blocks of a kernel that only adds, for each multiprocessor: enough loads are under way.
ADDING_BLOCKS = 8
# What one of them reads at once: enough 16-byte loads for each thread, long runs of what is
# contiguous, and few rows beyond the end.
ENTRIES_ADDED = 2048
ROWS_ADDED_AT_LEAST, ROWS_ADDED, MOST_ROWS_ADDED = 8, 16, 64


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

    def side(self, width: int) -> int:
        """Tiles that cover ``width`` columns, at least one."""
        return max(1, -(-width // self.block))

    def tiles(self, width: int) -> int:
        """Tiles that cover the lower triangle of a ``[width, width]`` matrix, at least one."""
        side = self.side(width)
        return side * (side + 1) // 2


class Device(NamedTuple):
    """Compute capability, as 90 for 9.0, and multiprocessors."""

    capability: int
    multiprocessors: int

    def slots(self, tiling: Tiling) -> int:
        """Thread blocks that it holds at once."""
        return self.multiprocessors * tiling.resident


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
    if not aligned:
        return product_tiling(products)
    side = -(-width // 128)
    waste = side * (side + 1) * 128**2 / max(1, width * (width + 1))
    return _aligned_tiling(64 if waste > 1.3 else 128, products, element_size, capability)


@functools.cache
def block_tiling(width: int, products: int, element_size: int, capability: int) -> Tiling:
    """Choose the tiles of products of ``width`` columns with as many others; see `gram_tiling`."""
    if width <= 32:
        depth = 128 // element_size
        flush = max(1, _rows_per_chain(products) // depth)
        return Tiling(32, depth, flush, warps=4, stages=3, resident=4)
    narrow, wide = (-(-width // block) * block for block in (64, 128))
    block = 128 if wide**2 <= 1.3 * narrow**2 else 64
    return _aligned_tiling(block, products, element_size, capability)


def product_tiling(products: int) -> Tiling:
    """Choose the tiles of products of any sizes, whose operands need not be read in chunks."""
    return Tiling(64, 16, _rows_per_chain(products) // 16, warps=4, stages=3, resident=2)


def _rows_per_chain(products: int) -> int:
    return ROWS_PER_CHAIN if products < 6 else ROWS_PER_CHAIN_OF_SIX


def _aligned_tiling(block: int, products: int, element_size: int, capability: int) -> Tiling:
    """Tiles of 64 or 128 whose operands are read 16 bytes at once."""
    rows = _rows_per_chain(products)
    if block == 64:
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


def choose_part(steps: tuple[int, ...], tiles: int, tile_bytes: int, slots: int) -> int:
    """Choose how long the parts are into which sums of different lengths are cut.

    Args:
        steps: Steps of each sum.
        tiles: Tiles of each sum.
        tile_bytes: Bytes of a tile's partial sum.
        slots: Thread blocks that the device holds at once.

    Returns:
        The most steps of a part with which the busiest slot, which may start one part too many, and
        the addition of the parts have the least to do.
    """
    longest = max(steps, default=0)

    def parts(length: int) -> int:
        return tiles * sum(-(-n // length) for n in steps)

    def cost(length: int) -> int:
        work = tiles * sum(steps) + parts(length) * STEPS_PER_STORE
        return work // slots + length + STEPS_PER_STORE + parts(length) // READS_PER_STEP

    whole = max(1, longest)
    lengths = {-(-whole // split) for split in range(1, MAX_SPLIT + 1)}
    small = [n for n in lengths if parts(n) * tile_bytes <= MAX_WORKSPACE]
    return min(small or [whole], key=cost)


class AddingBlock(NamedTuple):
    """Rows and columns that a program of a kernel that only adds reads at once."""

    rows: int
    columns: int


@functools.cache
def adding_block(rows: int, columns: int, line: "Line") -> AddingBlock:
    """Choose what is read at once of so many rows and columns, contiguous along ``line``."""
    longest = MOST_ROWS_ADDED if line == Line.ROWS else ROWS_ADDED
    height = min(longest, max(ROWS_ADDED_AT_LEAST, triton.next_power_of_2(rows)))
    width = min(ENTRIES_ADDED // height, triton.next_power_of_2(max(1, columns)))
    return AddingBlock(height, width)


def choose_adding_split(programs: int, steps: int, multiprocessors: int) -> int:
    """Choose into how many parts rows are cut that are only added, so that they fill the device."""
    wanted = -(-ADDING_BLOCKS * multiprocessors // max(1, programs))
    return max(1, min(MAX_SPLIT, steps, wanted))


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
        if len(levels(x)) > 2:
            x = x.contiguous()
        merged = levels(x)
        mask_strides = [0] * len(merged)
        if mask is not None:
            mask = mask.permute(by_stride(x)).reshape([size for size, _ in merged])
            mask_strides = list(mask.stride())
        walk = [(*level, step) for level, step in zip(merged, mask_strides, strict=True)]
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
        # A mask decides on each row, so it would tear chunks along them.
        torn = line == Line.ROWS and mask is not None
        chunk = 1 if torn else chunk_of(x, multiples)
        return Rows(
            x, mask, outer, inner, outer_stride, row_stride, mask_outer, mask_row, line, chunk
        )

    def steps(self, depth: int) -> int:
        """Steps of ``depth`` rows; none crosses the end of the inner level."""
        return self.outer * -(-self.inner // depth)


def by_stride(x: Tensor) -> list[int]:
    """The leading dimensions from the longest stride: a sum may take the rows in any order."""
    return sorted(range(x.dim() - 1), key=lambda i: -x.stride(i))


def levels(x: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the leading dimensions, those that together step evenly merged."""
    merged: list[tuple[int, int]] = []
    for i in by_stride(x):
        size, stride = x.shape[i], x.stride(i)
        if size == 0:
            return [(0, 0)]
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        elif size > 1:
            merged.append((size, stride))
    return merged


class Image(NamedTuple):
    """An input ``[N, C, *spatial]`` of any strides with three spatial dimensions; in elements.

    ``chunk`` elements can be read at once along ``line``, channels (COLUMNS) or the pixels of the
    last dimension (ROWS): 16 bytes of them, or 1.
    """

    sizes: tuple[int, int, int]
    batch_stride: int
    channel_stride: int
    pixel_strides: tuple[int, int, int]
    line: Line
    chunk: int

    @staticmethod
    def of(x: Tensor, width: int) -> "Image":
        """View ``x``, of which ``width`` channels are read together."""
        missing = 5 - x.dim()
        z, y, x_stride = (0,) * missing + x.stride()[2:]
        batch, channel = x.stride()[:2]
        sizes = (1,) * missing + tuple(x.shape[2:])
        if channel == 1:
            line, multiples = Line.COLUMNS, (width, batch, z, y, x_stride)
        elif x_stride == 1:
            line, multiples = Line.ROWS, (sizes[2], batch, channel, z, y)
        else:
            line, multiples = Line.NEITHER, (1,)
        chunk = chunk_of(x, multiples)
        return Image(sizes, batch, channel, (z, y, x_stride), line, chunk)


def chunk_of(x: Tensor, multiples: Sequence[int]) -> int:
    """Elements of 16 bytes if they divide all of ``multiples`` and ``x`` starts at one, else 1."""
    chunk = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(n % chunk == 0 for n in multiples)
    return chunk if aligned else 1


def refusal(x: Tensor) -> str | None:
    """Say why no Triton kernel can serve ``x``, or None."""
    if x.dtype == torch.float64:
        return "x is float64, which the Triton kernel's float32 sums and products do not make up"
    capability = device(x.get_device()).capability
    if capability < 80:
        return f"the Triton kernel needs compute capability 8.0 or newer, got {capability / 10}"
    return None
