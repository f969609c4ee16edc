"""The kernels of convolutions: which one forms a factor under expand, and the plan that each takes.

Kernels know no geometry. They receive what :class:`kfac_fast.conv.Axis` derives from it, as plain
integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from kfac_fast.conv import Axis, ConvGeometry


def _offset_plan(axes: Sequence[Axis]) -> Iterator[int]:
    """Output positions, then of each axis its line, shifts and pairs."""
    yield math.prod(axis.outputs for axis in axes)
    for axis in axes:
        plan = axis.offsets()
        yield from (len(plan.line), axis.taps, len(plan.shifts))
        yield from plan.line
        for shift in plan.shifts:
            yield from (shift.distance, shift.mirror, len(shift.cells))
            yield from chain.from_iterable(shift.cells)
        yield from chain.from_iterable(plan.pairs)


def _patch_plan(axes: Sequence[Axis]) -> Iterator[int]:
    """What every tap of each axis reads at every output position."""
    for axis in axes:
        yield from (axis.taps, axis.outputs)
        for tap in range(axis.taps):
            yield from axis.reads(tap)


def _sum_plan(axes: Sequence[Axis]) -> Iterator[int]:
    """Output positions, then of each axis its cells and weights."""
    yield math.prod(axis.outputs for axis in axes)
    for axis in axes:
        plan = axis.sums()
        yield from (axis.size, axis.taps, len(plan.weights[0]))
        yield from plan.cells
        yield from chain.from_iterable(plan.weights)


_PLANS: dict[str, Callable[[Sequence[Axis]], Iterator[int]]] = {
    "conv_offset_gram": _offset_plan,
    "conv_patch_gram": _patch_plan,
    "conv_reduce_gram": _sum_plan,
    "conv_window_sum": _sum_plan,
}


@lru_cache(maxsize=256)
def plan(kernel: str, geometry: ConvGeometry, size: tuple[int, ...]) -> Tensor:
    """The plan that a compiled kernel takes.

    Args:
        kernel: Name of the kernel.
        geometry: The convolution.
        size: Spatial size of its input.

    Returns:
        The plan as int64 numbers, one axis after the other.
    """
    return torch.tensor([*_PLANS[kernel](geometry.axes(size))])


# Which way to a factor under expand


@lru_cache(maxsize=1024)
def expand_kernel(geometry: ConvGeometry, shape: tuple[int, ...], item: int) -> str:
    """The kernel that is to form the Gram of all patches of an input ``[N, C, *spatial]``.

    Args:
        geometry: The convolution.
        shape: The input's shape.
        item: Bytes of one of its elements.

    Returns:
        ``"conv_offset_gram"`` or ``"conv_patch_gram"``, by the model below.
    """
    return min(EXPAND_KERNELS, key=lambda kernel: _cost(kernel, geometry, shape, item))


EXPAND_KERNELS = {
    "conv_offset_gram": "offset correlation",
    "conv_patch_gram": "patches read from the input",
}
# The model counts vector multiply-adds of a processor with 16 lanes; the work of all else is fitted
# to measured times. A product of one row also loads it.
LANES = 16
LOADS_A_ROW = 3
# The offset kernel copies the pixels into whole vectors, and gathers vectors of the sums of all
# cells of all windows.
WORK_A_PACKED_ENTRY = 5.5
WORK_A_GATHERED_SUM = 25.0
# The patch kernel gathers every entry of every patch from the input.
WORK_A_GATHERED_ENTRY = 4.5
# Bytes that the offset kernel may take whatever the size of the input.
ALWAYS_ALLOWED = 3 * 2**18
# The offset kernel keeps the sums of all cells of a tile, and a list of the cells of all windows.
MOST_SUMS = 2**22
MOST_CELLS_OF_WINDOWS = 2**17


def _strips(width: int, groups: int, lanes: int = LANES) -> tuple[int, int]:
    """Strips of columns that are multiplied by themselves, and their width; narrow groups join."""
    together = min(max(1, lanes // width), groups) if width else 1
    return -(-groups // together), width * together


def _fits(
    geometry: ConvGeometry,
    shape: tuple[int, ...],
    item: int,
    pixels: int,
    cells: int,
    tables: int,
) -> bool:
    """Whether the offset kernel can do with 1.5 times the input's memory and the result's."""
    # It packs all examples at once and keeps the sums of a tile, or one example and those of all
    # tiles: see choose_chunks in csrc/cpu/offset_gram.h.
    batch, channels = shape[:2]
    number, groups = max(item, 4), geometry.groups
    result = number * groups * geometry.features(channels) ** 2
    budget = ALWAYS_ALLOWED + 1.5 * item * math.prod(shape) + result - tables
    for lanes in (4, 8, 16):  # of any processor: a geometry has one way everywhere
        strips, width = _strips(channels // groups, groups, lanes)
        panels = max(-(-width // (3 * lanes)), 1)
        edge = -(-width // (panels * lanes)) * lanes
        packed = pixels * strips * panels * edge
        sums = cells * edge * (1 if groups == channels else edge)
        tiles = strips * panels * (panels + 1) // 2
        if number * min(batch * packed + sums, packed + tiles * sums) > budget:
            return False
    return True


def _cost(kernel: str, geometry: ConvGeometry, shape: tuple[int, ...], item: int) -> float:
    batch, channels, *size = shape
    axes = geometry.axes(size)
    if kernel == "conv_patch_gram":
        strips, width = _strips(geometry.features(channels), geometry.groups)
        patches = batch * math.prod(axis.outputs for axis in axes)
        products = strips * width * -(-width // LANES) / 2
        return patches * (products + WORK_A_GATHERED_ENTRY * strips * width)
    depthwise = geometry.groups == channels
    strips, width = _strips(channels // geometry.groups, geometry.groups)
    vectors = -(-width // LANES)
    rows, cells, cells_of_windows, pixels, lines = 1, 1, 1, 1, 1
    for axis in axes:
        lines = rows
        offsets = axis.offsets()
        pixels *= len(offsets.line)
        lengths = [length for shift in offsets.shifts for _, length in shift.cells]
        cells *= len(lengths)
        rows *= sum(lengths)
        cells_of_windows *= sum(last - first for _, first, last in offsets.pairs)
    edge = min(vectors, 3) * LANES
    sums = cells * edge * (1 if depthwise else edge)
    if sums > MOST_SUMS or cells_of_windows > MOST_CELLS_OF_WINDOWS:
        return math.inf
    # Of pixels, windows, and lines of pixels with others.
    tables = 8 * (pixels + cells_of_windows + math.prod(geometry.kernel_size) ** 2) + 32 * lines
    if not _fits(geometry, shape, item, pixels, cells, tables):
        return math.inf
    packed = pixels * strips * vectors * LANES
    # Products of a channel with all of its strip, or with itself; of the sums the lower triangle.
    products = (1 if depthwise else width) + LOADS_A_ROW
    gathered = strips if depthwise else channels * (vectors + 1) / 2
    return (
        batch * rows * strips * products * vectors / 2
        + WORK_A_PACKED_ENTRY * batch * packed
        + WORK_A_GATHERED_SUM * cells_of_windows * gathered
    )
