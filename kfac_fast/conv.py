"""Convolution geometry: which input pixels the kernel reads at each output position, and plans.

Every convolution here is reduced to one picture. The input is first *framed*: padded in its padding
mode, or, for a transposed convolution, stuffed with zeros between its pixels and then padded. A
window of ``kernel_size`` taps, ``dilation`` apart, moves over the framed input in steps of
``window_stride``; the values under it are the *patch* ``a[n, s]`` of output position ``s``, ordered
``(channel, kernel index...)`` as in :func:`torch.nn.functional.unfold`.

Everything separates over the dimensions, so a plan is a list of plans of one :class:`Axis` each.
What they say is derived in ``docs/math.md``, section 3; every implementation follows the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _per_dimension(
    op: str, argument: str, value: int | Sequence[int], dimensions: int
) -> list[int]:
    """One integer per spatial dimension, from an integer or a sequence."""
    values = list(value) if isinstance(value, Sequence) else [value] * dimensions
    if len(values) != dimensions or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{op}: {argument} must be an int or {dimensions} ints, got {value!r}")
    return values


def _padding_pairs(
    op: str,
    padding: str | int | Sequence[int],
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
) -> list[int]:
    """Padding as (before, after) for each dimension; ``'same'`` puts the odd pixel after."""
    if padding == "valid":
        return [0] * (2 * len(kernel_size))
    if padding == "same":
        if any(s != 1 for s in stride):
            raise ValueError(f"{op}: padding='same' needs stride 1, got {tuple(stride)}")
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        return [side for total in totals for side in (total // 2, total - total // 2)]
    if isinstance(padding, str):
        raise ValueError(f"{op}: padding must be 'same', 'valid', an int or ints, got {padding!r}")
    dimensions = len(kernel_size)
    if isinstance(padding, Sequence) and len(padding) == 2 * dimensions:
        sides: Sequence[int] = padding  # type: ignore[assignment]  # no str comes here
        return _per_dimension(op, "padding", sides, 2 * dimensions)
    return [p for p in _per_dimension(op, "padding", padding, dimensions) for _ in range(2)]


@dataclass(frozen=True)
class ConvGeometry:
    """The geometry of a convolution over ``len(kernel_size)`` spatial dimensions.

    ``padding`` holds (before, after) for each dimension, flattened, so that uneven padding has one
    form everywhere.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    padding_mode: str
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]

    @classmethod
    def normalize(
        cls,
        op: str,
        dimensions: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        padding_mode: str = "zeros",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
    ) -> ConvGeometry:
        """The geometry from arguments as in :mod:`torch.nn.functional`; errors name ``op``.

        Args:
            op: Name of the operator, for errors.
            dimensions: Number of spatial dimensions.
            kernel_size: Taps.
            stride: Step.
            padding: Pixels on both sides, or before and after each dimension in turn; or
                ``"valid"`` or ``"same"``.
            padding_mode: One of :data:`PADDING_MODES`.
            dilation: Distance between the taps.
            groups: Groups of channels.
            transposed: Whether the convolution is transposed.
            output_padding: Extra output positions of a transposed convolution.

        Returns:
            The geometry, one number for each dimension, two for the padding.

        Raises:
            ValueError: If an argument has the wrong number of values, or ``padding`` is an unknown
                or impossible string.
        """
        kernel = _per_dimension(op, "kernel_size", kernel_size, dimensions)
        steps = _per_dimension(op, "stride", stride, dimensions)
        spread = _per_dimension(op, "dilation", dilation, dimensions)
        if transposed and isinstance(padding, str):
            raise ValueError(f"{op}: padding must be an int or ints if transposed, got {padding!r}")
        return cls(
            tuple(kernel),
            tuple(steps),
            tuple(_padding_pairs(op, padding, kernel, steps, spread)),
            padding_mode,
            tuple(spread),
            groups,
            transposed,
            tuple(_per_dimension(op, "output_padding", output_padding, dimensions)),
        )

    @staticmethod
    def from_arguments(
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        padding_mode: str,
        dilation: Sequence[int],
        groups: int,
        transposed: bool,
        output_padding: Sequence[int],
    ) -> ConvGeometry:
        """The geometry from an operator's arguments, the inverse of :meth:`arguments`."""
        sizes = (tuple(kernel_size), tuple(stride), tuple(padding))
        make = ConvGeometry if torch.compiler.is_compiling() else _kept_geometry
        return make(
            *sizes, padding_mode, tuple(dilation), groups, transposed, tuple(output_padding)
        )

    def arguments(self) -> tuple[object, ...]:
        """The geometry as plain tuples and scalars, in the order of the operators' schemas."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def dimensions(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel_size)

    @property
    def window_stride(self) -> tuple[int, ...]:
        """Step of the window over the framed input; 1 if transposed."""
        return (1,) * self.dimensions if self.transposed else self.stride

    def frame(self) -> tuple[tuple[int, int], ...]:
        """Pixels added (negative: cropped) before and after each dimension, after zero-stuffing."""
        before, after = self.padding[::2], self.padding[1::2]
        if not self.transposed:
            return tuple(zip(before, after, strict=True))
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return tuple(
            (r - b, r - a + extra)
            for r, b, a, extra in zip(reach, before, after, self.output_padding, strict=True)
        )

    def framed_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the framed input."""
        stuffed = [
            (n - 1) * s + 1 if self.transposed else n
            for n, s in zip(size, self.stride, strict=True)
        ]
        return tuple(
            n + before + after for n, (before, after) in zip(stuffed, self.frame(), strict=True)
        )

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output; below 1 if the kernel does not fit."""
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return tuple(
            (n - span) // step + 1
            for n, span, step in zip(self.framed_size(size), spans, self.window_stride, strict=True)
        )

    def features(self, channels: int) -> int:
        """Length of one group's patch, the bias entry not counted."""
        return channels // self.groups * math.prod(self.kernel_size)

    def frame_input(self, x: Tensor) -> Tensor:
        """The framed input.

        Args:
            x: Input of shape ``[N, C, *spatial]``.

        Returns:
            Tensor of shape ``[N, C, *framed_size(spatial)]``; ``x`` itself where nothing is added.
        """
        size = x.shape[2:]
        if self.transposed:
            sizes = zip(size, self.stride, strict=True)
            stuffed = x.new_zeros(*x.shape[:2], *((n - 1) * step + 1 for n, step in sizes))
            spread = (slice(None), slice(None), *(slice(None, None, step) for step in self.stride))
            stuffed[spread] = x
            x = stuffed
        pads = [side for before_after in reversed(self.frame()) for side in before_after]
        if not any(pads):
            return x
        if x.numel() == 0:  # of which PyTorch pads none in the other modes
            return x.new_zeros(*x.shape[:2], *self.framed_size(size))
        if self.transposed:  # one side may crop what the other pads
            x = F.pad(x, [max(pad, 0) for pad in pads])
            return F.pad(x, [min(pad, 0) for pad in pads])
        return F.pad(
            x, pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode
        )

    def windows(self, x: Tensor) -> Tensor:
        """Every patch, in a view of the framed input.

        Args:
            x: Input of shape ``[N, C, *spatial]``.

        Returns:
            Tensor of shape ``[N, C, *kernel, *output]``, whose windows overlap in memory.
        """
        framed = self.frame_input(x).contiguous()
        batch, channel, *pixel = framed.stride()
        taps = [step * spread for step, spread in zip(pixel, self.dilation, strict=True)]
        moves = [step * move for step, move in zip(pixel, self.window_stride, strict=True)]
        shape = (*framed.shape[:2], *self.kernel_size, *self.output_size(x.shape[2:]))
        return framed.as_strided(shape, (batch, channel, *taps, *moves))

    @cached_property
    def _hash(self) -> int:
        return hash(self.arguments())

    def __hash__(self) -> int:
        """The hash of all fields, kept: every call looks its plan up by the geometry."""
        return self._hash

    def axes(self, size: Sequence[int]) -> tuple[Axis, ...]:
        """The spatial dimensions, over an input of this spatial size."""
        return tuple(
            Axis(n, taps, spread, step, apart, before, outputs, self.padding_mode)
            for n, taps, spread, step, apart, (before, _), outputs in zip(
                size,
                self.kernel_size,
                self.dilation,
                self.window_stride,
                self.stride if self.transposed else (1,) * self.dimensions,
                self.frame(),
                self.output_size(size),
                strict=True,
            )
        )


# Every call of an operator asks for its geometry several times. The compiler traces no caches.
_kept_geometry = lru_cache(maxsize=1024)(ConvGeometry)


# Plans


class Shift(NamedTuple):
    """Pairs of taps that lie the same distance apart in the line of an axis.

    Attributes:
        distance: Position in the line of what the second tap reads, less that of the first.
        mirror: Index of the shift by ``-distance``: the same pairs with their taps exchanged.
        cells: (first position, length) of disjoint stretches of the line. What a pair's first tap
            reads where both taps read pixels is a run of them.
    """

    distance: int
    mirror: int
    cells: tuple[tuple[int, int], ...]


class OffsetPlan(NamedTuple):
    """Which products of an axis' line with its shifted self make up the products of all taps.

    Attributes:
        line: The input pixel at each position of the line. The pixels that one tap reads, one
            output position after the other, lie side by side in it.
        shifts: The distinct distances of two taps.
        pairs: For each pair of taps in order, (shift, first cell, one after the last cell); an
            empty run where they never both read a pixel.
    """

    line: tuple[int, ...]
    shifts: tuple[Shift, ...]
    pairs: tuple[tuple[int, int, int], ...]


class SumPlan(NamedTuple):
    """Which pixels of an axis enter which window sum.

    Attributes:
        cells: For each pixel the cell it belongs to, -1 if no tap reads it.
        weights: For each tap and each cell, how often the tap reads each of the cell's pixels.
    """

    cells: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a convolution: tap ``k`` reads position ``stride o + dilation k``.

    Attributes:
        size: Pixels of the input.
        taps: Taps of the kernel.
        dilation: Distance between the taps.
        stride: Step of the window over the framed input.
        spread: Distance of the pixels in the framed input; above 1 in transposed convolutions.
        before: Positions of the framed input before the first pixel; negative if cropped.
        outputs: Output positions.
        padding_mode: One of :data:`PADDING_MODES`.
    """

    size: int
    taps: int
    dilation: int
    stride: int
    spread: int
    before: int
    outputs: int
    padding_mode: str

    def pixel(self, framed: int) -> int:
        """The input pixel at a position of the framed input; -1 for a zero."""
        position, last = framed - self.before, self.size - 1
        if self.padding_mode == "circular":
            return position % self.size
        if self.padding_mode == "replicate":
            return min(max(position, 0), last)
        if self.padding_mode == "reflect":
            return last - abs(last - abs(position))
        pixel, between = divmod(position, self.spread)
        return pixel if 0 <= pixel <= last and not between else -1

    def reads(self, tap: int) -> tuple[int, ...]:
        """The pixel that a tap reads at each output position; -1 for a zero."""
        first = self.dilation * tap
        last = first + self.stride * (self.outputs - 1)
        return tuple(self.pixel(f) for f in range(first, last + 1, self.stride))

    @lru_cache(maxsize=256)  # noqa: B019 - an axis is a small value
    def sums(self) -> SumPlan:
        """Pixels that the same taps read equally often make a cell."""
        counts = [[0] * self.size for _ in range(self.taps)]
        for tap, count in enumerate(counts):
            for pixel in self.reads(tap):
                if pixel >= 0:
                    count[pixel] += 1
        by_pixel = list(zip(*counts, strict=True))
        distinct = list(dict.fromkeys(signature for signature in by_pixel if any(signature)))
        index = {signature: cell for cell, signature in enumerate(distinct)}
        weights = tuple(zip(*distinct, strict=True)) if distinct else ((),) * self.taps
        return SumPlan(tuple(index.get(signature, -1) for signature in by_pixel), weights)

    def _hits(self, tap: int) -> range:
        """The output positions at which a tap reads a pixel."""
        if self.padding_mode != "zeros":
            return range(self.outputs)
        # The tap reads the pixel at (stride o + ahead) / spread, of which stride or spread is 1.
        ahead = self.dilation * tap - self.before
        last = (self.size - 1) * self.spread
        low = max(0, -(ahead // self.stride))
        low += -(low + ahead) % self.spread
        return range(low, min(self.outputs, (last - ahead) // self.stride + 1), self.spread)

    @lru_cache(maxsize=256)  # noqa: B019 - an axis is a small value
    def offsets(self) -> OffsetPlan:
        """Pairs of taps at the same distance share their products; see ``docs/math.md``."""
        line: list[int] = []
        starts: dict[int, int] = {}  # by phase, where in the line the framed position 0 would be
        step = self.stride * self.spread
        for phase in dict.fromkeys(tap * self.dilation % self.stride for tap in range(self.taps)):
            positions = self._positions(phase)
            starts[phase] = len(line) - positions.start // step
            line.extend(map(self.pixel, positions))
        reads = [self._hits(tap) for tap in range(self.taps)]
        framed = [tap * self.dilation for tap in range(self.taps)]  # at output position 0
        places = [(starts[position % self.stride], position) for position in framed]
        windows: list[tuple[int, int, int]] = []  # distance, first position, length
        for (start, position), left in zip(places, reads, strict=True):
            for (other_start, other_position), right in zip(places, reads, strict=True):
                first = max(left.start, right.start)
                both = range(first, min(left.stop, right.stop), self.spread)
                if not both or (left.start - right.start) % self.spread:
                    windows.append((0, 0, 0))
                    continue
                place = start + (self.stride * first + position) // step
                where = other_start + (self.stride * first + other_position) // step
                windows.append((where - place, place, len(both)))
        shifts, runs = _cells(windows)
        return OffsetPlan(tuple(line), shifts, runs)

    def _positions(self, phase: int) -> range:
        """The framed positions of a phase that hold pixels and that the window reaches."""
        stop = self.dilation * (self.taps - 1) + self.stride * (self.outputs - 1) + 1
        if self.padding_mode != "zeros":
            return range(phase, stop, self.stride)
        first = phase + self.stride * max(0, -((phase - self.before) // self.stride))
        first += (self.before - first) % self.spread
        last = self.before + (self.size - 1) * self.spread
        return range(first, min(stop, last + 1), self.stride * self.spread)


def _cells(
    windows: Sequence[tuple[int, int, int]],
) -> tuple[tuple[Shift, ...], tuple[tuple[int, int, int], ...]]:
    """Cut the windows (distance, first, length) of each distance where any of them begins or ends.

    Returns:
        The shifts, and for each window (shift, first cell, one after the last cell).
    """
    by_distance: dict[int, set[tuple[int, int]]] = {}
    for distance, first, length in windows:
        if length:
            by_distance.setdefault(distance, set()).add((first, first + length))
    if not by_distance:
        by_distance[0] = set()
    index = {distance: i for i, distance in enumerate(by_distance)}
    shifts: list[Shift] = []
    runs: dict[tuple[int, int, int], tuple[int, int, int]] = {}
    for distance, own in by_distance.items():
        edges = sorted({edge for window in own for edge in window})
        cells = [
            (start, stop)
            for start, stop in pairwise(edges)
            if any(first <= start and stop <= end for first, end in own)
        ]
        starts = {start: cell for cell, (start, _) in enumerate(cells)}
        stops = {stop: cell + 1 for cell, (_, stop) in enumerate(cells)}
        for first, end in own:
            runs[distance, first, end - first] = (len(shifts), starts[first], stops[end])
        lengths = tuple((start, stop - start) for start, stop in cells)
        shifts.append(Shift(distance, index[-distance], lengths))
    return tuple(shifts), tuple(runs.get(window, (0, 0, 0)) for window in windows)
